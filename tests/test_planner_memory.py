"""The planner's memory: what is planned with, refused and recommended, on a rank and on its host."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from every import every
from federations import make_config, write_inputs

from fedmoe_ds.config import load_config
from fedmoe_ds.errors import UserError
from fedmoe_ds.model.cross_entropy import COPIES, LOGITS
from fedmoe_ds.planner import Job, World, load_hardware, predict_job, resolve
from fedmoe_ds.planner.activations import activations
from fedmoe_ds.planner.advice import advice
from fedmoe_ds.planner.legality import HEADROOM, host_shortage, shortage, tight
from fedmoe_ds.planner.memory import COPY, PERSONAL
from fedmoe_ds.planner.plan import plan
from fedmoe_ds.planner.rank_memory import rank_memory
from fedmoe_ds.planner.search import search

REPOSITORY = Path(__file__).parents[1]
OLMOE = REPOSITORY / "configs" / "olmoe-7b.yaml"


@pytest.fixture(scope="module")
def olmoe() -> Job:
    return resolve(load_config(OLMOE, [f"foundation.path={REPOSITORY / 'configs' / 'models' / 'olmoe-1b-7b'}"]))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Job:
    root = tmp_path_factory.mktemp("planner-memory")
    write_inputs(root)
    return resolve(make_config(root, "planned", {"execution": {"micro_batch_size": None}}))


def test_moments_in_bfloat16_take_half(small: Job) -> None:
    """Of the optimizer's bytes and of nothing else; and it takes less time to clear them."""
    local = small.config.local.model_copy(update={"moments": "bfloat16"})
    job = replace(small, config=small.config.model_copy(update={"local": local}))
    a100 = load_hardware("a100")
    whole, half = (rank_memory(each, 1, 4, a100, 6) for each in (small, job))
    assert whole["client optimizer"] == whole["adapters in flight"] == 2 * half["client optimizer"]
    assert {purpose for purpose in whole if whole[purpose] != half[purpose]} == {"client optimizer"}
    wide, narrow = (predict_job(each, 1, 4, World(1, 1), a100) for each in (small, job))
    assert narrow.train_split["set-up"] < wide.train_split["set-up"]


def test_a_checkpoint_in_the_background_takes_a_copy(small: Job) -> None:
    """Of the global adapters and of every client's rescalers, while the next round trains."""
    saving = small.config.checkpoint.model_copy(update={"background": False})
    job = replace(small, config=small.config.model_copy(update={"checkpoint": saving}))
    host = load_hardware("a100").model_copy(update={"kind": "cpu"})
    copying, waiting = (rank_memory(each, 1, 4, host, 6) for each in (small, job))
    copied, adapters = copying.pop(COPY), waiting["global adapters"]  # with the rescalers of one client
    assert adapters < copied <= adapters + waiting["personal state"] and copying == waiting
    assert COPY not in rank_memory(small, 1, 4, load_hardware("a100"), 6), "it is in the host's memory"


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
    assert {(choice.ep_size, choice.in_flight) for choice in choices} == {(8, 8)}, "only the widest pool with the fewest fits"
    held = f"a rank has {card / 2**30:.1f} GiB, 90 % of which may be planned with"
    assert any("GiB per rank at ep_size 1 with" in refusal.reason and held in refusal.reason for refusal in refusals)
    with pytest.raises(UserError, match=r"no topology of 8 ranks fits; .* ep_size 8 with 8 clients .* a rank has 0\.9 GiB"):
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
    said = advice(olmoe, 8, 8, world, a100, 256)
    assert "topology.ep_size" not in said and "clients_in_flight" not in said, "there is no wider pool, and no fewer clients"
    named = dict(re.findall(r"([\w.]+=\S+) \(([\d.]+) GiB less\)", said))
    assert {"execution.micro_batch_size=1", "execution.activation_checkpointing=true", "adapters.rank=8"} <= set(named)
    before = sum(rank_memory(olmoe, 8, 8, a100, 256).values())
    # Two stand for all: one of a pass, one of the blocks.
    for change, less in [each for each in named.items() if each[0].startswith(("execution.micro", "adapters.rank"))]:
        changed = resolve(load_config(OLMOE, [f"foundation.path={olmoe.config.foundation.path}", change]))
        saved = before - sum(rank_memory(changed, 8, 8, a100, 256).values())
        assert saved / 2**30 == pytest.approx(float(less), abs=0.06), change
    wide = advice(olmoe, 1, 64, world, a100, 256)
    assert "topology.ep_size=8" in wide and "execution.clients_in_flight=1" in wide


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
