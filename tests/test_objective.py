"""Objectives at the model's output: against plain float64 loops, and, where they change nothing, the bits of cross-entropy.

Legend: N targets, D model width, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from federations import Result, alone, build, finish, make_config, run_alone, write_inputs
from reference import Reference, Settings
from reference_inputs import initial, tasks
from torch import Tensor

from fedmoe_ds.clients.batches import local_batches
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.kernels.frozen_layers import FrozenLinear
from fedmoe_ds.methods import EXPERT_LOSS, EXPERT_TARGETS, LocalStep, Objective, Predictions, Targets, loss_per_expert
from fedmoe_ds.model import cross_entropy
from fedmoe_ds.model.objective import Asked, Output

WIDTH, CLASSES = 12, 40
SIZES = [70, 0, 33]
"""Targets of three clients of one pass; one has none there."""
STEPS = [90, 10, 33]
"""Targets of their whole steps: the pass is a part of the first one's."""


def head() -> FrozenLinear:
    torch.manual_seed(1)
    return FrozenLinear(torch.nn.Linear(WIDTH, CLASSES, bias=False).requires_grad_(False))


def hidden() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(sum(SIZES), WIDTH), torch.randint(CLASSES, (sum(SIZES),))


def minimise(objectives: list[Objective], whole: bool = False) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """(gradient of the hidden states, negative log-likelihoods, sums) of a pass."""
    (x_ND, labels_N), count = hidden(), sum(SIZES)
    x_ND.requires_grad_()
    weight_N = torch.cat([torch.full((size,), 1 / step) for size, step in zip(SIZES, STEPS, strict=True)])
    output = Output(head(), x_ND, labels_N, weight_N, torch.arange(count), SIZES, {}, whole)
    samples = [np.arange(size) // 5 for size in SIZES]
    asked = [Asked(*each[:2], LocalStep(each[2])) for each in zip(objectives, samples, STEPS, strict=True)]
    total, nll_N, sums = output.minimise(asked)
    total.backward()  # type: ignore[no-untyped-call]
    assert x_ND.grad is not None and not nll_N.requires_grad
    return x_ND.grad, nll_N, sums


def mixed(given: Predictions) -> tuple[Tensor, dict[str, Tensor]]:
    """Of everything that a loss may see: samples weigh differently, large logits and long features are penalised."""
    weight_N = 1.0 + (given.sample_N % 3).float()
    size_N = given.logits_NV.logsumexp(-1).square() + 0.5 * given.hidden_ND.square().sum(-1)
    return (weight_N * given.nll_N + 0.1 * size_N).sum(), {"weight": weight_N.sum(), "by_class": given.logits_NV.sum(0)}


def mixed_by_loops(labels: list[int], first: int, x_ND: Tensor, sums: dict[str, Any]) -> Tensor:
    """The same, target by target and class by class."""
    total, weights = torch.zeros((), dtype=torch.float64), head().weight.double()
    for n, label in enumerate(labels):
        logits = [sum(weights[v, d] * x_ND[n, d] for d in range(WIDTH)) for v in range(CLASSES)]
        peak = max(float(logit.detach()) for logit in logits)
        normaliser = peak + torch.log(sum(torch.exp(logit - peak) for logit in logits))
        weight = 1 + (first + n) // 5 % 3
        length = sum(x_ND[n, d] ** 2 for d in range(WIDTH))
        total = total + weight * (normaliser - logits[label]) + 0.1 * (normaliser**2 + 0.5 * length)
        sums["weight"] = sums.get("weight", 0) + weight
        sums["by_class"] = [a + float(b.detach()) for a, b in zip(sums.get("by_class", [0] * CLASSES), logits, strict=True)]
    return total


@pytest.mark.parametrize("chunk", [None, 8 * CLASSES])
def test_a_loss_of_everything_equals_plain_loops(monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> None:
    if chunk is not None:
        monkeypatch.setattr(cross_entropy, "LOGITS", chunk)
    grad_ND, _, (sums, nothing, other) = minimise([Objective(mixed), Objective(mixed), Objective()])
    (x_ND, labels_N), expected = hidden(), dict[str, Any]()
    own_ND = x_ND[: SIZES[0]].double().requires_grad_()
    total = mixed_by_loops(labels_N[: SIZES[0]].tolist(), 0, own_ND, expected) / STEPS[0]
    (slope_ND,) = torch.autograd.grad(total, own_ND)
    torch.testing.assert_close(grad_ND[: SIZES[0]].double(), slope_ND, rtol=1e-5, atol=1e-7)
    assert nothing == other == {}
    assert every(value.dtype == torch.float64 and not value.requires_grad for value in sums.values())
    assert float(sums["weight"]) == expected["weight"]
    torch.testing.assert_close(sums["by_class"], torch.tensor(expected["by_class"]).double(), rtol=1e-5, atol=1e-5)


def test_a_loss_sees_a_chunk_or_all_that_its_client_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "LOGITS", 32 * CLASSES)
    seen: list[int] = []

    def loss(given: Predictions) -> tuple[Tensor, dict[str, Tensor]]:
        assert given.logits_NV.shape == (len(given.labels_N), CLASSES) and given.routing.experts_LNK.shape[:2] == (
            0,
            seen_now(given),
        )
        return given.nll_N.sum(), {}

    def seen_now(given: Targets) -> int:
        seen.append(len(given.labels_N))
        return seen[-1]

    minimise([Objective(loss)] * 3)
    assert seen == [32, 32, 6, 32, 1]
    seen.clear()
    minimise([Objective(loss)] * 3, whole=True)
    assert seen == [70, 33]


@pytest.mark.parametrize("whole", [False, True])
def test_cross_entropy_as_an_objective_has_its_bits(monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    monkeypatch.setattr(cross_entropy, "LOGITS", 32 * CLASSES)
    plain = minimise([Objective()] * 3)
    for objectives in ([Objective(lambda given: (given.nll_N.sum(), {}))] * 3, [Objective(), *[Objective(mixed)] * 2]):
        found = minimise(objectives, whole)
        same = sum(SIZES) if objectives[0].loss else SIZES[0]
        assert every(torch.equal(a[:same], b[:same]) for a, b in zip(found[:2], plain[:2], strict=True))
    x_ND, labels_N = hidden()
    x_ND.requires_grad_()
    weight_N = torch.cat([torch.full((size,), 1 / step) for size, step in zip(SIZES, STEPS, strict=True)])
    total, nll_N = cross_entropy.weighted_loss(head(), x_ND, labels_N, weight_N)
    total.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(plain[1], nll_N) and x_ND.grad is not None and torch.equal(plain[0], x_ND.grad)


def test_what_is_no_scalar_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"^an objective's loss is a scalar, and not \[70\]$"):
        minimise([Objective(lambda given: (given.nll_N, {}))] * 3)


SHORT: dict[str, Any] = {
    "federation": {"rounds": 1},
    "local": {"max_steps": 3, "batch_size": 4},
    "execution": {"micro_batch_size": None},
    "evaluation": {"max_sequences": 1, "client_sequences": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objective")
    write_inputs(folder, (13, 9, 7, 5))
    return folder


def asking(
    parts: Parts, objective: Callable[[Client], Objective], shapes: dict[str, tuple[int, ...]], whole: bool = False
) -> dict[int, ClientUpdate]:
    """Let every client have this objective; returns where their updates will be, by client."""
    updates: dict[int, ClientUpdate] = {}
    fold = parts.server.fold

    def folded(sums: Any, place: int, view: Any, update: ClientUpdate) -> None:
        updates[update.client.index] = update
        fold(sums, place, view, update)

    parts.server.fold = folded  # type: ignore[method-assign]
    for name, value in {"objective": lambda client, _: objective(client), "sums": shapes, "whole_steps": whole}.items():
        object.__setattr__(parts.trainer.hooks, name, value)
    return updates


def asked(
    root: Path,
    name: str,
    objective: Callable[[Client], Objective],
    shapes: dict[str, tuple[int, ...]],
    *changes: dict[str, Any],
) -> Any:
    """(result, updates by client) of a run of one round."""
    parts, journal = build(make_config(root, name, SHORT, *changes), *alone())
    updates = asking(parts, objective, shapes)
    return finish(parts, journal), updates


LAYERS, EXPERTS = 2, 16
SHAPES = {EXPERT_LOSS: (LAYERS, EXPERTS), EXPERT_TARGETS: (LAYERS, EXPERTS)}


def per_expert(root: Path, name: str, *changes: dict[str, Any]) -> tuple[Result, dict[int, dict[str, np.ndarray]]]:
    result, updates = asked(root, name, lambda _: loss_per_expert(EXPERTS), SHAPES, *changes)
    return result, {index: update.observed for index, update in updates.items()}


def test_loss_per_expert_equals_plain_loops(root: Path) -> None:
    """In the first step, before anything is trained: target by target through a model of loops."""
    change = {"local": {"max_steps": 1}, "seed": 3}
    result, found = per_expert(root, "loops", change)
    assert result.digest == run_alone(make_config(root, "loops-plain", SHORT, change)).digest, "the loss is unchanged"
    parts = result.parts
    reference = Reference(root / "model", Settings(scale=2.0))
    start = initial(build(make_config(root, "loops-start", SHORT, change), *alone())[0])
    for task in tasks(parts, 1):
        run = reference.start(start, torch.ones(1, dtype=torch.float64), task.cap)
        losses, counts = np.zeros((LAYERS, EXPERTS)), np.zeros((LAYERS, EXPERTS))
        for ids, mask in task.steps[0]:
            run.logits.clear()
            reference.loss_sum(ids, mask)
            logits = reference.model(input_ids=torch.from_numpy(np.array(ids))[None], use_cache=False).logits[0]
            for place in np.flatnonzero(mask):
                nll = float(logits[place - 1].logsumexp(-1) - logits[place - 1, int(ids[place])])
                for layer in range(LAYERS):
                    for expert in run.logits[layer][0][place - 1].topk(task.cap).indices.tolist():
                        losses[layer, expert] += nll
                        counts[layer, expert] += 1
        assert reference.margin > 1e-6
        np.testing.assert_array_equal(found[task.index][EXPERT_TARGETS], counts)
        np.testing.assert_allclose(found[task.index][EXPERT_LOSS], losses, rtol=1e-5)
        # Of all clients together, every kept slot of a target's token is counted once.
        targets = sum(int(mask.sum()) for _, mask in task.steps[0])
        assert counts.sum() == LAYERS * task.cap * targets and targets > 0
    assert len(found) == len(tasks(parts, 1)) > 1


WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "one client at a time": ({"execution": {"clients_in_flight": 1}}, True),
    "recomputed": ({"execution": {"activation_checkpointing": True}}, True),
    "fast": ({"execution": {"reproducible": "fast"}}, False),
    "packed": ({"execution": {"packing": True}}, False),
    "micro-batches": ({"execution": {"micro_batch_size": 3}}, False),
}


def test_sums_are_the_same_in_every_way_to_compute_a_step(root: Path) -> None:
    change = {"local": {"max_steps": 1}}
    _, expected = per_expert(root, "plain", change)
    for way, (other, exact) in WAYS.items():
        _, found = per_expert(root, way.replace(" ", "-"), change, other)
        assert found.keys() == expected.keys(), way
        for index, sums in found.items():
            np.testing.assert_array_equal(sums[EXPERT_TARGETS], expected[index][EXPERT_TARGETS], err_msg=way)
            same: Callable[..., None] = np.testing.assert_array_equal if exact else np.testing.assert_allclose
            same(sums[EXPERT_LOSS], expected[index][EXPERT_LOSS], **({} if exact else {"rtol": 1e-4}))


def test_samples_and_steps_are_named(root: Path) -> None:
    """Every target is told with its sample and step; the last epoch is the last pass over the client's data."""
    told: dict[int, list[Targets]] = {}

    def listening(client: Client) -> Objective:
        def observe(given: Targets) -> dict[str, Tensor]:
            told.setdefault(client.index, []).append(given)
            return {}

        return Objective(observe=observe)

    change = {"local": {"max_steps": None, "epochs": 2}, "execution": {"micro_batch_size": 3}}
    result, updates = asked(root, "named", listening, {}, change)
    assert told.keys() == updates.keys() == {client.index for client in result.parts.clients}
    for client in result.parts.clients:
        data, steps = result.parts.training_data.train(client.index), updates[client.index].steps
        assert steps == math.ceil(2 * client.sequences / min(4, client.sequences)) > 1
        for step in range(steps):
            parts = [each for each in told[client.index] if each.step.index == step]
            samples, labels = [torch.cat([getattr(each, name) for each in parts]).tolist() for name in ("sample_N", "labels_N")]
            batch = local_batches(client, result.parts.config.local, result.parts.config.seed, 1)[step]
            targets = [
                (i, token) for i in batch for token, target in zip(data.input_ids[i], data.loss_mask[i], strict=True) if target
            ]
            assert list(zip(samples, labels, strict=True)) == targets
            left = min(4, client.sequences) * (steps - step)
            last = left <= client.sequences or step == steps - 1
            assert {(each.step.targets, each.step.count, each.step.last_epoch) for each in parts} == {
                (len(samples), steps, last)
            }
