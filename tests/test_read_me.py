"""Read-ME: the converter against the dense model, the router before the layers, turns, refusals, caches over its routes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from dense_inputs import write_dense
from every import every
from expert_cache import belady_hits, lru_hits
from federations import alone, build, make_config, run_alone
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from read_me_inputs import CHANNELS, CONVERT, ON_READ_ME, OWN, PERMANENT, write_read_me
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedmoe_ds.config import Config
from fedmoe_ds.config.foundation_section import ConvertConfig, FoundationConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.export.command import export
from fedmoe_ds.export.written import Request
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.federation.run_spec import check_start, resolve_spec
from fedmoe_ds.federation.server_training import train_server
from fedmoe_ds.foundation import conversion, load_foundation, planned_sparse, resolve_foundation
from fedmoe_ds.foundation.domain_channels import choose
from fedmoe_ds.foundation.foundation import planned_config
from fedmoe_ds.foundation.pre_gate import logits, overlaps, router_loss
from fedmoe_ds.foundation.read_me import convert_read_me
from fedmoe_ds.foundation.size import model_size
from fedmoe_ds.model.batch import Rows
from fedmoe_ds.results import open_run

pytestmark = pytest.mark.timeout(600)

LENGTH = 24


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("read-me")
    write_dense(folder, ("llama",))
    write_read_me(folder)
    return folder


def config_of(root: Path, name: str, *changes: dict[str, Any]) -> Config:
    path = {"foundation": {"path": str(root / "read-me")}, "execution": {"micro_batch_size": None}}
    return make_config(root, name, path, ON_READ_ME, *changes)


def texts(rows: int = 3) -> Tensor:
    return torch.randint(2, 320, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def forward(parts: Parts, ids_BS: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits of all next tokens [B * (S - 1), V], the router's [T, E], and who was chosen by layer."""
    model = parts.trainer.model
    mask = np.ones(LENGTH, dtype=bool)
    mask[0] = False
    rows = Rows(0, 1, [np.array(row) for row in ids_BS], [mask] * len(ids_BS))
    wave, model.execution.bank = model.execution.wave, parts.state.adapters
    with torch.no_grad():
        found = model.forward(model.batch([rows]), 0)
    assert wave is model.execution.wave and found.run.gate_TE is not None
    return found.logits_NV, found.run.gate_TE, [found.run.counts[layer] for layer in (0, 1)]


def dense_logits(root: Path, ids_BS: Tensor, masks_LTF: Tensor) -> Tensor:
    """The dense model's, with what a mask leaves of the channels of every token."""
    dense: Any = AutoModelForCausalLM.from_pretrained(root / "llama").eval()
    for mask_TF, layer in zip(masks_LTF, dense.model.layers, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs, mask_TF=mask_TF: (inputs[0] * mask_TF.view_as(inputs[0]),)
        )
    with torch.no_grad():
        found: Tensor = dense(ids_BS).logits[:, :-1].flatten(0, 1)
    return found


def kept(root: Path, route_T: Tensor) -> Tensor:
    """[L, T, F]: permanent channels, found by their rows in the dense matrices, and those of the token's expert."""
    tensors = load_file(root / "read-me" / "model.safetensors")
    masks = []
    for layer in (0, 1):
        gate_FD = tensors["pre_gate.gate_up_LGD"][layer][:CHANNELS]
        rows_PD = tensors[f"model.layers.{layer}.mlp.shared_expert.gate_proj.weight"]
        permanent_F = (gate_FD[:, None] == rows_PD).all(-1).any(1)
        masks.append(permanent_F.float() + tensors["pre_gate.masks_LEF"][layer][route_T])
    return torch.stack(masks)


def test_the_converted_model_is_the_dense_one_with_the_masks_of_its_route(root: Path) -> None:
    parts, journal = build(config_of(root, "masked"), *alone())
    journal.close()
    ids_BS = texts()
    ours, gate_TE, counts = forward(parts, ids_BS)
    route_T = gate_TE.argmax(-1)
    assert len(set(route_T.tolist())) > 1 and torch.equal(counts[0], counts[1]), "one decision for all layers"
    assert counts[0].sum() == len(route_T)
    masks_LTF = kept(root, route_T)
    assert masks_LTF.flatten(0, 1).sum(-1).tolist() == [PERMANENT + OWN] * 2 * len(route_T)
    assert set(masks_LTF.flatten().tolist()) == {0.0, 1.0}, "permanent channels and those of experts are disjoint"
    theirs = dense_logits(root, ids_BS, masks_LTF)
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


