"""Every method on three topologies, all methods in one world each: the digest and the evaluation rows of one rank.

The last two rounds leave ranks and whole clusters idle: all clients but one are missing, then all. There are fewer evaluation
batches than ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dense_inputs import write_dense
from distributed import run_distributed
from federations import Result, alone, build, finish, joined, leave_out
from method_variants import BESIDE, DEVICES, GROUPED, IMAGES, PLAIN, RANKED, VARIANTS, VIEWED, variant_config

from fedmoe_ds.config import Config
from fedmoe_ds.devices.flight import ClockState
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.topology import Topology, build_topology
from fedmoe_ds.report.client_tables import COLUMNS

pytestmark = pytest.mark.timeout(600)

ALL_AT_ONCE: dict[str, Any] = {"execution": {"clients_in_flight": None}}
THINNED: dict[str, Any] = {"federation": {"rounds": 4}}
KEPT = {3: 1, 4: 0}
"""Clients that are left in a round."""
CLUSTER, SWEEP = pytest.mark.cluster, pytest.mark.sweep
Outcome = tuple[str, list[tuple[Any, ...]], ClockState]


def thinned(config: Config, runtime: Runtime, topology: Topology) -> Result:
    """A whole run whose last rounds have next to nobody; on devices, who takes part is theirs to say."""
    parts, journal = build(config, runtime, topology)
    if not config.devices.simulated:
        leave_out(parts, KEPT)
    return finish(parts, journal)


def work(rank: int, root: Path, turns: dict[int, list[str]]) -> dict[tuple[str, int], Outcome]:
    runtime, found = joined(rank), {}
    for ep_size, variants in turns.items():
        for number, variant in enumerate(variants):
            # Every other one with a single client in flight: where experts are shared, the other ranks are home to nobody.
            flight = 1 if ep_size > 1 and number % 2 else 8
            # And every other two with rows that travel in halves.
            how = {"clients_in_flight": flight, "expert_halves": ep_size > 1 and number % 4 < 2}
            place = {"topology": {"ep_size": ep_size}, "execution": how}
            config = variant_config(root, variant, f"{runtime.world_size}-{ep_size}", THINNED, place)
            result = thinned(config, runtime, build_topology(config.topology, runtime))
            found[variant, ep_size] = (result.digest, result.scores(), result.parts.state.clock)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_dense(folder, ("llama", "vit", "vit-rgb"))
    return folder


@pytest.fixture(scope="module")
def single(root: Path) -> dict[str, Result]:
    return {
        variant: thinned(variant_config(root, variant, "1-1", THINNED, ALL_AT_ONCE), *alone())
        for variant in VARIANTS | BESIDE | RANKED | IMAGES | VIEWED | PLAIN | GROUPED
    }


@pytest.fixture(scope="module")
def on_devices(root: Path) -> dict[str, Result]:
    return {variant: thinned(variant_config(root, variant, "1-1", THINNED, ALL_AT_ONCE), *alone()) for variant in DEVICES}


def test_methods_differ(single: dict[str, Result]) -> None:
    assert len({result.digest for result in single.values()}) == len(single)
    for variant, result in single.items():
        reports = [event for event in result.events if event["event"] == "client"]
        assert {event["status"] for event in reports if event["round"] <= 2} == {"ok"}, variant
        trained = [event["round"] for event in reports if event["round"] > 2 and event["status"] == "ok"]
        assert trained == [3], "one client in round 3, nobody in round 4"
        ones = {"read-me"} | PLAIN.keys() | BESIDE.keys() | IMAGES.keys() | VIEWED.keys()
        most = 1 if variant in ones else 4 if variant in GROUPED else 8
        before, *_, after = (event["loss"] for event in result.events if event["event"] == "eval" and event["tier"] == most)
        assert before != after, variant
        # What is said of a client has its column where a round has too many of them for events.
        assert set().union(*reports) - {"event", "time", "round"} <= COLUMNS["client"].keys(), variant


def test_what_clients_do_differs_by_tier(single: dict[str, Result]) -> None:
    """The table of budgets: k active experts, r LoRA rows; the same tier buys the one or the other."""

    def bought(variant: str) -> dict[int, set[tuple[int, int | None]]]:
        clients: dict[int, set[tuple[int, int | None]]] = {}
        for event in single[variant].events:
            if event["event"] == "client" and event["status"] == "ok":
                clients.setdefault(event["top_k"], set()).add((event["active_experts"], event["rank"]))
        return clients

    assert bought("flame") == bought("fedit") == {8: {(8, None)}, 4: {(4, None)}, 1: {(1, None)}}
    assert bought("flexlora") == bought("flora") == {8: {(8, None)}, 4: {(8, 2)}, 1: {(8, 1)}}
    assert bought("fslora") == bought("flora")
    assert bought("fedyogi") == {8: {(8, None)}, 4: {(4, 2)}, 1: {(1, 1)}}
    assert bought("hfedmoe") == {tier: {(8, None)} for tier in (8, 4, 1)}
    assert bought("centralised") == {8: {(8, None)}}
    assert bought("plain-fedit") == {1: {(1, None)}} and bought("plain-flora") == {1: {(1, None), (1, 2), (1, 1)}}
    labels = {event["tier_label"] for event in single["plain-flora"].events if event["event"] == "eval"}
    assert labels == {"1 r4", "1 r2", "1 r1"} and not [e for e in single["plain-flora"].events if e["event"] == "experts"]


@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=CLUSTER)])
def test_one_client_at_a_time(root: Path, single: dict[str, Result], turn: int) -> None:
    """Waves of one, in another order than that of the participants."""
    for variant, result in list(single.items())[turn::2]:
        config = variant_config(root, variant, "waves", THINNED, {"execution": {"clients_in_flight": 1}})
        waves = thinned(config, *alone())
        assert waves.digest == result.digest, variant
        assert waves.scores() == result.scores(), variant


def test_fast_mode_agrees(root: Path, single: dict[str, Result]) -> None:
    """Batched across clients: factors of the LoRA scale, unequal rows, held-back and whole experts; equal predictions."""
    for variant in ("fslora", "hetlora", "hfedmoe", "hfedmoe-full", "scaffold", "plain-scaffold", "shefl"):
        result = single[variant]
        config = variant_config(root, variant, "fast", THINNED, ALL_AT_ONCE, {"execution": {"reproducible": "fast"}})
        fast = thinned(config, *alone())
        for ours, theirs in zip(fast.scores(), result.scores(), strict=True):
            assert ours[:4] == theirs[:4]
            assert ours[4] == pytest.approx(theirs[4], rel=1e-4), (variant, ours, theirs)


# Neighbours in the table are kin (rescalers, drift corrections): on two ranks each kind meets both expert-parallel sizes.
SHARED = [*VARIANTS, *BESIDE, *RANKED, *IMAGES, *VIEWED, *DEVICES, *GROUPED]
"""Those whose experts can lie on several ranks."""
SOME = {2: SHARED[::4], 1: [*SHARED[2::4], *list(PLAIN)[::2]]}
ALTERNATELY = {2: SHARED[::2], 1: [*SHARED[1::2], *PLAIN]}
EVERYWHERE = {2: SHARED, 1: [*SHARED, *PLAIN]}
TOPOLOGIES = [(2, SOME), pytest.param(2, ALTERNATELY, marks=CLUSTER), pytest.param(4, EVERYWHERE, marks=CLUSTER)]
TOPOLOGIES += [pytest.param(2, EVERYWHERE, marks=SWEEP)]


@pytest.mark.parametrize(("world_size", "turns"), TOPOLOGIES)
def test_topologies(
    root: Path, single: dict[str, Result], on_devices: dict[str, Result], world_size: int, turns: dict[int, list[str]]
) -> None:
    expected = single | on_devices
    for found in run_distributed(work, world_size, root, turns, timeout_s=540.0):
        assert found.keys() == {(variant, ep_size) for ep_size, variants in turns.items() for variant in variants}
        for (variant, ep_size), (digest, scores, clock) in found.items():
            assert digest == expected[variant].digest, (variant, ep_size)
            assert scores == expected[variant].scores(), (variant, ep_size)
            assert clock == expected[variant].parts.state.clock, (variant, ep_size)
