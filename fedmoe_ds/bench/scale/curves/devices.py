"""Simulated devices out of a trace, asynchronous: the virtual clock's part of a round of 100 updates."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.scale.synthetic import SEED
from fedmoe_ds.config import DevicesConfig
from fedmoe_ds.devices import Work, read_sources
from fedmoe_ds.devices.buffer import select_step
from fedmoe_ds.devices.flight import ClockState, Conditions
from fedmoe_ds.randomness import generator

NAME = "devices"
X = "devices"
POINTS = (200, 1_000, 10_000, 100_000)
WALL = "every rank reads the trace at its start and keeps 1.5 KiB of a device; a round asks about 100, however many there are"
_ROUNDS, _PER_ROUND = 20, 100
_WORK = Work(1e12, 2_000_000, 2_000_000)


def write_trace(path: Path, devices: int) -> None:
    """Phones of unequal speed, on for some hours of every day."""
    random = np.random.default_rng(SEED)
    lines = ["name,like,flops_per_s,on\n"]
    for place in range(devices):
        speed, begin = 4e10 * float(np.exp(random.normal())), int(random.integers(0, 56_400))
        lines.append(f"phone-{place},phone-mid,{speed:.4g},{begin}:{begin + 30_000}\n")
    path.write_text("".join(lines), encoding="utf-8")


def measure(x: int) -> dict[str, float]:
    with scratch_folder() as folder:
        write_trace(folder / "trace.csv", x)
        config = DevicesConfig(
            trace=str(folder / "trace.csv"), aggregation="buffered", buffer=_PER_ROUND, concurrency=_PER_ROUND, dropout=0.05
        )
        began = time.perf_counter()
        sources = read_sources(config)
        assert sources is not None
        conditions = Conditions(config, sources.fleet(x, (), SEED), SEED, lambda client: _WORK)
        read = time.perf_counter() - began

        def pick(number: int) -> Callable[[], int]:
            random = generator(SEED, "bench", number)
            return lambda: int(random.integers(x))

        state = ClockState()
        began = time.perf_counter()
        for index in range(1, _ROUNDS + 1):
            state = select_step(conditions, state, index, pick).after
        spent = time.perf_counter() - began
    return {"seconds": spent / _ROUNDS, "read_s": read, "asked": state.starts / _ROUNDS}