def test_with_all_channels_it_is_the_dense_model(root: Path, tmp_path: Path) -> None:
    write_dense(tmp_path, ("llama",))
    write_read_me(tmp_path, kept=1.0)
    parts, journal = build(config_of(tmp_path, "whole"), *alone())
    journal.close()
    ids_BS = texts()
    ours = forward(parts, ids_BS)[0]
    theirs = dense_logits(root, ids_BS, torch.ones(2, ids_BS.numel(), CHANNELS))
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


def test_equal_domains_have_equal_experts() -> None:
    mean_LF = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    chosen = choose(mean_LF.expand(5, -1, -1), permanent=8, expert=12)
    assert torch.equal(chosen.permanent_LP, mean_LF.sort(descending=True).indices[:, :8].sort(-1).values)
    largest_LK = mean_LF.sort(descending=True).indices[:, 8:20].sort(-1).values
    assert torch.equal(chosen.expert_DLK, largest_LK.expand(5, -1, -1))


def test_channels_are_those_of_loops() -> None:
    mean_DLF = torch.rand(4, 2, 24, generator=torch.Generator().manual_seed(3))
    chosen = choose(mean_DLF, permanent=4, expert=8)
    for layer in range(2):
        least = [min(float(mean_DLF[d, layer, f]) for d in range(4)) for f in range(24)]
        permanent = sorted(range(24), key=lambda f: -least[f])[:4]
        assert chosen.permanent_LP[layer].tolist() == sorted(permanent)
        for d in range(4):
            left = [f for f in range(24) if f not in permanent]
            own = sorted(left, key=lambda f: -float(mean_DLF[d, layer, f]))[:8]
            assert chosen.expert_DLK[d, layer].tolist() == sorted(own)
            assert {*chosen.masks(24)[layer, d].nonzero().squeeze(1).tolist()} == {*own}


def test_later_tokens_change_no_earlier_decision(root: Path) -> None:
    gate: Any = load_foundation(root / "read-me", FoundationConfig(), 1, 0, "cpu").model.pre_gate
    before_BS = texts()
    after_BS = before_BS.clone()
    after_BS[:, 10:] = (after_BS[:, 10:] + 5) % 320
    ours, theirs = (logits(gate.weights(), 1, ids_BS) for ids_BS in (before_BS, after_BS))
    assert torch.equal(ours[:, :10], theirs[:, :10]) and not torch.allclose(ours[:, 10:], theirs[:, 10:])
    # Nor does how many there are.
    short = logits(gate.weights(), 1, before_BS[:, :10])
    assert torch.allclose(short, ours[:, :10], atol=1e-5) and torch.equal(short.argmax(-1), ours[:, :10].argmax(-1))


def test_targets_and_loss_are_those_of_loops() -> None:
    draw = torch.Generator().manual_seed(5)
    a_TF, z_TE = torch.randn(7, 30, generator=draw), torch.randn(7, 4, generator=draw)
    masks_EF = torch.zeros(4, 30)
    for e in range(4):
        masks_EF[e, torch.randperm(30, generator=draw)[:10]] = 1.0
    found_TE, total = overlaps(a_TF, masks_EF), 0.0
    for a_F, z_E, found_E in zip(a_TF, z_TE.double(), found_TE, strict=True):
        order = sorted(range(30), key=lambda f: -float(a_F[f]))
        target = [sum(bool(masks_EF[e, f]) for cut in (9, 8, 6, 4, 2) for f in order[:cut]) * 10 / 30 for e in range(4)]
        assert found_E.tolist() == pytest.approx(target)
        log_E, soft_E = z_E.log_softmax(-1), torch.tensor(target).double().softmax(-1)
        hard = 0.5 * -log_E[int(np.argmax(target))] + 0.5 * -log_E.mean()
        total += float(0.75 * hard - 0.25 * (soft_E * log_E).sum()) / 7
    assert float(router_loss(z_TE, found_TE)) == pytest.approx(total, rel=1e-5)


def test_experts_and_router_take_turns(root: Path) -> None:
    parts, journal = build(config_of(root, "turns", {"federation": {"rounds": 4}, "local": {"weight_decay": 0.5}}), *alone())
    federation = Federation(parts, journal)
    bank, names = parts.state.adapters, {True: "experts", False: "pre_gate"}
    for round_index in (1, 2, 3):
        before = {key: value.clone() for key, _, value in bank.items(0)}
        assert not federation._round(round_index)
        changed = {key for key, _, value in bank.items(0) if not torch.equal(value, before[key])}
        turn = names[round_index % 2 == 1]
        assert changed and every(turn in key for key in changed), "nothing else moves, weight decay included"
        assert turn == "experts" or len(changed) == len(parts.trainer.model.foundation.model.pre_gate.weights())  # type: ignore
    journal.close()


