"""Pseudo-gradients against loops: who is given how much of whose gradients.

Legend: L layers, E experts, C clients, T rows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe_ds.aggregation.pseudo_gradients import add_pseudo_gradients
from fedmoe_ds.clients.assignment import Assignment, PseudoGradient
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.routed_forward import offered
from fedmoe_ds.model.router import Routing

L, E, C, T = 2, 5, 2, 7
SPECS = [
    BlockSpec("experts.down.lora_A", (0, 3), (2, 3), expert=True),
    BlockSpec("experts.down.lora_B", (0, 3), (4, 2), expert=True),
    BlockSpec("attention.q_proj.lora_A", (0, 1, 2, 3), (2, 3)),
]
Mode = Literal["tokens", "batch"]


def routed(seed: int, cap: int, experts: int = E) -> list[Routing]:
    """Of every layer: rows of which none goes to the experts from `experts` on."""
    draw, layers = torch.Generator().manual_seed(seed), []
    for _ in range(L):
        probs_TE = torch.randn(T, E, generator=draw).softmax(-1)
        best = probs_TE[:, :experts].topk(cap, dim=-1)
        layers.append(Routing(probs_TE, best.values, best.indices, torch.ones(T, cap, dtype=torch.bool)))
    return layers


def step(layers: list[Routing], how: PseudoGradient | None, seed: int = 0) -> tuple[Bank, Bank]:
    """Gradients of two clients after a step, and those before it; the second of them is asked."""
    bank = Bank(SPECS, E, C)
    draw = torch.Generator().manual_seed(seed)
    for grad in bank.grads.values():
        grad.copy_(torch.randn(grad.shape, generator=draw))
    before = Bank(SPECS, E, C)
    for name, grad in bank.grads.items():
        before.grads[name].copy_(grad)
    complete(bank, layers, how)
    return bank, before


def complete(bank: Bank, layers: list[Routing], how: PseudoGradient | None, **told: Any) -> None:
    offers_3LE = torch.stack([torch.cat([one.counts_E().double()[None], offered(one)]) for one in layers], 1)
    training: list[Any] = []
    for slot, asked in enumerate((None, how)):
        assignment = Assignment(2, pseudo=asked, **told)
        client = Client(slot, f"c{slot}", 2, 5, 5, 50, 2, 2, E)
        view = ClientView(client, assignment, bank, bank, {True: slot, False: slot}, {})
        training.append((SimpleNamespace(assignment=assignment, slot=slot, offered=offers_3LE.clone()), view))
    add_pseudo_gradients(training, Pool(None, 1, E, C, merge=True))


def by_hand(layers: list[Routing], before: Bank, spec: BlockSpec, how: PseudoGradient) -> Tensor:
    """The second client's gradients of a block, row by row."""
    grad = before.grads[spec.name][:, :, 1].double().clone()
    for layer, one in enumerate(layers):
        mine = [set(one.experts_TK[t][one.kept_TK[t]].tolist()) for t in range(T)]
        used = [e for e in range(E) if any(e in experts for experts in mine)]
        p = {e: sum(float(one.probs_TE[t, e]) for t in range(T)) / T for e in range(E)}
        mean = sum((p[e] * before.grads[spec.name][layer, e, 1].double() for e in used), torch.zeros(spec.item)) / sum(
            p[e] for e in used
        )
        for e in range(E):
            q = sum(float(one.probs_TE[t, e]) for t in range(T) if e not in mine[t]) / T
            if how.of == "batch":
                q = 0.0 if e in used else p[e]
            grad[layer, e] += how.factor * q * mean
    return grad


@settings(max_examples=20, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(3, E), st.sampled_from(["tokens", "batch"]), st.floats(0.0, 1.0))
def test_the_equations(seed: int, cap: int, experts: int, mode: Mode, factor: float) -> None:
    layers, how = routed(seed, cap, experts), PseudoGradient(factor, mode)
    bank, before = step(layers, how, seed)
    for spec in SPECS:
        if spec.expert:
            assert torch.allclose(bank.grads[spec.name][:, :, 1].double(), by_hand(layers, before, spec, how), atol=1e-6)
            assert torch.equal(bank.grads[spec.name][:, :, 0], before.grads[spec.name][:, :, 0]), "nobody asked for them"
        else:
            assert torch.equal(bank.grads[spec.name], before.grads[spec.name])


@pytest.mark.parametrize(("mode", "cap"), [("tokens", E), ("batch", 3)])
def test_nothing_where_every_expert_is_used(mode: Mode, cap: int) -> None:
    """By every row, or by some row of the step."""
    layers = routed(3, cap)
    assert mode == "tokens" or all(bool((one.counts_E() > 0).all()) for one in layers)
    bank, before = step(layers, PseudoGradient(0.5, mode))
    for name, grad in bank.grads.items():
        assert torch.equal(grad, before.grads[name])


def test_a_gradient_that_is_no_number_goes_no_further() -> None:
    bank, _ = step(routed(5, 1), None)
    for name in ("experts.down.lora_A", "experts.down.lora_B"):
        bank.grads[name][1, 2, 1] = torch.nan
    complete(bank, routed(5, 1), PseudoGradient(0.8))
    for name in ("experts.down.lora_A", "experts.down.lora_B"):
        places = bank.grads[name].isnan().flatten(3).any(-1).nonzero().tolist()
        assert places == [[1, 2, 1]]


@pytest.mark.parametrize("apart", [False, True])
def test_experts_that_a_client_may_not_use_are_given_nothing(apart: bool) -> None:
    """Neither of one model, nor of two side by side; the others are given what they would be."""
    held_LE = np.arange(E)[None].repeat(L, 0) < 3
    told = (
        {"members_MLE": np.stack([held_LE & (np.arange(E) < 1), held_LE & (np.arange(E) >= 1)])}
        if apart
        else {"allowed_LE": held_LE}
    )
    layers, (bank, before), (whole, _) = routed(7, 1), step(routed(7, 1), None), step(routed(7, 1), PseudoGradient(0.5))
    complete(bank, layers, PseudoGradient(0.5), **told)
    for spec in SPECS[:2]:
        assert torch.equal(bank.grads[spec.name][:, 3:, 1], before.grads[spec.name][:, 3:, 1])
        assert torch.equal(bank.grads[spec.name][:, :3, 1], whole.grads[spec.name][:, :3, 1])
        assert not torch.equal(whole.grads[spec.name][:, 3:, 1], before.grads[spec.name][:, 3:, 1])
