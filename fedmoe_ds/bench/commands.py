"""The subcommands of launch/bench.py that measure, each in the folder of its measurement."""

from __future__ import annotations

from fedmoe_ds.bench.allreduce import command as aggregate
from fedmoe_ds.bench.baselines import command as peers
from fedmoe_ds.bench.calibration import command as calibrate
from fedmoe_ds.bench.fft_moe import command as experts
from fedmoe_ds.bench.harness.command import Command
from fedmoe_ds.bench.memory import command as memory
from fedmoe_ds.bench.memory import load_command as load
from fedmoe_ds.bench.planned import command as plan
from fedmoe_ds.bench.rounds import command as round
from fedmoe_ds.bench.wave import command as wave

COMMANDS: dict[str, Command] = {
    module.COMMAND.name: module.COMMAND for module in (wave, load, experts, aggregate, calibrate, plan, round, memory, peers)
}
