"""A stop between the waves of round 2 and a new start: the bits of the run that nobody stopped, whatever a method keeps.

What is kept: control variates, moments, merged weights, personal adapters, ranks, collected factors of an unfinished round, and
what the server knows of clients.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from dense_inputs import write_dense
from distributed import run_distributed
from federations import Result, alone, finish, joined, own_values, run_alone
from method_variants import variant_config

from fedmoe_ds.config import Config
from fedmoe_ds.data import Sequences
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.topology import Topology, build_topology
from fedmoe_ds.federation import session
from fedmoe_ds.federation.build import Parts, load_parts
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.methods.hetlora import RANK

pytestmark = pytest.mark.timeout(600)

LONGER: dict[str, Any] = {"federation": {"rounds": 3}, "execution": {"clients_in_flight": 2}, "evaluation": {"every": 1}}
PRUNING: dict[str, Any] = {"method": {"gamma": 0.5, "penalty": 20.0}}
SPARSE = ["flame", "hfedmoe", "hetlora", "flexlora", "flora", "fedsa-lora", "local-only", "scaffold", "fedadam", "moments"]
SPARSE += ["fednova", "ewwa-fl", "cc-fao", "fedvra-rows", "fedex-lora", "embracing-fl", "fedfm"]
PLANNED = ["fed-moe", "flex-moe", "ota-ffl", "wireless-fl", "ub-smoe", "shefl", "prism", "flux", "raffm-random", "read-me"]
PLANNED += ["scaffold-public", "fedmox", "fl-games", "bmsfed"]
STATEFUL = [*SPARSE, *PLANNED, "plain-flora", "plain-scaffold", "fedbe"]
TWO_RANKS = {variant: 1 + place % 2 if variant in SPARSE + PLANNED else 1 for place, variant in enumerate(STATEFUL)}
"""Expert-parallel size in a world of two ranks: two clusters, or one that shares the experts."""


def config_of(root: Path, variant: str, tag: str, ep_size: int = 1) -> Config:
    pruning = PRUNING if variant == "hetlora" else {}
    return variant_config(root, variant, tag, LONGER, pruning, {"topology": {"ep_size": ep_size}})


class StopsAfter:
    """The run's data; whoever reads for the n-th time asks the run to stop, in the middle of a wave."""

    def __init__(self, parts: Parts, reads: int) -> None:
        self.parts, self.data, self.left = parts, parts.training_data, reads

    def train(self, client: int) -> Sequences:
        self.left -= 1
        if self.left == 0:
            self.parts.stop.name = "SIGTERM"
        return self.data.train(client)


def start(config: Config, runtime: Runtime, topology: Topology, resume: str) -> tuple[Parts, Journal]:
    """As `session.train` does it."""
    folder = Path(config.output) / config.name
    source = runtime.run_on_rank0(lambda: session.claim_folder(folder, resume))
    journal = Journal(folder, runtime)
    parts = load_parts(config, runtime, topology, journal.progress)
    session.begin(parts, journal, source["checkpoint"])
    return parts, journal


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_dense(folder, ("llama", "vit", "vit-rgb"))
    return folder


@pytest.fixture(scope="module")
def straight(root: Path) -> dict[str, Result]:
    return {variant: run_alone(config_of(root, variant, "straight")) for variant in STATEFUL}


@pytest.fixture(scope="module")
def stopped(root: Path) -> Path:
    """Folder of runs, each stopped after the second of three waves of round 2."""
    for variant in STATEFUL:
        parts, journal = start(config_of(root, variant, "stopped"), *alone(), "never")
        first_round = len(parts.participants(1))
        # A game is one of all clients.
        assert first_round == len(parts.participants(2)) == (6 if variant == "fl-games" else 5)
        parts.training_data = StopsAfter(parts, first_round + 3)
        outcome = Federation(parts, journal).run()
        journal.close()
        assert outcome.interrupted == "SIGTERM" and parts.state.partial is not None
        assert len(parts.state.partial.done) == 4, "two waves of two clients are in the sums, one client is not"
        assert (parts.checkpoints / "round-00001-partial" / "manifest.json").exists()
    return root


def check(result: Result, other: Result, variant: str) -> None:
    assert result.digest == other.digest, variant
    assert result.scores() == other.scores(), variant


def resumed(config: Config, runtime: Runtime, topology: Topology) -> Result:
    """The end of a stopped run, from a copy of its folder."""
    if runtime.is_main:
        stopped_name = config.name.rsplit("-", 1)[0] + "-stopped"
        shutil.copytree(Path(config.output) / stopped_name, Path(config.output) / config.name)
    runtime.gather(None)
    return finish(*start(config, runtime, topology, "auto"))


@pytest.mark.parametrize("variant", STATEFUL)
def test_resume_in_a_fresh_start(straight: dict[str, Result], stopped: Path, variant: str) -> None:
    result = resumed(config_of(stopped, variant, "again"), *alone())
    check(result, straight[variant], variant)
    assert [event["round"] for event in result.events if event["event"] == "resume"] == [1]
    for name, value in own_values(result.parts).items():
        assert value.equal(own_values(straight[variant].parts)[name]), name


def work(rank: int, root: Path, variants: list[str]) -> list[tuple[str, list[tuple[Any, ...]]]]:
    runtime = joined(rank)
    found = []
    for variant in variants:
        config = config_of(root, variant, "two", TWO_RANKS[variant])
        result = resumed(config, runtime, build_topology(config.topology, runtime))
        found.append((result.digest, result.scores()))
    return found


@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.cluster)])
def test_resume_on_two_ranks(straight: dict[str, Result], stopped: Path, turn: int) -> None:
    # Two neighbours a turn, one of each expert-parallel size.
    variants = [variant for place, variant in enumerate(TWO_RANKS) if place // 2 % 2 == turn]
    for found in run_distributed(work, 2, stopped, variants, timeout_s=540.0):
        for variant, (digest, scores) in zip(variants, found, strict=True):
            assert digest == straight[variant].digest, variant
            assert scores == straight[variant].scores(), variant


def test_there_is_something_to_keep(straight: dict[str, Result]) -> None:
    """Ranks were given up in these runs, so a forgotten rank would show."""
    parts = straight["hetlora"].parts
    ranks = own_values(parts)[RANK.name].flatten().tolist()
    assert any(rank < client.rank for rank, client in zip(ranks, parts.clients, strict=True)), ranks
