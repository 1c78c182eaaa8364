"""Round overhead: federated rounds against a centralised fine-tune of the same tokens, in alternating real runs.

Everybody has the model's own top-k, so that all systems spend the same FLOPs per token. There are two centralised runs. One
takes the steps of all clients, one after the other, with batches of a client's size. The other (`WHOLE_WAVES`) is one client
whose batch is as large as those of all clients together: passes of the federated size, but one set of adapters, and one
optimizer step where clients take one each. A federated run is compared with both. The peer is PEFT with one adapter; its tokens
are random, and its losses are compared with ours before it is timed.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from fedmoe_ds.bench.harness.command import Note
from fedmoe_ds.bench.harness.program import Program, workers
from fedmoe_ds.bench.harness.repeats import make_row, paired
from fedmoe_ds.bench.harness.system import OURS, PEER_PREFIX, check_agreement
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.rounds.jobs import RoundJobs
from fedmoe_ds.bench.wave.measure import WORKER, open_at_once

PART = "overhead"
TARGET = 1.15
CENTRALISED = f"{OURS} centralised"
WHOLE_WAVES = f"{CENTRALISED}, batch of a wave"
METHODS = {OURS: "fedit", f"{OURS} flame": "flame", CENTRALISED: "centralised", WHOLE_WAVES: "centralised"}
FEDERATED = tuple(METHODS)[:2]
CENTRALISED_BASES = {CENTRALISED: "a centralised run's", WHOLE_WAVES: "that of one with a wave's batches"}
PEER = f"{PEER_PREFIX}grouped_mm"


@dataclass
class Cost:
    """What a system's timed rounds took: seconds per token of each, tokens of each, largest peak in MiB."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_mib: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def add(self, seconds: list[float], tokens: list[int], peak_mib: float) -> None:
        self.seconds += seconds
        self.tokens += tokens
        self.peak_mib = max(self.peak_mib, peak_mib)


def measure_overhead(jobs: RoundJobs, repeats: int, note: Note) -> list[Row]:
    """One row per system, in times of the centralised run."""
    costs = {system: Cost() for system in (*METHODS, PEER)}
    name = jobs.load.shape.name
    with workers(WORKER, [PEER]) as running:
        peer = running[PEER]
        note(f"{name}: {PART}: {PEER}: loading, agreement of losses")
        open_peer(peer, jobs)
        for turn in range(repeats):
            for system in in_turn(list(costs), turn):
                note(f"{name}: {PART}: {system}: run {turn + 1} of {repeats}")
                if system == PEER:
                    _train_peer(peer, jobs, costs[PEER])
                else:
                    _run(jobs, system, turn, costs[system])
    return overhead_rows(jobs, costs)


def in_turn(systems: list[str], turn: int) -> list[str]:
    """Back and forth, so that a machine that becomes slower is not the last system's fault."""
    return systems if turn % 2 == 0 else systems[::-1]


def overhead_rows(jobs: RoundJobs, costs: dict[str, Cost]) -> list[Row]:
    """Times over those of both centralised runs for federated systems, which have a target; over the first one for others."""
    rows = []
    for system in costs:
        bases = CENTRALISED_BASES if system in FEDERATED else (CENTRALISED,)
        rows += [_row(jobs, costs, system, base) for base in bases]
    return rows


def _row(jobs: RoundJobs, costs: dict[str, Cost], system: str, base: str) -> Row:
    """Medians. `round_s` is for the tokens of a whole round, whatever the system was timed on."""
    load, cost = jobs.load, costs[system]
    ratios, federated = paired(cost.seconds, costs[base].seconds), system in FEDERATED
    facts = {
        "part": PART,
        "figure": f"{METHODS.get(system, 'one adapter')}: time over {CENTRALISED_BASES[base]}",
        "target": TARGET if federated else None,
        "against": base,
        "round_s": cost.median * load.clients * load.steps * load.sequences * load.length,
        "token_seconds": cost.seconds,
        "round_tokens": cost.tokens,
        "tokens_per_s": 1.0 / cost.median,
    }
    return make_row(load.shape.name, system, cost.peak_mib, {"value": ratios}, **facts, **load.facts())


def _run(jobs: RoundJobs, system: str, turn: int, cost: Cost) -> None:
    load = jobs.load
    sections: dict[str, dict[str, Any]] = {"method": {"name": METHODS[system]}, "federation": _everybody(jobs)}
    if system == WHOLE_WAVES:
        batch = load.clients * load.sequences
        sections["local"] = {"batch_size": batch}
        sections["data"] = {"max_samples": 2 * batch, "partition": {"clients": 1}}
    done = jobs.run(f"overhead-{tuple(METHODS).index(system)}-{turn}", sections)
    cost.add(done.token_seconds(), [one.tokens for one in done.rounds], done.peak_mib)


def _everybody(jobs: RoundJobs) -> dict[str, Any]:
    # One more than is timed: the first one warms up.
    return {"rounds": jobs.load.rounds + 1, "tiers": [{"top_k": jobs.load.shape.top_k, "share": 1.0}]}


def peer_workload(jobs: RoundJobs) -> Workload:
    """The steps of one client: the others' cost as much again."""
    load = jobs.load
    return Workload(load.shape, load.steps, load.sequences, load.length, load.seed, caps=(load.shape.top_k,))


def open_peer(peer: Program, jobs: RoundJobs) -> None:
    """Load the peer, and our trainer beside it for a comparison of what they compute. Raises DisagreementError."""
    workload = peer_workload(jobs)
    with workers(WORKER, [OURS]) as running:  # ours ends with the comparison: nothing shall idle beside timed runs
        both = {OURS: running[OURS], PEER: peer}
        open_at_once(jobs.model, {name: (program, workload) for name, program in both.items()})
        check_agreement({name: program.ask(do="train", stage="warm-up")["losses"] for name, program in both.items()})


def _train_peer(peer: Program, jobs: RoundJobs, cost: Cost) -> None:
    seconds, tokens = peer.ask(do="train", stage="timed")["time"]["wall"], peer_workload(jobs).tokens
    cost.add([seconds / tokens], [tokens], peer.ask(do="peak"))
