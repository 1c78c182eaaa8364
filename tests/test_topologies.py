"""One federation, many topologies: four tiers, unequal clients, partial participation, clipping, micro-batches; equal bits."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
from distributed import run_distributed
from federations import Result, joined, make_config, run_alone, run_joined, write_inputs

from fedmoe_ds.clients.local_training import WaveTrainer
from fedmoe_ds.model.adapter_bank import Bank

pytestmark = pytest.mark.timeout(600)

PARTIAL: dict[str, Any] = {
    "federation": {"participation": 0.8},
    "evaluation": {"metrics": ["exact_match"], "generations": 3, "max_new_tokens": 2},
}
FAST: dict[str, Any] = {"execution": {"reproducible": "fast"}}
DROPOUT: dict[str, Any] = {"adapters": {"dropout": 0.2}}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": DROPOUT,
    "router": {
        "adapters": {"router": "train"},
        "local": {"balance_loss": 0.01, "z_loss": 0.001},
        "execution": {"micro_batch_size": None},
    },
    "rank 2": {"adapters": {"rank": 2}},
    "no attention": {"adapters": {"attention": []}, "execution": {"micro_batch_size": None}},
    "bfloat16 moments": {"local": {"moments": "bfloat16"}},
    "checkpointing": {"execution": {"activation_checkpointing": True}, **DROPOUT},
    "packed": {"execution": {"packing": True, "micro_batch_size": 1}, **DROPOUT},
    "fast": {**FAST, **DROPOUT},
}


class Job(NamedTuple):
    """One run: expert-parallel size, variant, clients in flight, whether rows travel in halves (`execution.expert_halves`)."""

    ep_size: int
    variant: str
    in_flight: int | None = 8
    halves: bool = False


ON_FOUR = [
    Job(1, "base"),
    Job(2, "base"),
    Job(4, "base", 1, True),
    Job(2, "router", halves=True),
    Job(4, "bfloat16 moments", 2),
    Job(4, "fast", 2, True),
    Job(2, "packed", 2),
]
MORE_ON_FOUR = [
    Job(4, "base"),
    Job(2, "base", None, True),
    Job(2, "base", 2),
    Job(2, "rank 2"),
    Job(2, "no attention", halves=True),
    Job(2, "fast"),
]
ON_TWO = [
    Job(1, "base"),
    Job(2, "base"),
    Job(1, "base", 1),
    Job(2, "base", 2, True),
    Job(2, "bfloat16 moments", 1),
    Job(2, "packed", halves=True),
]
ON_ONE = [
    Job(1, "base", 1),
    Job(1, "base", 2),
    Job(1, "base", None),
    Job(1, "bfloat16 moments", 1),
    Job(1, "checkpointing"),
    Job(1, "packed", 1),
    Job(1, "fast"),
]


LIMIT = timedelta(seconds=540)
"""Of one collective."""


class Outcome(NamedTuple):
    """What a job ended with; adapters only where bits are not promised. `held`: bytes of clients in flight on this rank."""

    digest: str
    scores: list[tuple[Any, ...]]
    adapters: dict[str, np.ndarray]
    in_flight: int
    held: int


def config_of(root: Path, job: Job, world_size: int) -> Any:
    name = f"{world_size}-{job.ep_size}-{job.variant.replace(' ', '-')}-{job.in_flight}"
    flight = {"clients_in_flight": job.in_flight, "expert_halves": job.halves}
    place = {"topology": {"ep_size": job.ep_size}, "execution": flight}
    return make_config(root, name, PARTIAL, place, VARIANTS[job.variant])


def outcome_of(result: Result, job: Job) -> Outcome:
    adapters, parts = result.adapters if job.variant == "fast" else {}, result.parts
    return Outcome(result.digest, result.scores(), adapters, parts.in_flight, held_bytes(parts.execution.bank, parts.trainer))


def held_bytes(bank: Bank, trainer: WaveTrainer) -> int:
    """Values, gradients and moments."""
    states = (bank.values, bank.grads, trainer.optimizer.first, trainer.optimizer.second)
    return sum(tensor.nbytes for state in states for tensor in state.values())


def work(rank: int, root: Path, jobs: list[Job]) -> list[Outcome]:
    runtime = joined(rank, LIMIT)
    outcomes = [outcome_of(run_joined(config_of(root, job, runtime.world_size), runtime), job) for job in jobs]
    check_limits()
    return outcomes


def check_limits() -> None:
    """Every group there is by now, whoever created it: DeepSpeed for each ep_size, torch for the world, the control plane."""
    groups = torch_dist.distributed_c10d._world.pg_map
    limits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    assert len(limits) > 3 and set(limits) == {LIMIT}, limits


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("topologies")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def single(root: Path) -> dict[str, Result]:
    """Every variant on one rank with all clients in one wave."""
    return {variant: run_alone(config_of(root, Job(1, variant), 1)) for variant in VARIANTS}


def check(root: Path, single: dict[str, Result], jobs: list[Job], ranks: list[list[Outcome]]) -> None:
    for i, job in enumerate(jobs):
        check_held([outcomes[i] for outcomes in ranks], job, single[job.variant])
        if job.variant == "fast":
            pool = {key: value for outcomes in ranks for key, value in outcomes[i].adapters.items()}
            assert distance(pool, single["base"].adapters) <= 1e-5, job
            continue
        for outcomes in ranks:
            assert outcomes[i].digest == single[job.variant].digest, job
            assert outcomes[i].scores == single[job.variant].scores(), job


def check_held(ranks: list[Outcome], job: Job, single: Result) -> None:
    """The ranks of a cluster hold its clients in flight once between them, and rows of experts for no other."""
    whole = outcome_of(single, job)
    for first in range(0, len(ranks), job.ep_size):
        cluster = ranks[first : first + job.ep_size]
        assert cluster[0].in_flight <= (job.in_flight or whole.in_flight)
        assert whole.in_flight * sum(one.held for one in cluster) == cluster[0].in_flight * whole.held, (job, first)
        assert max(one.held for one in cluster) < whole.held or job.ep_size == 1


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Relative difference of two sets of adapters, as vectors."""
    assert ours.keys() == theirs.keys()
    difference = sum(float(np.square(ours[key].astype(np.float64) - theirs[key]).sum()) for key in ours)
    return float(np.sqrt(difference / sum(float(np.square(value.astype(np.float64)).sum()) for value in theirs.values())))


