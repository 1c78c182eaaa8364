"""Client optimizers: torch.optim's numbers, and a finished client is not touched, bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from every import every
from torch import Tensor

from fedmoe_ds.clients.fused_step import ClientStep
from fedmoe_ds.clients.host_moments import HostMoments
from fedmoe_ds.clients.optimizer import ClientOptimizer, Turn, squared_norms
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

SPECS = [
    BlockSpec("experts.down.lora_A", (0, 1), (4, 6), expert=True),
    BlockSpec("attention.q_proj.lora_A", (0, 1), (3, 5)),
    BlockSpec("rescaler", (-1,), (1,), personal=True, decay=False),
]
NAMES = [spec.name for spec in SPECS]
EXPERTS, CLIENTS = 3, 2


def make_bank(seed: int = 0) -> Bank:
    bank = Bank(SPECS, EXPERTS, CLIENTS)
    draw = torch.Generator().manual_seed(seed)
    for value in bank.values.values():
        value.normal_(generator=draw)
    return bank


def gradients(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(value.shape, generator=draw) * 10.0**-step for name, value in make_bank().values.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "weight_decay": 0.1, "betas": [0.8, 0.95], "eps": 1e-6},
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    ],
)
def test_same_as_torch(settings: dict[str, Any]) -> None:
    """Four steps of client 1, with its own rates and clipping factors, while client 0 rests."""
    config = LocalConfig(**settings)
    bank = make_bank()
    leaves = {name: bank.client(name, 1).clone().double().requires_grad_() for name in NAMES}
    groups = [
        {"params": [leaves[spec.name] for spec in SPECS if spec.decay], "weight_decay": config.weight_decay},
        {"params": [leaves[spec.name] for spec in SPECS if not spec.decay], "weight_decay": 0.0},
    ]
    theirs: torch.optim.Optimizer
    if config.optimizer == "adamw":
        theirs = torch.optim.AdamW(groups, lr=1.0, betas=(config.betas[0], config.betas[1]), eps=config.eps)
    else:
        theirs = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum)
    ours = ClientOptimizer(bank, config)
    for step in range(4):
        rate, factor = 0.01 * (step + 1), (1.0, 0.25)[step % 2]
        for name, gradient in gradients(step).items():
            bank.grads[name].copy_(gradient)
            leaves[name].grad = bank.client(name, 1).new_zeros(()).double() + gradient.select(axis(name), 1).double() * factor
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        for name in NAMES:
            ours.take(name, [Turn(1, step + 1, rate, factor)])
    for name in NAMES:
        difference = (bank.client(name, 1).double() - leaves[name].detach()).abs().max()
        assert float(difference) <= 1e-6 * float(leaves[name].detach().abs().max()), name


def axis(name: str) -> int:
    return 2 if name.startswith("experts") else 1


@pytest.mark.parametrize("settings", [{"optimizer": "adamw", "weight_decay": 0.1}, {"optimizer": "sgd", "momentum": 0.9}])
def test_a_finished_client_is_not_touched(settings: dict[str, Any]) -> None:
    bank = make_bank()
    optimizer = ClientOptimizer(bank, LocalConfig(**settings))
    for step in range(3):
        for name, gradient in gradients(step).items():
            bank.grads[name].copy_(gradient)
        if step == 0:
            for name in NAMES:
                optimizer.take(name, [Turn(0, 1, 0.1, 1.0)])
            finished = {name: bank.client(name, 0).clone() for name in NAMES}
            waiting = {name: bank.grads[name].select(axis(name), 0).clone() for name in NAMES}
        for name in NAMES:
            optimizer.take(name, [Turn(1, step + 1, 0.1, 0.5)])
    for name in NAMES:
        assert torch.equal(bank.client(name, 0), finished[name]), "no decay, no momentum drift"
        assert not bool(waiting[name].any()), "its gradients were cleared by its own step"
        assert not torch.equal(bank.client(name, 1), make_bank().client(name, 1))


def test_a_client_ends_with_the_same_bits_in_any_slot() -> None:
    results = []
    for clients, slot in ((1, 0), (2, 1), (5, 3)):
        bank = Bank(SPECS, EXPERTS, clients)
        for name in NAMES:
            bank.client(name, slot).copy_(make_bank().client(name, 0))
        optimizer = ClientOptimizer(bank, LocalConfig(weight_decay=0.1))
        for step in range(3):
            for name, gradient in gradients(step).items():
                bank.grads[name].select(axis(name), slot).copy_(gradient.select(axis(name), 0))
            for name in NAMES:
                optimizer.take(name, [Turn(slot, step + 1, 0.1, 0.7)])
        results.append([bank.client(name, slot).clone() for name in NAMES])
    for other in results[1:]:
        assert every(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_reset_forgets_the_previous_wave() -> None:
    ends = []
    for before in (False, True):
        bank = make_bank()
        optimizer = ClientOptimizer(bank, LocalConfig())
        if before:
            for name, gradient in gradients(1).items():
                bank.grads[name].copy_(gradient)
            for name in NAMES:
                optimizer.take(name, [Turn(0, 1, 0.1, 1.0)])
            optimizer.reset()
            for name in NAMES:
                bank.client(name, 0).copy_(make_bank().client(name, 0))
        for name, gradient in gradients(2).items():
            bank.grads[name].copy_(gradient)
        for name in NAMES:
            optimizer.take(name, [Turn(0, 1, 0.1, 1.0)])
        ends.append([bank.client(name, 0).clone() for name in NAMES])
    assert every(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "weight_decay": 0.1, "clip": 1.0},
        {"optimizer": "adamw", "weight_decay": 0.1, "clip": 1.0, "moments": "bfloat16"},
        {"optimizer": "adamw", "clip": None},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        {"optimizer": "sgd", "momentum": 0.9, "moments": "bfloat16"},
        {"optimizer": "sgd", "clip": 1.0},
    ],
)
def test_all_clients_together_as_on_a_device(settings: dict[str, Any]) -> None:
    """Client by client and block by block, with rates, norms and step counts of their own; client 0 finishes first."""
    config = LocalConfig(**settings)
    single, fused = (ClientOptimizer(make_bank(), config, seed=3, first_expert=5) for _ in range(2))
    for step in range(4):
        for name, gradient in gradients(step).items():
            for optimizer in (single, fused):
                optimizer.bank.grads[name].copy_(gradient)
        steps = [
            ClientStep({True: c, False: c}, 1 + step + c, 0.01 * (c + 1), (2, 7 + c)) for c in range(CLIENTS) if c or step < 2
        ]
        norms_C = (
            None if config.clip is None else torch.tensor([3.0, float("nan")] if step else [0.5, 8.0], dtype=torch.float64)
        )
        single.step_all(steps, norms_C)
        before = {name: fused.bank.client(name, 0).clone() for name in NAMES}
        with torch.no_grad():
            fused.fused.take(steps, norms_C)
        if step >= 2:
            assert every(torch.equal(fused.bank.client(name, 0), before[name]) for name in NAMES), "it has finished"
        assert not any(grad.any() for grad in fused.bank.grads.values())
    # A last digit of float32 turns few of the roundings to bfloat16, each by one of its 256 steps.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if config.moments == "float32" else {"rtol": 2.0**-6, "atol": 1e-3}
    for ours, theirs in ((fused.bank.values, single.bank.values), (fused.first, single.first), (fused.second, single.second)):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], **tolerance)
            assert float((ours[name] - theirs[name]).abs().gt(1e-5 * theirs[name].abs() + 1e-6).double().mean()) <= 0.02


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "weight_decay": 0.1, "clip": 1.0},
        {"optimizer": "adamw", "moments": "bfloat16"},
        {"optimizer": "sgd", "momentum": 0.9, "moments": "bfloat16"},
        {"optimizer": "sgd"},
    ],
)
def test_lent_moments_give_the_same_bits(settings: dict[str, Any]) -> None:
    """Layer by layer, over two waves; what the host holds is not read before it was written. (On a device: test_fake_cuda.)"""
    config, ends = LocalConfig(**settings), []
    for lent in (False, True):
        optimizer = ClientOptimizer(make_bank(), config, seed=3, first_expert=5)
        states = [state for state in (optimizer.first, optimizer.second) if state]
        if lent:
            for tensor in (tensor for state in states for tensor in state.values()):
                tensor.fill_(math.nan)
            optimizer.host = optimizer.fused.host = HostMoments(states, torch.device("cpu"))
        for wave in range(2):
            optimizer.reset()
            for step in range(3):
                for name, gradient in gradients(step + wave).items():
                    optimizer.bank.grads[name].copy_(gradient)
                steps = [
                    ClientStep({True: c, False: c}, 1 + step, 0.01 * (c + 1), (wave, 7 + c)) for c in range(CLIENTS - step // 2)
                ]
                with torch.no_grad():
                    optimizer.fused.take(steps, None)
        ends.append([tensor for state in (optimizer.bank.values, *states) for tensor in state.values()])
    assert every(torch.equal(x, y) for x, y in zip(*ends, strict=True))


def test_what_is_not_trained_has_no_moments() -> None:
    frozen = replace(SPECS[0], name="experts.down.lora_B", trained=False)
    optimizer = ClientOptimizer(Bank([*SPECS, frozen], EXPERTS, CLIENTS), LocalConfig())
    assert list(optimizer.first) == list(optimizer.second) == NAMES


def test_norms_are_the_norms() -> None:
    bank = make_bank()
    for name, gradient in gradients(0).items():
        bank.grads[name].copy_(gradient)
    expert_NEC, dense_N1C = squared_norms(bank, expert=True), squared_norms(bank, expert=False)
    assert expert_NEC.shape == (2, EXPERTS, CLIENTS) and dense_N1C.shape == (3, 1, CLIENTS)
    for client in range(CLIENTS):
        parts = [bank.grads[name].select(axis(name), client).flatten().double() for name in NAMES]
        total = expert_NEC[..., client].sum() + dense_N1C[..., client].sum()
        assert float(total.sqrt()) == pytest.approx(float(torch.cat(parts).norm()), rel=1e-6)


def test_norms_do_not_depend_on_the_company() -> None:
    """A rank that holds one expert of one client computes the bits of a rank that holds them all."""
    spec = BlockSpec("experts.down.lora_A", (0,), (8, 37), expert=True)
    whole = Bank([spec], 6, 5)
    whole.grads[spec.name].normal_(generator=torch.Generator().manual_seed(0))
    norms_NEC = squared_norms(whole, expert=True)
    for expert, client in ((0, 0), (3, 2), (5, 4)):
        single = Bank([spec], 1, 1)
        single.grads[spec.name].copy_(whole.grads[spec.name][:, expert : expert + 1, client : client + 1])
        assert torch.equal(squared_norms(single, expert=True)[0, 0, 0], norms_NEC[0, expert, client])


def test_without_dense_blocks_there_is_nothing_to_norm() -> None:
    assert squared_norms(Bank(SPECS[:1], 2, 3), expert=False).shape == (0, 1, 3)


def test_without_clients_at_home_there_are_norms_of_experts_alone() -> None:
    bank = Bank(SPECS, EXPERTS, 0, CLIENTS)
    assert squared_norms(bank, expert=True).shape == (2, EXPERTS, CLIENTS)
    assert squared_norms(bank, expert=False).shape == (3, 1, 0)
