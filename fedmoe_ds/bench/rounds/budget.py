"""Round budget: what a small k saves: a wave of clients at k = 1 against one at k = K, beside the FLOPs of the two."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.harness.command import Note
from fedmoe_ds.bench.harness.program import Program, workers
from fedmoe_ds.bench.harness.repeats import make_row, paired
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.wave.measure import WORKER, open_at_once
from fedmoe_ds.config import Config
from fedmoe_ds.planner import Job, resolve
from fedmoe_ds.planner.work import PassWork, Rows

PART = "k"
TOLERANCE = 0.15


def measure_budget(loads: list[Workload], folder: Path, rounds: int, note: Note) -> list[Row]:
    """One row per workload, all of one shape, whose model is in the folder. Waves at either k alternate."""
    rows = []
    with workers(WORKER, ["small", "large"]) as running:
        for load in loads:
            note(f"{load.shape.name}: {PART}: {load.sequences} x {load.length} tokens per client and step")
            pair = {cap: (running[name], same_cap(load, cap)) for name, cap in (("small", 1), ("large", load.shape.top_k))}
            seconds = _alternate(pair, folder, rounds)
            rows.append(budget_row(load, seconds, resolve(job_config(load, folder)), running["large"].ask(do="peak")))
    return rows


def same_cap(load: Workload, cap: int) -> Workload:
    """The same workload with every client at one k."""
    return replace(load, caps=(cap,) * len(load.caps))


def _alternate(pair: dict[int, tuple[Program, Workload]], folder: Path, rounds: int) -> dict[int, list[float]]:
    """Wall seconds of the timed waves by k."""
    open_at_once(folder, {str(cap): one for cap, one in pair.items()}, OURS)
    # The first wave chooses kernels and touches fresh memory, which no later one does: it is not timed.
    for program, _ in pair.values():
        program.ask(do="train", stage="warm-up")
    seconds: dict[int, list[float]] = {cap: [] for cap in pair}
    for _ in range(rounds):
        for cap, (program, _) in pair.items():
            seconds[cap].append(program.ask(do="train", stage="timed")["time"]["wall"])
    return seconds


def budget_row(load: Workload, seconds: dict[int, list[float]], job: Job, peak: float) -> Row:
    """Measured ratio, ratio of FLOPs, and the one over the other: above 1, a small k saves less time than FLOPs."""
    small, large = seconds[1], seconds[load.shape.top_k]
    times, flops = paired(small, large), wave_flops(load, job, 1) / wave_flops(load, job, load.shape.top_k)
    samples = {"time_ratio": times, "value": [time / flops for time in times]}
    facts = {
        "part": PART,
        "figure": f"k 1 over k {load.shape.top_k}, {load.sequences} x {load.length} tokens: time over FLOPs",
        "target": 1.0 + TOLERANCE,
        "flops_ratio": flops,
        "small_wall_seconds": small,
        "large_wall_seconds": large,
        "tokens_per_s": load.tokens / statistics.median(small),
        "clients": len(load.caps),
        **{name: getattr(load, name) for name in ("steps", "sequences", "length", "seed")},
    }
    return make_row(load.shape.name, OURS, peak, samples, **facts, **load.shape.facts())


def wave_flops(load: Workload, job: Job, cap: int) -> float:
    """FLOPs of one step of all clients at one k, as the planner counts them: frozen weights, adapters, scores, output head."""
    samples, length = len(load.caps) * load.sequences, load.length
    work = PassWork(job, training=True)
    home = work.home(Rows(samples, length, samples * (length - 1)))
    experts = work.experts(float(samples * length * cap), 1.0, job.expert_layout.num_experts)
    both = home + experts
    return float(both.flops + both.adapters + both.scores * work.score_flops)


def job_config(load: Workload, folder: Path) -> Config:
    """What the planner is asked about. The folder has no tokenizer, so that equal clients are assumed and no data are read."""
    tree: dict[str, Any] = {
        "foundation": {"path": str(folder)},
        "adapters": {"rank": load.rank, "alpha": load.alpha, "attention": list(load.attention)},
        "local": {"steps": load.steps, "batch_size": load.sequences, "lr": load.lr, "clip": None},
        "data": {"sequence_length": load.length, "max_samples": load.steps * load.sequences},
        "execution": {"reproducible": "fast"},
    }
    tree["data"]["partition"] = {"clients": len(load.caps)}
    return Config.model_validate(tree)
