"""The planner's memory: what is planned with, refused and recommended, on a rank and on its host."""

from __future__ import annotations

import itertools
import re
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from every import every
from planned import OLMOE, olmoe, small

from fedmoe_ds.checkpoint.client_rows import ClientRows, RowLayout, Slabs
from fedmoe_ds.checkpoint.memories import Memory, Shapes, decoded, encoded
from fedmoe_ds.config import load_config
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.sampling import participant_count
from fedmoe_ds.methods.fedit import FedIT
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.cross_entropy import COPIES, LOGITS
from fedmoe_ds.planner import Job, World, load_hardware, predict_job, resolve
from fedmoe_ds.planner.activations import activations
from fedmoe_ds.planner.advice import advice
from fedmoe_ds.planner.client_state import Kept, client_state, rows_at_home
from fedmoe_ds.planner.dry_run import describe
from fedmoe_ds.planner.legality import HEADROOM, host_shortage, shortage, tight
from fedmoe_ds.planner.memory import COPY, HOST_MOMENTS, PERSONAL, format_bytes
from fedmoe_ds.planner.plan import plan
from fedmoe_ds.planner.rank_memory import rank_memory
from fedmoe_ds.planner.search import search

__all__ = ["olmoe", "small"]


def test_moments_in_bfloat16_take_half(small: Job) -> None:
    """Of the optimizer's bytes and of nothing else; and it takes less time to clear them."""
    local = small.config.local.model_copy(update={"moments": "bfloat16"})
    job = replace(small, config=small.config.model_copy(update={"local": local}))
    a100 = load_hardware("a100")
    whole, half = (rank_memory(each, 1, 4, a100, 6).device for each in (small, job))
    assert whole["client optimizer"] == whole["adapters in flight"] == 2 * half["client optimizer"]
    assert {purpose for purpose in whole if whole[purpose] != half[purpose]} == {"client optimizer"}
    wide, narrow = (predict_job(each, 1, 4, World(1, 1), a100) for each in (small, job))
    assert narrow.train_split["set-up"] < wide.train_split["set-up"]


def test_a_checkpoint_in_the_background_takes_a_copy(small: Job) -> None:
    """Of what it writes of the global adapters, while the next round trains, and of nothing that is a client's own."""
    saving = small.config.checkpoint.model_copy(update={"background": False})
    job = replace(small, config=small.config.model_copy(update={"checkpoint": saving}))
    host = load_hardware("a100").model_copy(update={"kind": "cpu"})
    copying, waiting = (rank_memory(each, 1, 4, host, 6).device for each in (small, job))
    bank = Bank(small.blocks, small.expert_layout.num_experts, 1, 1, torch.device("cpu"))
    written = sum(tensor.nbytes for _, _, tensor in bank.items(0))
    assert copying.pop(COPY) == written < waiting["global adapters"], "the rescalers of a client are no part of it"
    assert copying == waiting
    assert COPY not in rank_memory(small, 1, 4, load_hardware("a100"), 6).device, "it is in the host's memory"
    device = replace(job, device="cuda")
    assert rank_memory(device, 1, 4, load_hardware("a100"), 6).host[COPY] == written, (
        "a device's tensors have to come to the host"
    )


def test_clients_own_state_is_planned_as_a_run_keeps_it(small: Job, tmp_path: Path) -> None:
    """Rows of those that were trained, over the clusters, in memory up to a limit and in files beyond."""
    clients = 40
    config = small.config.model_copy(
        update={"federation": small.config.federation.model_copy(update={"participation": 0.1, "rounds": 3})}
    )
    own = [BlockSpec("own", (0, 1), (30, 40), expert=True, personal=True), BlockSpec("scalar", (-1,), (1,), personal=True)]
    for clusters, ep_size, gib in itertools.product((1, 2, 4), (1, 4), (4.0, 1e-3, 0.0)):
        execution = config.execution.model_copy(update={"client_state_gib": gib})
        topology = config.topology.model_copy(update={"ep_size": ep_size})
        job = replace(small, config=config.model_copy(update={"execution": execution, "topology": topology}), blocks=own)
        experts = job.expert_layout.num_experts // ep_size
        slabs = Slabs(int(gib * 2**30), lambda: tmp_path)
        rows = ClientRows(RowLayout(own, experts).width, slabs)
        homes = rows_at_home(job, clients, 4, clusters)
        rows.reserve(homes + 4)
        planned = client_state(job, clients, 4, clusters, trained_here=4)
        size = 4 * rows.width * (homes + 4)
        assert slabs.in_memory <= min(size, int(gib * 2**30)) <= planned.memory
        assert planned.files == size - min(size, int(gib * 2**30)), (clusters, ep_size, gib)
        rows.clear()
        # What a file is written from, what travels, and what everybody begins with.
        beside = planned.memory + planned.files - size
        assert beside == 4 * rows.width * (1 + (2 if clusters == 1 else 4) * homes)
    assert client_state(replace(small, blocks=[b for b in small.blocks if not b.personal]), 40, 4, 1) == Kept()


