"""Reports: the subcommands of launch/bench.py that measure nothing themselves, by name."""

from __future__ import annotations

from fedmoe_ds.bench.harness.command import Report
from fedmoe_ds.bench.results import page, suite, targets_command

REPORTS: dict[str, Report] = {module.REPORT.name: module.REPORT for module in (page, targets_command, suite)}
