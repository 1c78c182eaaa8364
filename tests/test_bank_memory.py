"""Memory of clients in flight: what every rank holds of them, counted on the tensors of a start, against arithmetic on shapes.

(`test_topologies` counts the same on the ranks of real worlds, after a run.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federations import make_config, write_inputs
from hypothesis import given
from hypothesis import strategies as st
from method_variants import variant_config

from fedmoe_ds.clients.optimizer import ClientOptimizer
from fedmoe_ds.federation.execution import execution_of
from fedmoe_ds.federation.schedule import largest_wave, schedule, wave_slots
from fedmoe_ds.model.client_slots import ClientSlots, home_of
from fedmoe_ds.planner import Job, resolve
from fedmoe_ds.planner.memory import HOST_MOMENTS, estimate, outlasting

CPU = torch.device("cpu")
WORLDS = [(ep_size, flight) for ep_size in (1, 2, 4, 8, 16) for flight in (0, 1, 2, 5, 8, 19)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    write_inputs(folder)
    return folder


def held(job: Job, ep_size: int, in_flight: int, shard: int) -> dict[str, int]:
    """Bytes on one rank by purpose, as a start makes them."""
    topology: Any = SimpleNamespace(ep_group=None, layout=SimpleNamespace(ep_size=ep_size), shard=shard)
    bank = execution_of(job, topology, in_flight, CPU).bank
    optimizer = ClientOptimizer(bank, job.config.local)
    values, grads, moments = (
        sum(tensor.nbytes for state in states for tensor in state.values())
        for states in ((bank.values,), (bank.grads,), (optimizer.first, optimizer.second))
    )
    assert bank.nbytes() == values + grads
    dense = sum(bank.values[name].nbytes for name, spec in bank.specs.items() if not spec.expert)
    return {"values": values, "grads": grads, "moments": moments, "dense": dense}


@pytest.mark.parametrize("variant", ["flame", "ffa-lora", "hfedmoe-full", "moments"])
def test_a_cluster_holds_every_client_in_flight_once(variant: str, root: Path) -> None:
    """Whatever ep_size is: experts' adapters are shared out with the experts, dense ones lie at home, and nothing is held for a
    home that stays empty."""
    job = resolve(variant_config(root, variant, "held"), assume=False)
    blocks, experts = job.blocks, job.expert_layout.num_experts
    size = {block.name: len(block.layers) * (experts if block.expert else 1) * math.prod(block.item) for block in blocks}
    one = 4 * sum(size.values())
    moments = {"ffa-lora": 8, "moments": 2}.get(variant, 8) * sum(size[block.name] for block in blocks if block.trained)
    dense = 4 * sum(size[block.name] for block in blocks if not block.expert)
    for ep_size, in_flight in WORLDS:
        ranks = [held(job, ep_size, in_flight, shard) for shard in range(ep_size)]
        total = {purpose: sum(rank[purpose] for rank in ranks) for purpose in ranks[0]}
        assert total == {
            "values": in_flight * one,
            "grads": in_flight * one,
            "moments": in_flight * moments,
            "dense": in_flight * dense,
        }, (ep_size, in_flight)
        # Where there are fewer clients than ranks, the others hold none of the dense part.
        at_home = sorted(rank["dense"] // dense for rank in ranks)
        assert at_home[-1] - at_home[0] <= 1 and at_home.count(0) == max(ep_size - in_flight, 0)
        if in_flight:
            check_plan(job, ep_size, in_flight, ranks)


def check_plan(job: Job, ep_size: int, in_flight: int, ranks: list[dict[str, int]]) -> None:
    """The planner counts the rank with most."""
    topology = job.config.topology.model_copy(update={"ep_size": ep_size})
    spec = replace(job, config=job.config.model_copy(update={"topology": topology}))
    planned = estimate(spec, math.ceil(in_flight / ep_size), job.length, 1, in_flight=in_flight)
    assert planned["adapters in flight"] == max(rank["values"] + rank["grads"] for rank in ranks)
    assert planned["client optimizer"] == max(rank["moments"] for rank in ranks)


def test_one_client_in_flight_is_shared_out(root: Path) -> None:
    """The floor of a rank's memory falls with ep_size; it was a whole client's experts on any number of ranks."""
    job = resolve(make_config(root, "floor"), assume=False)
    alone = held(job, 1, 1, 0)
    for ep_size in (2, 4, 8, 16):
        first, *_, last = (held(job, ep_size, 1, shard) for shard in range(ep_size))
        for rank in (first, last):
            assert ep_size * (rank["values"] - rank["dense"]) == alone["values"] - alone["dense"]
        assert (first["dense"], last["dense"]) == (alone["dense"], 0)


def test_moments_on_the_host_are_counted_there(root: Path) -> None:
    change = {"execution": {"reproducible": "fast", "moments_on": "host"}, "topology": {"ep_size": 4}}
    job = resolve(make_config(root, "host", change), assume=False, kind="cuda")
    near = replace(job, config=make_config(root, "host", change, {"execution": {"moments_on": "device"}}))
    drawn = len(job.participants(1))
    there, here = (estimate(each, math.ceil(drawn / 4), job.length, 1, in_flight=drawn) for each in (job, near))
    lasting = outlasting(job, len(job.clients), drawn)
    lent = max(4 * drawn * math.prod(block.item) * 8 for block in job.blocks if block.expert)
    assert there["client optimizer"] == lent < here["client optimizer"] == lasting.pop(HOST_MOMENTS)
    assert lasting == outlasting(near, len(job.clients), drawn)
    assert {**there, "client optimizer": 0} == {**here, "client optimizer": 0}


@given(st.integers(0, 70), st.integers(1, 16))
def test_every_client_has_a_slot_of_its_own(clients: int, ep_size: int) -> None:
    slots = ClientSlots(clients, ep_size)
    places = [home_of(place, ep_size) for place in range(clients)]
    found = sorted(slots.span(rank).start + slot for rank, slot in places)
    assert found == list(range(clients)), "no slot is missing, none is shared, none is left"
    assert sum(slots.at_home) == clients and max(slots.at_home) == slots.most
    for rank, slot in places:
        assert slot < slots.at_home[rank] and slots.rank_of(slots.span(rank).start + slot) == rank
    by_home = torch.arange(ep_size * slots.most)
    taken = [rank * slots.most + slot for rank, slot in sorted(places)]
    assert slots.of_wave(by_home).tolist() == taken
    assert slots.of_wave(by_home.expand(2, -1), axis=1).tolist() == [taken, taken]


@pytest.mark.parametrize(
    ("change", "clusters", "expected"),
    [
        ({"execution": {"clients_in_flight": 8}}, 1, 6),
        ({"execution": {"clients_in_flight": 2}}, 1, 2),
        ({"execution": {"clients_in_flight": 2}}, 3, 2),
        ({"execution": {"clients_in_flight": 8}}, 6, 1),
        ({"execution": {"clients_in_flight": None}}, 9, 1),
        ({"execution": {"clients_in_flight": None}, "method": {"name": "centralised"}}, 3, 1),
    ],
)
def test_slots_follow_what_a_cluster_gets(change: dict[str, Any], clusters: int, expected: int, root: Path) -> None:
    job = resolve(make_config(root, "slots", change), assume=False)
    assert wave_slots(job, job.clients, clusters) == expected


@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_no_round_needs_more_slots(share: float, clusters: int, root: Path) -> None:
    change = {"federation": {"participation": share, "rounds": 20}, "execution": {"clients_in_flight": None}}
    job = resolve(make_config(root, "rounds", change), assume=False)
    slots, local = wave_slots(job, job.clients, clusters), job.config.local
    largest = [
        largest_wave(schedule(job.participants_among(job.clients, index), job.cost, local, clusters, 2, None))
        for index in range(1, 21)
    ]
    assert max(largest) == slots
    # And with fewer slots than a cluster gets clients, it has more waves.
    plan = schedule(job.participants_among(job.clients, 1), job.cost, local, clusters, 2, 1)
    assert largest_wave(plan) == 1 and sum(map(len, plan)) == len(job.participants_among(job.clients, 1))