def test_the_server_leaves_the_router_as_it_is(root: Path) -> None:
    """Nothing but the method's loss gives it a gradient, and it would decay."""
    own = {"data": {"public": 0.2}, "server": {"training": {}}, "local": {"weight_decay": 0.5}}
    parts, journal = build(config_of(root, "server", own), *alone())
    journal.close()
    before = {key: value.clone() for key, _, value in parts.state.adapters.items(0)}
    assert train_server(parts, 1)["server_steps"] > 0
    moved = {key for key, _, value in parts.state.adapters.items(0) if not torch.equal(value, before[key])}
    router = {key for key in before if key.startswith("model.pre_gate.")}
    assert moved and router and not moved & router


def test_experts_are_averaged_by_the_rows_they_served(root: Path) -> None:
    one = config_of(root, "usage", {"federation": {"rounds": 1}, "method": {"router_every": 0}})
    parts, journal = build(one, *alone())
    before = {key: value.clone() for key, _, value in parts.state.adapters.items(0)}
    kept_updates: list[Any] = []
    fold = parts.server.fold

    def folded(sums: Any, place: int, view: Any, update: Any) -> None:
        values = {spec.name: view.value(spec).clone() for spec in view.blocks() if spec.expert}
        kept_updates.append((update.counts_LE.copy(), values))
        fold(sums, place, view, update)

    parts.server.fold = folded  # type: ignore[method-assign]
    assert not Federation(parts, journal)._round(1)
    journal.close()
    used_LE = sum(counts_LE for counts_LE, _ in kept_updates)
    assert (used_LE == used_LE[0]).all() and used_LE.any(), "every layer has the same rows"
    for key, spec, value in parts.state.adapters.items(0):
        if not spec.expert:
            continue
        layer, expert = (int(part) for part in key.split(".") if part.isdigit())
        if not used_LE[layer, expert]:
            assert torch.equal(value, before[key])
            continue
        parts_of = [(counts_LE[layer, expert], values[spec.name][layer, expert]) for counts_LE, values in kept_updates]
        mean = sum(count * one.double() for count, one in parts_of) / used_LE[layer, expert]
        assert torch.allclose(value.double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["flame", "fedit"])
def test_other_methods_run_on_the_converted_model(root: Path, method: str) -> None:
    """With the foundation's router, which stays."""
    change = {"method": {"name": method}, "adapters": {"router": "frozen", "expert_training": "lora"}}
    result = run_alone(config_of(root, method, change, {"federation": {"rounds": 1}}))
    assert every(np.isfinite(value).all() for value in result.adapters.values())


def test_conversion_is_kept_and_known_before_it_is_made(root: Path) -> None:
    config = FoundationConfig(path=str(root / "llama"), cache=str(root), convert=ConvertConfig(**CONVERT))
    planned: Any = planned_config(config)
    assert planned_sparse(config) and (planned.num_experts, planned.moe_intermediate_size) == (8, OWN)
    lines: list[str] = []
    folder = resolve_foundation(config, 0, lines.append)
    assert not lines, "made by the fixture already"
    assert load_file(folder / "model.safetensors").keys() == load_file(root / "read-me" / "model.safetensors").keys()


def test_every_key_decides_what_is_made(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []

    def store(key: dict[str, Any], *_: Any) -> Path:
        keys.append(json.dumps(key, sort_keys=True))
        return root

    monkeypatch.setattr(conversion, "store", store)
    changes = {"experts": 4, "permanent": 0.2, "kept": 0.7, "batches": 2, "router_width": 4, "router_layers": 2}
    changes |= {"router_steps": 4, "router_lr": 0.1}
    assert changes.keys() | {"kind", "order"} == ConvertConfig.model_fields.keys()
    for name, value in [("batches", CONVERT["batches"]), *changes.items()]:
        convert_read_me(root / "llama", ConvertConfig(**{**CONVERT, name: value}), 0, root, print)
    convert_read_me(root / "llama", ConvertConfig(**CONVERT), 1, root, print)  # another seed
    assert len(set(keys)) == len(keys) == 2 + len(changes)
    with pytest.raises(ValidationError, match=r"foundation\.convert\.order: given: has no effect with kind read-me"):
        ConvertConfig(kind="read-me", order="given")
    with pytest.raises(ValidationError, match=r"foundation\.convert\.kept: 0\.7: has no effect with kind channel-groups"):
        ConvertConfig(kept=0.7)


def test_a_plan_counts_what_lies_beside_the_model(root: Path) -> None:
    known = load_foundation(root / "read-me", FoundationConfig(), 1, 0, "cpu").outline
    stored = load_file(root / "read-me" / "model.safetensors")
    beside = sum(tensor.nbytes for name, tensor in stored.items() if name.startswith("pre_gate."))
    assert model_size(known.model, known.layers).pre_gate_bytes == beside > 0


def test_no_file_of_others_can_say_who_decides_before_the_layers(root: Path, tmp_path: Path) -> None:
    run_alone(config_of(root, "exported", {"federation": {"rounds": 1}}))
    run = open_run(root / "runs" / "exported")
    forms: tuple[Literal["merged", "peft"], ...] = ("merged", "peft")
    for form in forms:
        with pytest.raises(UserError, match=r"the foundation's router decides before its layers"):
            export(form, Request(run, run.select(), tmp_path / form, "base", None))


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("foundation.convert.permanent: 0.6", {"permanent": 0.6}),
    ("foundation.convert.router_width: 64", {"router_width": 64}),
    ("foundation.convert.experts: 999", {"experts": 999}),
]


