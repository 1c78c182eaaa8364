"""FedBE, exactly: further layers are the identity at first, all blocks are FedAvg, blocks follow a client's own data; two
rounds against the equations in float64; what is counted, planned, exported and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import TEXT, write_dense
from every import every
from federations import Result, alone, build, finish, make_config, run_alone
from reference_blocks import Expanded, Task
from reference_inputs import check_equal
from test_families import original_rotary
from test_planner_activations import Alive
from trained import own_logits, random_run, run_folder, their_logits
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from fedmoe_ds.clients.batches import local_batches
from fedmoe_ds.config import Config
from fedmoe_ds.config.schema import MethodConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.export.command import export
from fedmoe_ds.export.written import Request
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.traffic import Traffic
from fedmoe_ds.foundation.expansion import OUTPUTS, Expansion
from fedmoe_ds.methods import Assignment, Client, ModelFacts, RoundContext, load_method
from fedmoe_ds.model.batch import Rows
from fedmoe_ds.planner.activations import kept_bytes
from fedmoe_ds.planner.memory import estimate
from fedmoe_ds.results import open_run

BLOCKS = 2
SMALL: dict[str, Any] = {
    "adapters": {"attention": []},
    "federation": {"rounds": 2},
    "local": {"max_steps": 2, "weight_decay": 0.1, "lr": 5e-3, "eps": 1e-4, "clip": None},
    "execution": {"micro_batch_size": None},
    "evaluation": {"max_sequences": 1, "client_sequences": 0},
}


def tiers(*blocks: int | None) -> dict[str, Any]:
    return {"federation": {"tiers": [{"blocks": count, "share": 1.0} for count in blocks]}}


FAMILIES = ("llama", "qwen3")
KINDS = ["full_attention"] * 2 + ["sliding_attention"] * 2
FEDBE: dict[str, Any] = {"method": {"name": "fedbe"}}
MIXED = (FEDBE, tiers(2, 1, 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fedbe")
    write_dense(folder, ("llama",), samples=(13, 9, 7, 5))
    # Norms within attention, and a kind for every layer.
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention"]
    shape = {**TEXT, "head_dim": 16, "layer_types": kinds, "sliding_window": 6, "use_sliding_window": True}
    AutoModelForCausalLM.from_config(Qwen3Config(**shape)).save_pretrained(folder / "qwen3")
    AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(folder / "qwen3")
    return folder


def config_of(root: Path, name: str, *changes: dict[str, Any], family: str = "llama") -> Config:
    expanded = {"foundation": {"path": str(root / family), "expand": {"blocks": BLOCKS}}}
    return make_config(root, f"{name}-{family}", SMALL, expanded, *changes)


@pytest.fixture(scope="module")
def mixed(root: Path) -> Result:
    return run_alone(config_of(root, "mixed", *MIXED))


def tensors(parts: Parts) -> dict[str, np.ndarray]:
    return {key: value.numpy().copy() for key, _, value in parts.state.adapters.items(0)}


def layer(key: str) -> int:
    return int(key.split(".")[1])


def given(result: Result) -> dict[int, np.ndarray]:
    """The blocks of every client that the server knows of, bool [G]."""
    personal = result.parts.state.personal
    return {index: memory["blocks"] > 0 for index, memory in personal.memories.items()}


def test_places_of_further_layers() -> None:
    assert Expansion(4, 2).layers == (2, 5) and Expansion(4, 4).layers == (1, 3, 5, 7) and Expansion(4, 1).layers == (4,)
    assert [Expansion(4, 2).original(layer) for layer in range(6)] == [0, 1, 1, 2, 3, 3]
    assert Expansion(4, 2).source("model.layers.5.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
    assert Expansion(4, 2).holds("model.layers.5.mlp.up_proj.weight") and not Expansion(4, 2).holds("model.norm.weight")
    assert Expansion(4, 2).widened(list("abcd")) == ["a", "b", "b", "c", "d", "d"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_at_first(root: Path, family: str) -> None:
    """Logits are the original's bit for bit; the model's files are the same, and blocks are copies but for outputs."""
    plain = {"method": {"name": "fedit"}, "foundation": {"expand": None}, "adapters": {"attention": ["q_proj"]}}
    built = [build(config_of(root, name, change, family=family), *alone()) for name, change in (("new", FEDBE), ("old", plain))]
    (ours, _), (theirs, _) = built
    assert ours.foundation.fingerprint == theirs.foundation.fingerprint
    assert len(ours.foundation.model.model.layers) == 4 and len(theirs.foundation.model.model.layers) == 2
    logits = [logits_of(parts) for parts in (ours, theirs)]
    assert logits[0].shape[0] > 1 and torch.equal(*logits)
    for _, journal in built:
        journal.close()
    model = AutoModelForCausalLM.from_pretrained(root / family).model
    values = tensors(ours)
    assert len(values) == BLOCKS * (9 if family == "llama" else 11)
    for key, value in values.items():
        path = key.split("expanded.")[1].removesuffix(".weight")
        source = model.layers[layer(key) // 2].get_submodule(path).weight.detach().numpy()
        assert np.array_equal(value, np.zeros_like(source) if path in OUTPUTS else source), key


def load(parts: Parts) -> None:
    """The global adapters, for every client."""
    bank, start = parts.execution.bank, parts.state.adapters
    for name in start.specs:
        bank.broadcast(name).copy_(start.broadcast(name).expand_as(bank.broadcast(name)))


@torch.no_grad()
def logits_of(parts: Parts) -> torch.Tensor:
    """Of three samples of the first client, by the global adapters."""
    load(parts)
    data, model = parts.training_data.train(0), parts.trainer.model
    return model.forward(model.batch([Rows.of(0, 1, data, np.arange(3))]), None).logits_NV


def test_all_blocks_are_fedavg_to_the_bit(root: Path) -> None:
    """A client of all blocks is told nothing, and `fedit` on the expanded model is FedAvg of them."""
    every_block = run_alone(config_of(root, "all", FEDBE, tiers(BLOCKS, None)))
    fedit = run_alone(config_of(root, "fedit", {"method": {"name": "fedit"}, "federation": {"tiers": [{"share": 1.0}]}}))
    assert every_block.digest == fedit.digest
    assert not [event for event in every_block.events if event.get("probe_s")]


def test_a_block_that_nobody_trains_keeps_its_bits(root: Path) -> None:
    """Whatever moves weights: decay, and momentum at the server."""
    change = (FEDBE, {"method": {"allocation": "suffix"}}, tiers(1), {"server": {"optimizer": "fedavgm"}})
    parts, journal = build(config_of(root, "suffix", *change), *alone())
    before = tensors(parts)
    after = finish(parts, journal).adapters
    moved = {layer(key) for key, value in before.items() if value.tobytes() != after[key].tobytes()}
    assert moved == {3}, "the last block alone"
    assert every(not np.array_equal(value, after[key]) for key, value in before.items() if layer(key) == 3)


def test_blocks_follow_a_client_s_own_data(root: Path, mixed: Result) -> None:
    """The same rows for other clients give these the same blocks, whoever shares their wave."""
    known = given(mixed)
    budgets = {client.index: client.blocks for client in mixed.parts.clients}
    assert {index: int(held.sum()) for index, held in known.items()} == budgets
    alone_in_wave = run_alone(config_of(root, "one-by-one", *MIXED, {"execution": {"clients_in_flight": 1}}))
    assert {index: held.tolist() for index, held in given(alone_in_wave).items()} == {i: h.tolist() for i, h in known.items()}
    assert alone_in_wave.digest == mixed.digest
    # By hand: the squares of one pass over the drawn samples, of a bank that nobody has trained.
    probed = {index for index, count in budgets.items() if count == 1}
    squares = squares_of(root, probed)
    assert {index: int(value.argmax()) for index, value in squares.items()} == {i: int(known[i].argmax()) for i in probed}
    assert probed


def squares_of(root: Path, clients: set[int]) -> dict[int, np.ndarray]:
    """Squared norms of the gradients of both outputs by block, from a model of transformers with the layers put in."""
    parts, journal = build(config_of(root, "by-hand", *MIXED), *alone())
    found = {}
    for index in sorted(clients):
        expected = Expanded(root / "llama", BLOCKS, lr=0.0, decay=0.0)
        task = tasks(parts, 1)[index]
        found[index] = np.array(list(expected.squares(task.probe).values()))
    journal.close()
    return found


def tasks(parts: Parts, round_index: int) -> list[Task]:
    """What every client is told; probes in round 1, in which all take part."""
    found, method = [], parts.spec.method
    for client in parts.participants(round_index):
        data = parts.training_data.train(client.index)
        texts = [(data.input_ids[i], data.loss_mask[i]) for i in range(client.sequences)]
        probe = [texts[i] for i in method.drawn_samples(client)] if round_index == 1 and client.blocks < BLOCKS else []
        batches = local_batches(client, parts.config.local, parts.config.seed, round_index)
        steps = [[texts[i] for i in batch] for batch in batches]
        found.append(Task(client.index, client.samples, client.blocks, probe, steps))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_two_rounds_of_the_equations(root: Path, family: str) -> None:
    parts, journal = build(config_of(root, "equations", *MIXED, {"seed": 1}, family=family), *alone())
    local = parts.config.local
    expected = Expanded(root / family, BLOCKS, local.lr, local.weight_decay)
    for round_index in (1, 2):
        expected.round(tasks(parts, round_index))
    result = finish(parts, journal)
    assert {i: np.flatnonzero(held).tolist() for i, held in given(result).items() if not held.all()} == {
        index: [expected.further.index(one) for one in chosen] for index, chosen in expected.given.items()
    }
    theirs = {f"layers.{n}.expanded.{name}": value for n, state in expected.state().items() for name, value in state.items()}
    check_equal(theirs, {key: torch.from_numpy(value) for key, value in result.adapters.items()})


def test_a_probe_settles_what_is_trained() -> None:
    """The blocks of the largest numbers, of equal ones the first; as layers of the expanded model."""
    method = load_method(MethodConfig(name="fedbe"))
    method.facts = ModelFacts(1, 1, 1, 0, depth=6, expanded=(1, 3, 5))
    for count, numbers, layers in ((1, [1, 3, 2], [3]), (2, [1, 3, 2], [3, 5]), (2, [2, 1, 2], [1, 5]), (1, [0, 2, 2], [3])):
        client = Client(0, "a", 1, 4, 4, 4, blocks=count)
        asked = method.assign(client, RoundContext(1, {}, plan=np.arange(2)))
        settled = asked.settled(np.array([numbers], dtype=float))
        assert asked.trained_N is None and settled.settle is None
        assert np.flatnonzero(settled.trained_N).tolist() == layers and settled.first_trained == layers[0]
        # From the next round on by what the server remembers.
        known = {"blocks": np.isin([1, 3, 5], layers).astype(float)}
        later = method.assign(client, RoundContext(2, {}, memory=known))
        assert later.probe is None and np.array_equal(later.trained_N, settled.trained_N)


def test_draws_are_a_client_s_own(root: Path) -> None:
    """`random`: one draw for a client, in all rounds; another seed draws others; nothing is probed."""
    method = {"method": {"name": "fedbe", "allocation": "random"}}
    parts, journal = build(config_of(root, "random", method, tiers(1)), *alone())
    first = {c.index: parts.spec.method.assign(c, RoundContext(1, {})).trained_N.tolist() for c in parts.clients}
    again = {c.index: parts.spec.method.assign(c, RoundContext(2, {})).trained_N.tolist() for c in parts.clients}
    assert first == again and every(sum(mask) == 1 for mask in first.values())
    assert parts.planning.of(1).parts == {}
    result = finish(parts, journal)
    assert {index: held.tolist() for index, held in given(result).items()} == {i: [m[1], m[3]] for i, m in first.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_a_model_of_more_layers(root: Path, tmp_path: Path, family: str) -> None:
    """transformers alone gives the run's own logits, and LoRA's formats have no place for whole layers."""
    config = config_of(root, "export", FEDBE, tiers(BLOCKS), family=family)
    parts = random_run(config)
    run = open_run(run_folder(config))
    (selection,) = map(run.select, run.tiers)
    export("merged", Request(run, selection, tmp_path / "merged", "base"))
    model, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(facts[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), facts
    assert model.config.num_hidden_layers == 4 and getattr(model.config, "layer_types", None) in (None, KINDS)
    with original_rotary():
        theirs_NV = their_logits(model.eval(), parts)
        base_NV = their_logits(AutoModelForCausalLM.from_pretrained(root / family).eval(), parts)
    ours_NV = own_logits(parts, selection)
    assert float((ours_NV - theirs_NV).abs().max()) <= 1e-5 and float((ours_NV - base_NV).abs().max()) > 1e-3
    with pytest.raises(UserError, match=r"^--format: peft: a LoRA file has no place for it: expanded\..*; use --format merged"):
        export("peft", Request(run, selection, tmp_path / "peft", "base"))


def test_what_a_pass_keeps(root: Path) -> None:
    """The planner counts the inputs of matrices that are trained; of frozen ones nothing is kept."""
    parts, journal = build(config_of(root, "kept", FEDBE, tiers(BLOCKS)), *alone())
    journal.close()
    load(parts)
    data = parts.training_data.train(0)
    length = max(len(ids) for ids in data.input_ids)
    alike = [i for i, ids in enumerate(data.input_ids) if len(ids) == length][:2]
    rows = Rows.of(0, 1, data, np.array(alike))
    with Alive() as alive:
        loss = parts.trainer.model.loss(parts.trainer.model.batch([rows]), None, [rows.targets])
        found = alive.bytes
    assert loss.sum.requires_grad
    planned = len(alike) * length * kept_bytes(parts.spec, length)
    # Angles of rotations, as wide as a head, are half as wide as this model, and count nowhere.
    angles = parts.spec.size.depth - 1
    assert planned == pytest.approx(found - len(alike) * length * angles * 2 * 16 * 4, rel=0.02), (planned, found)
    # The frozen model has no memory for further layers.
    held = sum(p.numel() for p in parts.foundation.model.parameters())
    assert estimate(parts.spec, 1, length, 1)["dense part"] == 4 * held


def test_what_is_counted(mixed: Result) -> None:
    """FLOPs of what a client trains, bytes of what it sends."""
    rows = [event for event in mixed.events if event["event"] == "client" and event["round"] == 2]
    cost, known = mixed.parts.spec.cost, given(mixed)
    assert cost.owned == (1, 3)
    for row in rows:
        held = known[row["client"]] if isinstance(row["client"], int) else None
        index = next(c.index for c in mixed.parts.clients if c.name == row["client"]) if held is None else row["client"]
        first = np.flatnonzero(known[index])[0]
        layers, blocks = (4, 2) if known[index].all() else (4 - cost.owned[first], 1)
        assert row["flops"] == pytest.approx(cost.spent(row["tokens"], 0, 0, 4, layers, blocks), rel=1e-12)
    # A block's matrices once more, forward, back and for their gradients.
    shape = mixed.parts.spec.size
    numbers = sum(np.prod(spec.item) for spec in mixed.parts.spec.blocks if len(spec.item) > 1)
    assert cost.dense_weights == 2 * 2 * numbers and shape.owned == sum(
        2 * int(np.prod(spec.item)) for spec in mixed.parts.spec.blocks
    )
    traffic, client = Traffic(mixed.parts.spec, mixed.parts.clients, 4), mixed.parts.clients[0]
    one = replace(parts_assignment(mixed, client), trained_N=np.array([False, True, False, False]))
    assert 2 * traffic.of(client.rank, one)[1] == traffic.of(client.rank, one)[0]


def parts_assignment(result: Result, client: Client) -> Assignment:
    return result.parts.spec.method.assign(client, RoundContext(0, {}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"foundation": {"expand": None}}, r"^foundation\.expand: null: method fedbe trains further layers"),
    "groups": (
        {"foundation": {"expand": {"blocks": 3}}},
        r"^foundation\.expand\.blocks: 3: does not divide the 2 layers into equal groups",
    ),
    "tiers": ({"method": {"name": "fedit"}, **tiers(1)}, r"^federation\.tiers\.0\.blocks: 1: here a budget buys top_k"),
    "too many": (tiers(3), r"^federation\.tiers\.0\.blocks: 3: the model has 2 further layers; use 1 to 2"),
    "sparse": ({"foundation": {"path": "model"}}, r"^foundation\.expand: .*: layers of 'olmoe' are not the identity"),
    "memory": ({"execution": {"owned_gib": 1e-5}}, r"^execution\.owned_gib: 1e-05: whole layers take .* GiB of each client"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(root: Path, case: str) -> None:
    change, message = REFUSED[case]
    if case == "sparse":
        change = {"foundation": {"path": str(root / "model")}}
    with pytest.raises(UserError, match=message):
        build(config_of(root, "refused", FEDBE, change), *alone())


def test_lora_beside_further_layers_is_refused(root: Path) -> None:
    moe = {"experts": 2, "width": 4, "top_k": 1}
    for change in ({"attention": ["q_proj"]}, {"feed_forward": ["up_proj"]}, {"moe": moe}, {"head": "train"}):
        (key,) = change
        with pytest.raises(ValueError, match=rf"adapters\.{key}: foundation\.expand trains its layers alone"):
            config_of(root, "beside", FEDBE, {"adapters": change})
    tree = {"foundation": {"preset": "tiny-llama", "expand": {"blocks": 2}}}
    assert Config.model_validate(tree).adapters.attention == []


def test_layers_at_other_places_are_no_start(root: Path, mixed: Result) -> None:
    start = {"adapters": {"start": str(mixed.parts.checkpoints.parent)}}
    with pytest.raises(
        UserError, match=r"^adapters\.start: .*its further layers are at other places \(.*blocks: 2.*; use as many"
    ):
        build(config_of(root, "elsewhere", FEDBE, {"foundation": {"expand": {"blocks": 1}}}, start), *alone())