def test_the_federation_is_uneven(single: dict[str, Result]) -> None:
    base = single["base"]
    assert {client.top_k for client in base.parts.clients} == {8, 4, 2, 1}
    assert len({client.sequences for client in base.parts.clients}) == 6
    assert [event["participants"] for event in base.events if event["event"] == "round"] == [5, 5]
    assert len({event["steps"] for event in base.events if event["event"] == "client"}) > 1
    assert len({result.digest for result in single.values()}) == len(VARIANTS) - 1, "checkpointing alone changes nothing"


def test_one_rank(root: Path, single: dict[str, Result]) -> None:
    check(root, single, ON_ONE, [[outcome_of(run_alone(config_of(root, job, 11)), job) for job in ON_ONE]])


def test_two_ranks(root: Path, single: dict[str, Result]) -> None:
    check(root, single, ON_TWO, run_distributed(work, 2, root, ON_TWO, timeout_s=LIMIT.total_seconds()))


@pytest.mark.parametrize("jobs", [ON_FOUR, pytest.param(MORE_ON_FOUR, marks=pytest.mark.cluster)], ids=["some", "more"])
def test_four_ranks(root: Path, single: dict[str, Result], jobs: list[Job]) -> None:
    check(root, single, jobs, run_distributed(work, 4, root, jobs, timeout_s=LIMIT.total_seconds()))


def test_another_seed_is_another_run(root: Path, single: dict[str, Result]) -> None:
    config = make_config(root, "seed", PARTIAL, {"seed": 1, "federation": {"rounds": 1}})
    assert run_alone(config).digest != single["base"].digest
