"""Products of groups: nothing of an empty group is read, idle ranks launch nothing, and nothing is uploaded or rounded twice.

Legend: N rows, G groups, I input width, O output width, R rank.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from federations import build
from method_variants import variant_config

from fake_cuda.runs import on_device, root, run_on_device
from fedmoe_ds import kernels
from fedmoe_ds.federation.start_events import start_line
from fedmoe_ds.kernels import device_kernels
from fedmoe_ds.kernels.device_kernels import LOOP, TORCH, TRITON, grouped_by, triton_serves
from fedmoe_ds.kernels.grouped_mm import add_outer_, grouped_mm, grouped_mm_t, grouped_outer
from fedmoe_ds.kernels.groups import Groups
from fedmoe_ds.kernels.lora_products import MAX_TRITON_RANK, GroupedProducts, LowRankProducts, products_for
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.experts import Block, Lora
from fedmoe_ds.model.scale_factors import ScaleFactors

HALF = torch.bfloat16
RUN: dict[str, Any] = {
    "execution": {"reproducible": "fast"},
    "foundation": {"dtype": "bfloat16"},
    "adapters": {"rank": 8},  # rows of whole 16 bytes, which torch's kernel takes
    "federation": {"rounds": 1},
    "evaluation": {"every": 1},
}
CUDA = torch.device("cuda")


def _groups(rows_G: list[int]) -> Groups:
    return Groups(torch.tensor(rows_G).cumsum(0).to(CUDA, torch.int32), sum(rows_G))


def case_what_belongs_to_empty_groups_is_not_read(fake: Any) -> None:
    fake.COUNT.empty_groups = "garbage"
    groups = _groups([3, 0, 2, 0])
    y_NO, x_NI = torch.ones(5, 8, device=CUDA, dtype=HALF), torch.ones(5, 16, device=CUDA, dtype=HALF)
    assert [int(part) for part in grouped_outer(y_NO, x_NI, groups).sum((1, 2)).cpu()] == [384, 0, 256, 0]
    out_GOI = torch.zeros(4, 8, 16, device=CUDA)
    add_outer_(out_GOI, y_NO, x_NI, groups)
    assert out_GOI[1].cpu().eq(0).all() and out_GOI.cpu().sum() == 640


def case_more_groups_than_torch_takes(fake: Any) -> None:
    """Rows of chunks are cut on the host: one wait per plan, and not one per product."""
    fake.COUNT.empty_groups = "garbage"
    rows_G = [group % 3 for group in range(2100)]
    groups, rows = _groups(rows_G), sum(rows_G)
    x_NI, weight_GOI = torch.ones(rows, 8, device=CUDA, dtype=HALF), torch.ones(2100, 8, 8, device=CUDA, dtype=HALF)
    fake.COUNT.reset()
    for _ in range(2):
        y_NO = grouped_mm(x_NI, weight_GOI, groups)
        outer_GOI = grouped_outer(y_NO, x_NI, groups)
    assert sum(fake.COUNT.waits.values()) == 1, fake.COUNT.waits
    assert [int(part) for part in outer_GOI.sum((1, 2)).cpu()] == [8 * 64 * rows for rows in rows_G]


def case_an_idle_rank_multiplies_nothing(fake: Any) -> None:
    groups, weight_GOI = _groups([0, 0, 0]), torch.ones(3, 16, 8, device=CUDA, dtype=HALF)
    x_NI, y_NO = torch.ones(0, 8, device=CUDA, dtype=HALF), torch.ones(0, 16, device=CUDA, dtype=HALF)
    fake.COUNT.reset()
    assert grouped_mm(x_NI, weight_GOI, groups).shape == (0, 16) and grouped_mm_t(y_NO, weight_GOI, groups).shape == (0, 8)
    out_GOI = torch.zeros(3, 16, 8, device=CUDA)
    add_outer_(out_GOI, y_NO, x_NI, groups)
    grouped_outer(y_NO, x_NI, groups)
    assert not [name for name in fake.COUNT.ops if "grouped" in name], fake.COUNT.ops


def case_scales_are_uploaded_once_per_wave(fake: Any) -> None:
    factors, products = ScaleFactors([1.0, 0.5]), GroupedProducts(8, HALF, CUDA)
    ends_G = torch.tensor([2, 3, 3, 5], dtype=torch.int32).to(CUDA)
    values = [torch.ones(2, 2, *shape, device=CUDA, dtype=HALF) for shape in ((8, 16), (32, 8), (8, 16), (16, 8))]
    x_NI = torch.ones(5, 16, device=CUDA, dtype=HALF)
    fake.COUNT.reset()
    for _ in range(3):  # layers
        lora = Lora(*values, [], 2.0, products, factors)
        block = Block(0, 5, None, ends_G[1::2].contiguous(), ends_G)
        m_NR = products.project(x_NI, block.pick(lora.a13), block.groups, lora.scale_of(block))
    assert sum(fake.COUNT.uploads.values()) == 1 and set(fake.COUNT.waits) <= {
        ("upload by _to_copy", place) for _, place in fake.COUNT.uploads
    }, (fake.COUNT.uploads, fake.COUNT.waits)
    assert m_NR[:, 0].cpu().tolist() == [32.0, 32.0, 16.0, 16.0, 16.0]


def case_factors_are_rounded_once_per_step(fake: Any) -> None:
    bank = Bank([BlockSpec("attention.q_proj.lora_A", (0, 1), (8, 16))], 0, 2, device=CUDA)
    fake.COUNT.reset()
    for _ in range(2):
        for layer in (0, 1):
            bank.value_in(HALF, "attention.q_proj.lora_A", layer)
    assert fake.COUNT.kernels == 1, fake.COUNT.ops
    bank.client("attention.q_proj.lora_A", 1).fill_(3.0)  # through a view, as everything is written
    assert float(bank.value_in(HALF, "attention.q_proj.lora_A", 1)[1, 0, 0].cpu()) == 3.0


def case_a_run_without_what_is_not_its_own(fake: Any) -> None:
    """Neither what lies in empty groups nor a copy of the past: with zeros, and with factors rounded in each call, the same."""
    fake.COUNT.empty_groups = "garbage"
    scores = run_on_device(variant_config(root(), "flame", "kept", RUN)).scores()
    fake.COUNT.empty_groups, original, calls = "zero", Bank.value_in, Counter[torch.dtype]()

    def rounded(bank: Bank, dtype: torch.dtype, name: str, layer: int) -> torch.Tensor:
        calls[dtype] += 1
        return bank.value(name, layer).to(dtype)

    try:
        Bank.value_in = rounded  # type: ignore[method-assign]
        assert run_on_device(variant_config(root(), "flame", "rounded", RUN)).scores() == scores and calls[HALF]
    finally:
        Bank.value_in = original  # type: ignore[method-assign]


def case_what_multiplies_is_told(fake: Any) -> None:
    """Without Triton torch's kernel serves where it is one launch; elsewhere the loop inside torch is called that."""
    assert not triton_serves(HALF, CUDA)
    assert grouped_by(HALF, CUDA) == TORCH == GroupedProducts(8, HALF, CUDA).kernel
    assert grouped_by(torch.float32, CUDA) == LOOP == GroupedProducts(8, torch.float32, CUDA).kernel
    for arch in (80, 120):
        fake.COUNT.arch = arch
        assert grouped_by(HALF, CUDA) == LOOP == GroupedProducts(8, HALF, CUDA).kernel


