"""The subcommands of launch/bench.py that measure, each in the folder of its measurement."""

from __future__ import annotations

from fedmoe_ds.bench.allreduce.command import COMMAND as AGGREGATE
from fedmoe_ds.bench.baselines.command import COMMAND as PEERS
from fedmoe_ds.bench.calibration.command import COMMAND as CALIBRATE
from fedmoe_ds.bench.fft_moe.command import COMMAND as EXPERTS
from fedmoe_ds.bench.fullsize.command import COMMAND as FULLSIZE
from fedmoe_ds.bench.fullsize.export import COMMAND as EXPORT
from fedmoe_ds.bench.gpu.command import COMMAND as GPU
from fedmoe_ds.bench.harness.command import Command
from fedmoe_ds.bench.memory.command import COMMAND as MEMORY
from fedmoe_ds.bench.memory.load import COMMAND as LOAD
from fedmoe_ds.bench.packing.command import COMMAND as PACKING
from fedmoe_ds.bench.planned.command import COMMAND as PLAN
from fedmoe_ds.bench.preparation.command import COMMAND as DATA
from fedmoe_ds.bench.products.command import COMMAND as KERNELS
from fedmoe_ds.bench.rounds.command import COMMAND as ROUND
from fedmoe_ds.bench.scale.command import COMMAND as SCALE
from fedmoe_ds.bench.wave.command import COMMAND as WAVE

COMMANDS: dict[str, Command] = {
    one.name: one
    for one in (
        WAVE,
        LOAD,
        EXPERTS,
        PACKING,
        AGGREGATE,
        CALIBRATE,
        PLAN,
        ROUND,
        MEMORY,
        PEERS,
        FULLSIZE,
        EXPORT,
        DATA,
        KERNELS,
        GPU,
        SCALE,
    )
}
