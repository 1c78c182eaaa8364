"""Members: several models of one client, whose experts are disjoint; the bits of as many clients with one model each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import EXPERTS, dense_config, write_dense
from federations import Result, alone, build, finish
from torch import Tensor

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_work import ClientWork, asked_of
from fedmoe_ds.data import ImageInput, Sequences
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.kernels.frozen_layers import FrozenLinear
from fedmoe_ds.model import cross_entropy
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.model.batch import make_batch
from fedmoe_ds.model.objective import Objective

LAYERS = 2
# Its routers are frozen: what members share would move otherwise beside others.
OWN = {"method": {"name": "split-mix"}, "adapters": {"moe": {"top_k": 1}}, "federation": {"rounds": 1}}
QUICK: dict[str, Any] = {"local": {"max_steps": 3}, "evaluation": {"max_sequences": 4, "client_sequences": 0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("members")
    write_dense(folder, ("llama",), (9, 7))
    return folder


def members(*experts: list[int]) -> np.ndarray:
    """Bool [M, L, E]: the experts of each, alike in all layers."""
    found = np.zeros((len(experts), LAYERS, EXPERTS), dtype=bool)
    for place, own in enumerate(experts):
        found[place, :, own] = True
    return found


class Run:
    """A run in which every client, and every tier in evaluation, has these members, in one pass or apart."""

    def __init__(self, root: Path, name: str, local: dict[str, Any], *experts: list[int], fused: bool = False) -> None:
        parts, journal = build(dense_config(root, "llama", name, OWN, QUICK, {"local": local}), *alone())
        told, method = members(*experts), parts.spec.method
        assign = method.assign
        method.assign = lambda client, context: replace(assign(client, context), members_MLE=told, fused=fused)  # type: ignore[method-assign]
        self.parts: Parts = parts
        self.result: Result = finish(parts, journal)

    def of(self, expert: int) -> dict[str, np.ndarray]:
        return {key: value for key, value in self.result.adapters.items() if f".experts.{expert}." in key}

    @property
    def loss(self) -> float:
        """Of the largest tier at the end."""
        rows = [event for event in self.result.events if event["event"] == "eval" and event["round"] == 1]
        return float(rows[0]["loss"])


THREE = ([0], [3, 5], [6])
LOCAL: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "clip": None},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05, "clip": None},
}


@pytest.fixture(scope="module")
def together(root: Path) -> dict[str, Run]:
    return {name: Run(root, f"together-{name}", local, *THREE) for name, local in LOCAL.items()}


@pytest.mark.parametrize("name", LOCAL)
def test_members_train_as_clients_of_one_model_each(root: Path, together: dict[str, Run], name: str) -> None:
    """To the bit: they meet in no parameter, in no norm, and in no pass."""
    for own in THREE:
        apart = Run(root, f"apart-{name}-{own[0]}", LOCAL[name], own)
        for expert in own:
            ours, theirs = together[name].of(expert), apart.of(expert)
            assert ours.keys() == theirs.keys() and len(ours) == 2 * LAYERS
            assert all(value.tobytes() == theirs[key].tobytes() for key, value in ours.items()), (own, expert)
    before, _ = build(dense_config(root, "llama", f"start-{name}", OWN, QUICK, {"local": LOCAL[name]}), *alone())
    start = {key: value.numpy() for key, _, value in before.state.adapters.items(0)}
    for expert in range(EXPERTS):
        same = [value.tobytes() == start[key].tobytes() for key, value in together[name].of(expert).items()]
        assert not any(same) if expert in (0, 3, 5, 6) else all(same), "what is of no member keeps its bits, decay or not"


def test_fused_members_train_as_those_apart(root: Path, together: dict[str, Run]) -> None:
    """With no objective to see them together: the same losses, added up in another order."""
    fused = Run(root, "fused", LOCAL["sgd"], *THREE, fused=True)
    for key, value in fused.result.adapters.items():
        assert np.allclose(value, together["sgd"].result.adapters[key], rtol=1e-4, atol=1e-6), key
    assert fused.loss == pytest.approx(together["sgd"].loss, rel=1e-5)
    ours, theirs = ([e for e in run.result.events if e["event"] == "client"] for run in (fused, together["sgd"]))
    same = ("tokens", "targets", "experts_held", "steps", "flops")
    assert [[one[key] for key in same] for one in ours] == [[one[key] for key in same] for one in theirs]


def test_rows_count_for_every_member(root: Path, together: dict[str, Run]) -> None:
    one = Run(root, "one", LOCAL["adamw"], [0])
    ours, theirs = ([e for e in run.result.events if e["event"] == "client"] for run in (together["adamw"], one))
    for many, single in zip(ours, theirs, strict=True):
        assert (many["tokens"], many["targets"]) == (3 * single["tokens"], 3 * single["targets"])
        assert many["experts_held"] == [4] * LAYERS and single["experts_held"] == [1] * LAYERS
        # Before any step all members are the foundation, so their mean loss is the loss of one.
        assert many["loss_first"] == pytest.approx(single["loss_first"], rel=1e-6)


def test_an_evaluation_is_of_the_mean_of_their_logits(root: Path, together: dict[str, Run]) -> None:
    run = together["sgd"]
    evaluator = run.parts.evaluator
    whole_set = run.parts.data.global_holdout()
    held = whole_set.select(range(min(4, len(whole_set))))
    how = evaluator.assigned(run.parts.clients[0], run.parts.state.personal, plain=False)
    logits, labels_N = [], torch.zeros(0)
    with evaluator.receiving(how):
        whole = evaluator.run_pass([held], how)
        assert how.members_MLE is not None
        for mask_LE in how.members_MLE:
            alone_how = replace(how, members_MLE=None, allowed_LE=mask_LE)
            logits.append(evaluator.run_pass([held], alone_how).logits_NV)
        labels_N = torch.cat([torch.from_numpy(ids[mask]) for ids, mask in zip(held.input_ids, held.loss_mask, strict=True)])
    assert len(logits) == 3 and not torch.equal(logits[0], logits[1])
    expected_NV = torch.stack([own.double() for own in logits]).mean(0)
    torch.testing.assert_close(whole.logits_NV.double(), expected_NV, rtol=1e-6, atol=1e-7)
    nll_N = -expected_NV.log_softmax(-1).gather(1, labels_N[:, None]).squeeze(1)
    torch.testing.assert_close(whole.nll_N.double(), nll_N, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole.correct_N, expected_NV.argmax(-1) == labels_N)
    assert run.loss == pytest.approx(float(nll_N.mean()), rel=1e-6)


# The mean of logits


def head() -> FrozenLinear:
    torch.manual_seed(1)
    return FrozenLinear(torch.nn.Linear(12, 40, bias=False).requires_grad_(False))


def hidden(count: int) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(50, 12) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_identical_members_are_one_and_their_order_is_nobodys(count: int) -> None:
    labels_N, own = torch.arange(50) % 40, hidden(1)
    one, many = (cross_entropy.scores(head(), own * times, labels_N) for times in (1, count))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, many, strict=True))
    different = hidden(count)
    forwards, backwards = (cross_entropy.mean_logits(head(), order) for order in (different, different[::-1]))
    assert torch.equal(forwards, backwards)


def test_chunks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    labels_N, members_ = torch.arange(50) % 40, hidden(3)
    whole = cross_entropy.scores(head(), members_, labels_N)
    monkeypatch.setattr(cross_entropy, "LOGITS", 16 * 40)
    parts = cross_entropy.scores(head(), members_, labels_N)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole, parts, strict=True))


# Who does what


def test_a_step_has_all_passes_of_one_member_after_the_other() -> None:
    told = Assignment(1, members_MLE=members([1], [4]))
    client, batch = Client(3, "c", 1, 9, 9, 9), np.arange(5)
    work = ClientWork(client, 0, 0, told, [batch], [[0, 3, 5]], [[3, 2]], 1, 0.1)
    assert work.micro_batches(0) == 4 and work.micro_batches(1) == 0 and work.largest_pass(0) == 3
    found = [(work.chosen(0, micro)[0].tolist(), work.size(0, micro)) for micro in range(4)]
    assert found == [([0, 1, 2], 3), ([3, 4], 2)] * 2
    work.data = Sequences([np.arange(4)] * 9, [np.arange(4) > 0] * 9)
    masks = [mask_LE for micro in range(4) for mask_LE in work.rows(0, micro, None).masks if mask_LE is not None]
    assert [np.flatnonzero(mask_LE[0]).tolist() for mask_LE in masks] == [[1], [1], [4], [4]]


def test_fused_members_share_a_pass() -> None:
    """Their rows lie one member after the other; of two views each reads its own."""
    told = Assignment(1, members_MLE=members([1], [4]), fused=True, views=(1, 0))
    pixels_NCHW = np.arange(5 * 4 * 4, dtype=np.float32).reshape(5, 4, 2, 2)
    data, images = Sequences.of_images(pixels_NCHW, np.arange(5)), ImageInput(2, 2, 2, 10, 5)
    work = ClientWork(Client(3, "c", 1, 5, 5, 5), 0, 0, told, [np.array([4, 2, 0])], [[0, 2, 3]], [[2, 1]], 1, 0.1, data)
    assert work.micro_batches(0) == 2 and work.step_sums(0, images) == (3, 15)
    first, last = (work.rows(0, micro, images) for micro in range(2))
    assert first.labels is not None and first.labels.tolist() == [4, 2, 4, 2] and len(last) == 2
    assert first.pixels is not None and np.array_equal(
        first.pixels, np.stack([*pixels_NCHW[[4, 2], 2:], *pixels_NCHW[[4, 2], :2]])
    )
    batch = make_batch([first, last], torch.device("cpu"), images)
    assert batch.masks is not None and batch.targets == [4, 2]
    # Positions are five per image: two images of either member of the first client, one of either of the second.
    expected = [1] * 10 + [4] * 10 + [1] * 5 + [4] * 5
    assert batch.masks.rows(0).int().argmax(1).tolist() == expected and batch.masks.rows(1).sum(1).tolist() == [1] * 30
    assert [(demand.rows, demand.allowed) for demand in batch.masks.demands(0, batch.demands)] == [(10, 1)] * 2 + [(5, 1)] * 2
    asked = asked_of([work], [first], (0, 0), [3], {0: Objective()})
    assert asked is not None and asked[0].sample_N.tolist() == [4, 2, 4, 2]


def test_what_is_of_no_member_is_not_trained() -> None:
    experts = BlockSpec("experts.inner.weight", (0, 1), (4, 3), expert=True)
    router = BlockSpec("router.weight", (0, 1), (8, 3))
    told = Assignment(1, members_MLE=members([1], [4, 6]))
    trained = told.trains(experts)
    assert trained is not None and np.flatnonzero(trained[1]).tolist() == [1, 4, 6] and told.trains(router) is None
    some = replace(told, trained_LE=members([4, 5])[0]).trains(experts)
    assert some is not None and np.flatnonzero(some[0]).tolist() == [4]
    assert Assignment(1).held_LE is None and Assignment(1).models == 1 and told.models == 2