@pytest.mark.parametrize(("words", "change"), REFUSED)
def test_what_cannot_be_converted(root: Path, tmp_path: Path, words: str, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=words):
        convert_read_me(root / "llama", ConvertConfig(**{**CONVERT, **change}), 0, tmp_path, print)


def test_no_other_family_is_converted(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"foundation\.convert\.kind: read-me: a 'olmoe' model"):
        convert_read_me(root / "model", ConvertConfig(kind="read-me"), 0, tmp_path, print)


STILL: dict[str, Any] = {"adapters": {"router": "frozen"}}
TOGETHER: list[tuple[str, str, dict[str, Any]]] = [
    ("adapters.router: train", "read-me", {"method": {"name": "fedit"}}),
    ("local.balance_loss", "read-me", {**STILL, "method": {"name": "fedit"}, "local": {"balance_loss": 0.1}}),
    ("method.name: ub-smoe", "read-me", {**STILL, "method": {"name": "ub-smoe"}}),
    ("method.name: read-me", "model", {}),
    ("adapters.moe", "llama", {"adapters": {"moe": {"experts": 8}, "expert_training": "lora"}}),
    ("execution.packing", "read-me", {"execution": {"packing": True}}),
]


@pytest.mark.parametrize(("words", "model", "change"), TOGETHER)
def test_what_cannot_go_together(root: Path, words: str, model: str, change: dict[str, Any]) -> None:
    config = config_of(root, "refused", change, {"foundation": {"path": str(root / model)}})
    with pytest.raises(UserError, match=words) as caught:
        config, method = check_start(config, "cpu")
        resolve_spec(config, method, "cpu", load_foundation(root / model, config.foundation, 1, 0, "cpu").outline)
    assert "\n" not in str(caught.value)


ROUTES = st.lists(st.integers(0, 5), min_size=1, max_size=40)


@given(route=ROUTES, capacity=st.integers(1, 6))
def test_no_rule_has_more_hits_than_belady_s(route: list[int], capacity: int) -> None:
    assert belady_hits(route, capacity) >= lru_hits(route, capacity)
    if capacity >= len(set(route)):
        assert belady_hits(route, capacity) == lru_hits(route, capacity) == len(route) - len(set(route))
    assert belady_hits(route[:9], capacity) == most_hits(tuple(route[:9]), capacity)


def most_hits(route: tuple[int, ...], capacity: int, held: frozenset[int] = frozenset()) -> int:
    """By trying all choices of who makes room."""
    if not route:
        return 0
    first, rest = route[0], route[1:]
    if first in held:
        return 1 + most_hits(rest, capacity, held)
    room = [held] if len(held) < capacity else [held - {one} for one in held]
    return max(most_hits(rest, capacity, left | {first}) for left in room)


def test_caches_over_the_routes_of_the_router(root: Path) -> None:
    gate: Any = load_foundation(root / "read-me", FoundationConfig(), 1, 0, "cpu").model.pre_gate
    route = logits(gate.weights(), 1, texts(8)).argmax(-1).flatten().tolist()
    hits = {capacity: (belady_hits(route, capacity), lru_hits(route, capacity)) for capacity in range(1, 9)}
    assert every(best >= recent for best, recent in hits.values()) and hits[8][0] == hits[8][1]
    assert any(best > recent for best, recent in hits.values()), "to know what comes is worth something"


def test_the_converter_s_router_has_learnt_its_targets(root: Path, tmp_path: Path) -> None:
    """On the dense model's own channels, against the router as it was drawn."""
    write_dense(tmp_path, ("llama",))
    write_read_me(tmp_path, router_steps=40)
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    ids_BS, found = texts(8), list[Tensor]()
    for layer in dense.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        dense(ids_BS)
    losses = []
    for folder in (root, tmp_path):
        gate: Any = load_foundation(folder / "read-me", FoundationConfig(), 1, 0, "cpu").model.pre_gate
        z_TE = logits(gate.weights(), 1, ids_BS).flatten(0, 1)
        losses.append(sum(float(router_loss(z_TE, overlaps(a, m))) for a, m in zip(found, gate.masks_LEF, strict=True)))
    assert losses[1] < losses[0]
