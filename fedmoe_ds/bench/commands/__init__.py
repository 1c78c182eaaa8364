"""The subcommands of launch/bench.py, one file each."""

from __future__ import annotations

from fedmoe_ds.bench.command import Command
from fedmoe_ds.bench.commands import aggregate, calibrate, experts, load, memory, peers, plan, round, wave

COMMANDS: dict[str, Command] = {
    module.COMMAND.name: module.COMMAND for module in (wave, load, experts, aggregate, calibrate, plan, round, memory, peers)
}
