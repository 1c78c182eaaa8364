"""Triton's optimizer kernels: interpreted beside PyTorch's operations, compiled for three generations of GPUs, run on a GPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from every import every
from torch import Tensor

from fedmoe_ds.clients.fused_step import ClientStep
from fedmoe_ds.clients.host_moments import HostMoments
from fedmoe_ds.clients.optimizer import ClientOptimizer
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.kernels import rows_on_device
from fedmoe_ds.kernels.device_kernels import PINNED
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

triton = pytest.importorskip("triton")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SPECS = [
    BlockSpec("experts.down.lora_A", (0, 1), (4, 300), expert=True),
    BlockSpec("attention.q_proj.lora_A", (0, 1), (3, 5)),
    BlockSpec("rescaler", (-1,), (1,), personal=True, decay=False),
    BlockSpec("empty", (), (3, 5)),
]
EXPERTS, CLIENTS = 3, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "clip": 1.0},
    "adamw, half": {"optimizer": "adamw", "clip": None, "moments": "bfloat16"},
    "sgd": {"optimizer": "sgd", "weight_decay": 0.1, "clip": None},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "clip": 1.0},
    "momentum, half": {"optimizer": "sgd", "momentum": 0.9, "clip": 1.0, "moments": "bfloat16"},
}


def states(optimizer: ClientOptimizer) -> list[Tensor]:
    return [tensor for state in (optimizer.bank.values, optimizer.first, optimizer.second) for tensor in state.values()]


def trained(settings: dict[str, Any], device: torch.device, kernels: object, lent: bool = False) -> list[Tensor]:
    """Three steps of clients with factors of their own; client 2 takes only the first, client 3 none and is not touched.
    `lent`: layer by layer, as with moments on the host."""
    config, draw = LocalConfig(**settings), torch.Generator().manual_seed(0)
    optimizer = ClientOptimizer(Bank(SPECS, EXPERTS, CLIENTS, device=device), config, seed=3, first_expert=5)
    if lent:
        optimizer.fused.host = HostMoments(optimizer.fused.moments, device)
    for value in optimizer.bank.values.values():
        value.copy_(torch.randn(value.shape, generator=draw))
    for step in range(3):
        for grad in optimizer.bank.grads.values():
            grad.copy_(torch.randn(grad.shape, generator=draw))
        active = range(3 if step == 0 else 2)
        steps = [ClientStep({True: c, False: c}, 1 + step + c, 0.01 * (c + 1), (2, 7 + c)) for c in active]
        norms_C = torch.tensor([0.5, 8.0, 2.0, 9.0], dtype=torch.float64, device=device) if config.clip else None
        before = [optimizer.bank.client(spec.name, 3 - (step > 0)).clone() for spec in SPECS]
        with torch.no_grad(), mock.patch.object(rows_on_device, "kernels", lambda tensor: kernels):
            optimizer.fused.take(steps, norms_C)
        after = [optimizer.bank.client(spec.name, 3 - (step > 0)) for spec in SPECS]
        assert every(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    return states(optimizer)


def check_steps(settings: dict[str, Any], device: torch.device) -> None:
    """By kernels and by PyTorch's operations, which `test_optimizer.py` holds to torch.optim's numbers."""
    loose = settings.get("moments") == "bfloat16"
    for ours, theirs in zip(trained(settings, device, "Triton"), trained(settings, device, None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2.0**-6 if loose else 1e-5, atol=1e-3 if loose else 1e-6)
        # A last digit of float32 that differs turns one rounding in some ten thousand; other random bits would turn half.
        same = torch.isclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)
        assert not same.numel() or float(same.double().mean()) >= 0.99, (settings, tuple(ours.shape))
    whole, lent = (trained(settings, device, "Triton", lent) for lent in (False, True))
    assert every(torch.equal(x, y) for x, y in zip(whole, lent, strict=True)), settings


KERNELS = {
    "adamw_items": [{"DECAY": True, "HALF": False}, {"DECAY": False, "HALF": True}],
    "sgd_items": [{"BUFFER": True, "HALF": True}, {"BUFFER": False, "HALF": False}],
}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("name", "which"), itertools.product(KERNELS, (0, 1)))
def test_optimizer_kernels_compile_without_a_device(
    name: str, which: int, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a kernel found in the cache would not have been compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedmoe_ds.kernels import optimizer_triton

    kernel, flags = getattr(optimizer_triton, name), KERNELS[name][which]
    pointers = dict.fromkeys(("value", "grad", "factors"), "*fp32") | {"bases": "*i64"}
    pointers |= dict.fromkeys(("first", "second", "buffer"), "*i16" if flags["HALF"] else "*fp32")
    numbers = dict.fromkeys(("columns", "experts", "clients", "first_expert", "size"), "i32")
    fixed = {**flags, "BLOCK": optimizer_triton.BLOCK}
    signature = {key: "constexpr" if key in fixed else {**pointers, **numbers}.get(key, "fp32") for key in kernel.arg_names}
    whole = {*pointers, "size"} - {"factors", "bases"}
    aligned = {(place,): [["tt.divisibility", 16]] for place, key in enumerate(kernel.arg_names) if key in whole}
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(PINNED)).asm
    assert code["cubin"] and "ld.global.v4.b32" in code["ptx"] and "st.global.v4.b32" in code["ptx"]


@CUDA
@pytest.mark.parametrize("name", SETTINGS)
def test_steps_on_the_device(name: str) -> None:
    check_steps(SETTINGS[name], torch.device("cuda"))