def case_torch_excludes_our_kernels(fake: Any) -> None:
    """Asked of what ran: `torch` never leaves a product to Triton, and `auto` says where it does. The name holds everywhere."""
    ran = Counter[str]()
    ours = SimpleNamespace(
        rows_by_weights=lambda x_NI, weight_GIO, groups: ran.update(rows=1) or x_NI.new_zeros(len(x_NI), weight_GIO.shape[2]),
        add_outer_=lambda *_: ran.update(outer=1),
    )
    with (
        mock.patch.object(kernels, "grouped_triton", ours, create=True),
        mock.patch.object(device_kernels, "has_triton", lambda device: device.type == "cuda"),
    ):
        for arch, dtype, rank in ((80, HALF, 136), (90, torch.float32, 136), (90, HALF, 132), (90, HALF, 136), (80, HALF, 8)):
            fake.COUNT.arch, found = arch, dict[str, tuple[str, str]]()
            for chosen in ("auto", "torch") if rank > MAX_TRITON_RANK else ("torch",):
                products = products_for(rank, dtype, CUDA, chosen)  # type: ignore[arg-type]
                _all_six(products, rank, dtype)
                assert ran == ({"rows": 4, "outer": 2} if products.kernel == TRITON else {}), (arch, dtype, rank, chosen, ran)
                ran.clear()
                found[chosen] = (products.name, products.kernel)
            assert found["torch"][1] != TRITON and {name for name, _ in found.values()} == {found["torch"][0]}, found
            assert rank == 8 or (found["auto"][1] == TRITON) == ((arch, rank) != (90, 136) or dtype != HALF), found


