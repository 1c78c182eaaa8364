"""Pool: what a large pool of adapter experts costs: a wave of FFT-MoE client steps with few and with many experts per layer.

The number of active experts stays, so the arithmetic of the passes does too; what grows is what every client in flight owns:
values, gradients and two moments of all experts, used or not.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.fft_moe.workload import DENSE, FFN, HIDDEN, LAYERS, POOL_PREFIX, PoolWorkload, write_dense_model
from fedmoe_ds.bench.harness.process import Worker, workers
from fedmoe_ds.bench.harness.repeats import paired
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.harness.workload import AGREEMENT
from fedmoe_ds.bench.wave.measure import DisagreementError
from fedmoe_ds.errors import UserError
from fedmoe_ds.machine import machine_facts

Note = Callable[[str], None]
Found = dict[str, list[dict[str, Any]]]


def run_pool(sizes: list[int], workload: PoolWorkload, rounds: int, note: Note) -> list[Row]:
    """Measure the foundation alone, then every pool size, in alternating rounds after one warm-up.

    Raises:
        UserError: no round, or a pool with fewer experts than are active.
        DisagreementError: the first losses differ, although no expert has learnt anything yet.
    """
    if rounds < 1:
        raise UserError(f"--rounds: {rounds}: too small; use 1 or more")
    for size in sizes:
        if size < workload.top_k:
            raise UserError(f"--experts: {size}: fewer than the {workload.top_k} active ones; use {workload.top_k} or more")
    names = [DENSE, *(f"{POOL_PREFIX}{size}" for size in dict.fromkeys(sizes))]
    with tempfile.TemporaryDirectory(prefix="fedmoe-bench-") as folder, workers(names) as running:
        write_dense_model(workload.seed, Path(folder))
        for name, worker in running.items():
            note(f"{name}: loading and warm-up")
            worker.ask(do="open", folder=folder, workload=workload.to_json())
        check_first_losses({name: worker.ask(do="measure")["losses"] for name, worker in running.items()})
        found: Found = {name: [] for name in names}
        for turn in range(rounds):
            note(f"round {turn + 1} of {rounds}")
            for name, worker in running.items():
                found[name].append(worker.ask(do="measure"))
        return _rows(workload, found, running)


def check_first_losses(losses: dict[str, list[float]]) -> None:
    """Adapter experts start at zero, so every pool starts with the foundation's own losses."""
    expected = losses[DENSE]
    for name, found in losses.items():
        gaps = [abs(a - b) / max(1.0, abs(a)) for a, b in zip(expected, found, strict=True)]
        if not all(gap <= AGREEMENT["float32"] for gap in gaps):  # nan fails as well
            raise DisagreementError(f"{DENSE} has the first losses {expected}, {name} has {found}: not the same computation")


def _rows(workload: PoolWorkload, found: Found, running: dict[str, Worker]) -> list[Row]:
    first = next(name for name in found if name != DENSE)
    step = {name: [one["wall"] / workload.steps for one in many] for name, many in found.items()}
    facts = {**workload.to_json(), "hidden": HIDDEN, "ffn": FFN, "layers": LAYERS, **machine_facts()}
    rows = []
    for name, many in found.items():
        samples = {
            "tokens_per_s": [workload.tokens / spent for spent in step[name]],
            "step_seconds": step[name],
            "to_first": paired(step[name], step[first]),
            "to_dense": paired(step[name], step[DENSE]),
            **(_shares(many) if name != DENSE else {}),
        }
        row: Row = {
            "shape": "pool",
            "system": name,
            "experts": None if name == DENSE else int(name.removeprefix(POOL_PREFIX)),
            "peak_mib": running[name].ask(do="peak"),
            "floor_share": None,
            **dict.fromkeys((*SHARES, *SIZES)),
            **{figure: statistics.median(values) for figure, values in samples.items()},
            **(_sizes(many[0]) if name != DENSE else {}),
            "samples": samples,
            "wall_seconds": [one["wall"] for one in many],
            "cpu_seconds": [one["cpu"] for one in many],
        }
        rows.append({**row, **facts})
    return rows


SHARES = ("passes_share", "optimizer_share", "setup_share")
SIZES = ("adapter_mib", "optimizer_mib", "used_experts")


def _shares(many: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Of every wave: passes, optimizer with clipping, and what is left (clearing and copying at its begin, reports)."""
    passes, optimizer = ([one["parts"][part] / one["wall"] for one in many] for part in ("passes", "optimizer"))
    rest = [1.0 - a - b for a, b in zip(passes, optimizer, strict=True)]
    return dict(zip(SHARES, (passes, optimizer, rest), strict=True))


def _sizes(one: dict[str, Any]) -> dict[str, float]:
    """What does not change from wave to wave."""
    values = (one["adapter_bytes"] / 2**20, one["optimizer_bytes"] / 2**20, statistics.mean(one["used"]))
    return dict(zip(SIZES, values, strict=True))