@pytest.mark.parametrize("shapes", [{}, {"loss": ()}, {"scores": (2, 16), "held": (2, 16), "progress": (4,)}])
def test_what_the_server_knows_is_planned_as_it_is_kept(small: Job, shapes: Shapes) -> None:
    """Of all clients that a plan may name, on every rank."""
    clients, known = 3000, dict[int, Memory]()
    method = type("Knowing", (FedIT,), {"memory": lambda self: shapes, "plan": lambda self, context: None})(FedIT.Params())
    told = encoded({name: np.ones(shape) for name, shape in shapes.items()})
    tracemalloc.start()
    for client in range(clients if shapes else 0):
        known[client + 1000] = decoded(told, shapes)
    counted, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    job = replace(small, method=method, blocks=[block for block in small.blocks if not block.personal])
    planned = client_state(job, clients, clients, clusters=4).memory
    assert planned == pytest.approx(counted, rel=0.1) if shapes else planned == 0
    assert client_state(job, clients, 10, clusters=1).memory * clients == planned * 10 * job.config.federation.rounds


@pytest.mark.parametrize("sampling", ["uniform", "size", "budget"])
@pytest.mark.parametrize("participation", [0.01, 0.1, 1.0])
def test_rows_are_of_clients_that_were_drawn(small: Job, sampling: str, participation: float) -> None:
    """On the fullest cluster, counted on the draws of a run; a client that was never drawn has none."""
    update = {"participation": participation, "rounds": 12, "sampling": sampling}
    federation = small.config.federation.model_copy(update=update)
    job = replace(small, config=small.config.model_copy(update={"federation": federation}))
    members = [replace(small.clients[0], index=i, name=f"c{i}", top_k=1 + i % 4) for i in range(400)]
    drawn = {client.index for index in range(1, 13) for client in job.drawn_among(members, index)}
    for clusters in (1, 4, 64, 512):
        fullest = max(Counter(index % clusters for index in drawn).values())
        planned = rows_at_home(job, 400, participant_count(400, participation), clusters)
        assert fullest <= planned <= -(-400 // clusters)
        if sampling == "uniform" and clusters == 4:
            assert planned <= 1.6 * fullest + 3


def test_the_plan_and_the_dry_run_name_the_disk(small: Job) -> None:
    """What does not fit into `client_state_gib` lies in files, and is no memory of the rank."""
    execution = small.config.execution.model_copy(update={"client_state_gib": 0.0, "reproducible": "auto"})
    roomy = small.config.model_copy(update={"execution": small.config.execution.model_copy(update={"reproducible": "auto"})})
    job, world, cpu = small.config.model_copy(update={"execution": execution}), World(1, 2), load_hardware("cpu")
    near, beyond = (plan(config, world, cpu, searching=False) for config in (roomy, job))
    files = beyond.prediction.client_files
    assert files > 0 == near.prediction.client_files == near.data()["client_files"]
    assert near.prediction.memory[PERSONAL] - beyond.prediction.memory[PERSONAL] == files == beyond.data()["client_files"]
    (line,) = [line for line in beyond.lines() if line.startswith("disk per rank: ")]
    assert line.endswith(f"foundation.cache, {format_bytes(2 * files)} for the 2 ranks of a host")
    assert not any(line.startswith("disk per rank") for line in near.lines())
    described = describe(job, 2, "cpu")
    assert described[-1].startswith(f"disk per rank: {format_bytes(files)} of clients' own state")
    assert f"{PERSONAL:<22} {format_bytes(beyond.prediction.memory[PERSONAL]):>11}" in "\n".join(described)


def test_logits_take_a_chunk(olmoe: Job) -> None:
    """However many targets a pass has: a vocabulary ten times as large takes no more than a chunk of its logits."""
    wide = replace(olmoe, size=replace(olmoe.size, vocabulary=10 * olmoe.size.vocabulary))
    assert activations(wide, 8, 128) == activations(olmoe, 8, 128), "a layer's backward pass has more than a chunk"
    few = [activations(job, 1, 1) for job in (wide, olmoe)]
    assert 0 < few[0] - few[1] <= COPIES * 4 * LOGITS


def test_memory_is_refused_with_the_numbers(olmoe: Job) -> None:
    a100 = load_hardware("a100")
    needed = predict_job(olmoe, 8, 8, World(1, 8), a100).memory_total
    card = (needed + 1e6) / HEADROOM
    choices, refusals = search(olmoe, World(1, 8), a100.model_copy(update={"memory_bytes": card}))
    fitting = {(choice.ep_size, choice.in_flight) for choice in choices}
    assert fitting == {(8, 8), (4, 1)}, "only wide pools with few clients fit; one is for where no more fit"
    held = f"a rank has {card / 2**30:.1f} GiB, 90 % of which may be planned with"
    assert any("GiB per rank at ep_size 1 with" in refusal.reason and held in refusal.reason for refusal in refusals)
    with pytest.raises(UserError, match=r"no topology of 8 ranks fits; .* ep_size 8 with 1 clients .* a rank has 0\.9 GiB"):
        search(olmoe, World(1, 8), a100.model_copy(update={"memory_bytes": 1e9}))
    found = shortage(2 << 30, 1 << 30, 2, None)
    assert found == "memory: 2.0 GiB per rank at ep_size 2 with all clients in flight: a rank has 1.0 GiB"
    assert shortage(1 << 30, 1 << 30, 2, None) is None, "an exact fit"
    assert tight(89, 100.0) is None and "95 % of a rank's memory" in str(tight(95, 100.0))


def test_nothing_is_recommended_that_takes_more_than_nine_tenths(olmoe: Job) -> None:
    a100 = load_hardware("a100").model_copy(update={"memory_bytes": 30e9})
    choices, refusals = search(olmoe, World(1, 8), a100)
    assert choices and refusals
    assert every(choice.prediction.memory_total <= HEADROOM * 30e9 for choice in choices)
    assert every(refusal.needed > HEADROOM * 30e9 for refusal in refusals)


def test_advice_names_what_helps_and_nothing_else(olmoe: Job) -> None:
    """Each change that is named saves what it says, and what saves nothing is not named."""
    a100, world = load_hardware("a100"), World(1, 8)
    said = advice(olmoe, 8, 1, world, a100)
    assert "topology.ep_size" not in said and "clients_in_flight" not in said, "there is no wider pool, and no fewer clients"
    said = advice(olmoe, 8, 8, world, a100)
    named = dict(re.findall(r"([\w.]+=\S+) \(([\d.]+) GiB less\)", said))
    assert {"execution.micro_batch_size=1", "execution.activation_checkpointing=true", "adapters.rank=8"} <= set(named)
    before = predict_job(olmoe, 8, 8, world, a100).memory_total
    # Two stand for all: one of a pass, one of the blocks.
    for change, less in [each for each in named.items() if each[0].startswith(("execution.micro", "adapters.rank"))]:
        changed = resolve(load_config(OLMOE, [f"foundation.path={olmoe.config.foundation.path}", change]))
        saved = before - predict_job(changed, 8, 8, world, a100).memory_total
        assert saved / 2**30 == pytest.approx(float(less), abs=0.06), change
    wide = advice(olmoe, 1, 64, world, a100)
    assert "topology.ep_size=8" in wide and "execution.clients_in_flight=" in wide


def test_advice_goes_down_to_one_client_in_flight(olmoe: Job) -> None:
    """Fewer than ep_size, where no more fit; and as many as fit, where some do."""
    a100, world = load_hardware("a100"), World(1, 8)
    held = {flight: predict_job(olmoe, 8, flight, world, a100).memory_total for flight in (1, 2, 4, 8)}
    assert held[1] < held[2] < held[4] < held[8]
    for room, named in ((held[4], 4), (held[2], 2), (held[1], 1), (held[1] / 2, 1)):
        card = a100.model_copy(update={"memory_bytes": (room + 1e6) / HEADROOM})
        said = dict(re.findall(r"([\w.]+)=(\S+) \([\d.]+ GiB less\)", advice(olmoe, 8, 8, world, card)))
        assert said["execution.clients_in_flight"] == str(named)
        if room == held[1]:
            choices, _ = search(olmoe, world, card)
            assert {(choice.ep_size, choice.in_flight) for choice in choices} == {(8, 1)}


def test_one_client_in_flight_is_tried_where_it_is_configured(olmoe: Job) -> None:
    """A plan that fits has it only then."""
    for configured, expected in ((1, {1, 8}), (8, {8})):
        topology = olmoe.config.topology.model_copy(update={"ep_size": 8})
        execution = olmoe.config.execution.model_copy(update={"clients_in_flight": configured})
        few = olmoe.config.federation.model_copy(update={"participation": 8 / len(olmoe.clients)})
        update = {"topology": topology, "execution": execution, "federation": few}
        choices, refusals = search(
            replace(olmoe, config=olmoe.config.model_copy(update=update)), World(1, 8), load_hardware("h200")
        )
        assert not refusals and {choice.in_flight for choice in choices if choice.ep_size == 8} == expected


def test_moments_on_the_host_are_named_where_it_has_room(olmoe: Job) -> None:
    """With what they save on the device, and not where the host would be short of memory then."""
    world = World(1, 8)
    a100, (job, lent) = load_hardware("a100"), (_frugal(olmoe, moments_on) for moments_on in ("device", "host"))
    near, far = (predict_job(each, 1, 64, world, a100) for each in (job, lent))
    named = dict(re.findall(r"([\w.]+=\S+) \(([\d.]+) GiB less\)", advice(job, 1, 64, world, a100)))
    saved = (near.memory_total - far.memory_total) / 2**30
    assert float(named["execution.moments_on=host"]) == pytest.approx(saved, abs=0.06)
    more = far.host_memory[HOST_MOMENTS]
    assert sum(far.host_memory.values()) - sum(near.host_memory.values()) == more > saved * 2**30
    short = a100.model_copy(update={"host_memory_bytes": 8 * sum(far.host_memory.values()) - 1})
    assert host_shortage(sum(near.host_memory.values()), 8, short.host_memory_bytes) is None
    assert "moments_on" not in advice(job, 1, 64, world, short)
    assert "moments_on" not in advice(lent, 1, 64, world, a100), "they are there already"
    assert "moments_on" not in advice(olmoe, 1, 64, world, load_hardware("cpu")), "a CPU has no other memory"
    fewer = predict_job(lent, 1, 8, world, a100).host_memory[HOST_MOMENTS]
    assert 4 * fewer == more, "a cluster has 32 of 256 participants; eight of them are planned, whatever is configured"


def _frugal(job: Job, moments_on: str) -> Job:
    """On a GPU, with all that lowers the memory of a pass."""
    update = {"moments_on": moments_on, "micro_batch_size": 1, "activation_checkpointing": True}
    execution = job.config.execution.model_copy(update=update)
    return replace(job, device="cuda", config=job.config.model_copy(update={"execution": execution}))


def test_personal_state_is_on_the_host(small: Job) -> None:
    """Of a GPU's ranks: not on the card, and all ranks of a host together must fit into its memory."""
    a100 = load_hardware("a100")
    found = predict_job(small, 1, 8, World(1, 8), a100)
    assert PERSONAL not in found.memory and found.host_memory[PERSONAL] > 0
    assert PERSONAL in predict_job(small, 1, 8, World(1, 1), load_hardware("cpu")).memory
    assert predict_job(small, 1, 8, World(1, 1), load_hardware("cpu")).host_memory == {}
    assert "on a host for 8 ranks" in str(host_shortage(10, 8, 79.0))
    assert host_shortage(10, 8, 80.0) is None and host_shortage(10, 8, None) is None
    execution = small.config.execution.model_copy(update={"reproducible": "auto"})
    automatic = small.config.model_copy(update={"execution": execution})
    little = a100.model_copy(update={"host_memory_bytes": 1e9})
    with pytest.raises(UserError, match=r"GiB on a host for 8 ranks .*: a host has 0\.9 GiB"):
        plan(automatic, World(1, 8), little, searching=False)