def _all_six(products: LowRankProducts, rank: int, dtype: torch.dtype) -> None:
    groups, ones = _groups([3, 0, 2]), functools.partial(torch.ones, device=CUDA)
    x_NI, y_NO, a_GRI, b_GOR = (ones(*shape, dtype=dtype) for shape in ((5, 16), (5, 8), (3, rank, 16), (3, 8, rank)))
    m_NR = products.project(x_NI, a_GRI, groups, 1.0)
    products.expand_(y_NO, m_NR, b_GOR, groups)
    dm_NR = products.back_project(y_NO, b_GOR, groups, 1.0)
    products.back_expand_(x_NI, dm_NR, a_GRI, groups)
    products.grad_a_(ones(3, rank, 16), dm_NR, x_NI, groups)
    products.grad_b_(ones(3, 8, rank), m_NR, y_NO, groups)


def case_whole_experts_are_a_group_for_each_client(fake: Any) -> None:
    """The start line counts what the largest pass multiplies: more groups than torch takes at once go to Triton."""
    no_triton = {"execution": {"adapter_kernels": "torch"}}  # of the projections' adapters: it cannot be imported here
    parts, _ = build(variant_config(root(), "hfedmoe-full", "whole", RUN, no_triton), *on_device())
    groups = parts.foundation.layers[0].w13.shape[0] * parts.execution.bank.expert_clients
    with mock.patch.object(device_kernels, "has_triton", lambda device: device.type == "cuda"):
        for most, by in ((groups, TORCH), (groups - 1, TRITON)):
            with mock.patch.object(device_kernels, "CUDA_GROUPS", most):
                assert f"; expert products by {by}" in start_line(parts), (groups, most, start_line(parts))


def case_the_default_type_is_the_models(fake: Any) -> None:
    """And the run says so: on its start line, in its identity and in what it saves."""
    folder, told = root() / "halves", root() / "halves" / "config.json"
    shutil.copytree(root() / "model", folder)
    told.write_text(json.dumps(json.loads(told.read_text()) | {"dtype": "bfloat16"}))
    config = variant_config(root(), "flame", "halves", RUN, {"foundation": {"path": str(folder), "dtype": "auto"}})
    parts, _ = build(config, *on_device())
    assert {parts.foundation.model.dtype, parts.foundation.layers[0].w13.dtype} == {HALF}
    assert parts.identity["foundation.dtype"] == "bfloat16" and "dtype: bfloat16" in parts.config_text
    assert f"; weights in bfloat16; adapter products by {TORCH}; expert products by {TORCH}; without" in start_line(parts)
    assert "; without Triton (torch " in start_line(parts), "why the device is slow"
