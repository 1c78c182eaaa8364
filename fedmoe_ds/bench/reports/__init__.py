"""The subcommands of launch/bench.py that measure nothing themselves, one file each."""

from __future__ import annotations

from fedmoe_ds.bench.command import Report
from fedmoe_ds.bench.reports import everything, page, targets

REPORTS: dict[str, Report] = {module.REPORT.name: module.REPORT for module in (page, targets, everything)}
