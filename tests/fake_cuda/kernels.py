"""Kernels: operations that CUDA does otherwise than the CPU: grouped products, attention, histograms.

Sources: aten/src/ATen/native/cuda/GroupedBlas.cpp and GroupMM.cu of torch (limits, types, architectures), pytorch issue 172439
(groups without rows on sm_100), native/transformers/cuda/sdp_utils.cpp (which attention is chosen).
"""

from __future__ import annotations

from typing import Any

import torch

from fake_cuda import traffic
from fake_cuda.counters import COUNT
from fake_cuda.tensor import CudaTensor, on_cuda, unwrap, wrap

aten = torch.ops.aten
GROUPS = 1023
"""The most groups of torch's fast grouped product: one thread of a block prepares each."""
_ALIGNMENT = 16  # bytes
_FLASH, _EFFICIENT = 1, 2
_HALVES = (torch.bfloat16, torch.float16)


def _grouped_mm(func: Any, args: Any, kwargs: Any) -> Any:
    """The fast kernel for bfloat16 from sm_90 on; else torch loops over the groups, whose ends it copies to the host first."""
    a, b = args[:2]
    offs = kwargs.get("offs", args[2] if len(args) > 2 else None)
    for side in (a, b):
        _check_layout(side)
    fast = a.dtype == torch.bfloat16 and COUNT.arch >= 90
    groups = a.shape[0] if offs is None else offs.shape[0]
    over_rows = a.dim() == b.dim() == 2
    if fast:
        _check_fast(a, b, groups, over_rows)
    else:
        COUNT.wait("_grouped_mm's loop over groups")
        COUNT.kernels += groups - 2  # two have been counted by the table
    out = func(*unwrap(args), **unwrap(kwargs))
    traffic.count_bytes("_grouped_mm", [a, b], out)
    if fast and over_rows and COUNT.empty_groups == "garbage":
        ends = unwrap(offs).tolist()
        for group, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if start == stop:
                out[group] = float("nan")
    return wrap(out, a.device)


def _check_layout(side: torch.Tensor) -> None:
    """Both sides are read through strides of whole 16 bytes, one of the last two axes without gaps."""
    if side.storage_offset() * side.element_size() % _ALIGNMENT:
        COUNT.refuse("aten::_grouped_mm: expected data_ptr to be aligned to 16 bytes")
    (rows, columns), (row, column) = side.shape[-2:], side.stride()[-2:]
    if row == 1 and column >= max(1, rows):
        leading = column
    elif column == 1 and row >= max(1, columns):
        leading = row
    else:
        leading = None
    if leading is None or leading * side.element_size() % _ALIGNMENT:
        COUNT.refuse(f"aten::_grouped_mm: strides should be multiple of 16 bytes: {tuple(side.shape)}, {side.stride()}")


def _check_fast(a: torch.Tensor, b: torch.Tensor, groups: int, over_rows: bool) -> None:
    if groups > GROUPS:
        COUNT.refuse(f"aten::_grouped_mm: Can't process more than 1024 groups ({groups})")
    if over_rows and not (a.stride(-1) != 1 and b.stride(-1) == 1):
        COUNT.refuse("aten::_grouped_mm: layouts of 2d x 2d other than (column, row) assert on groups without rows")
    if 0 in a.shape or 0 in b.shape:
        COUNT.ops["_grouped_mm without any rows"] += 1  # a matter of a kernel's launch with an empty tensor map


def _flash(func: Any, args: Any, kwargs: Any) -> Any:
    query, key, value = args[:3]
    dropout, causal = (*args[3:], 0.0, False)[:2]
    out, sums = aten._scaled_dot_product_flash_attention_for_cpu(
        *unwrap((query, key, value)), dropout, causal, scale=kwargs.get("scale")
    )
    seed = torch.zeros((), dtype=torch.int64)
    made = wrap((out, sums, seed, seed.clone(), torch.empty(0)), query.device)
    return (*made[:2], None, None, query.shape[2], key.shape[2], *made[2:])


def _flash_backward(func: Any, args: Any, kwargs: Any) -> Any:
    grad, query, key, value, out, sums, _, _, _, _, dropout, causal = args[:12]
    found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *unwrap((grad, query, key, value, out, sums)), dropout, causal, scale=kwargs.get("scale")
    )
    return wrap(tuple(found), query.device)


def _efficient(func: Any, args: Any, kwargs: Any) -> Any:
    query, key, value, bias = args[:4]
    dropout, causal = (*args[5:], 0.0, False)[:2]
    out, sums = aten._scaled_dot_product_flash_attention_for_cpu(
        unwrap(query), unwrap(key), _wide(value, key), dropout, causal, attn_mask=unwrap(bias), scale=kwargs.get("scale")
    )
    if value.shape[-1] < key.shape[-1]:  # as dense as the kernel's own result
        out = out[..., : value.shape[-1]].transpose(1, 2).contiguous().transpose(1, 2)
    seed = torch.zeros((), dtype=torch.int64)
    return wrap((out, sums, seed, seed.clone()), query.device)


def _efficient_backward(func: Any, args: Any, kwargs: Any) -> Any:
    grad, query, key, value, bias, out, sums, _, _, dropout, _ = args[:11]
    causal = args[11] if len(args) > 11 else kwargs.get("is_causal", False)
    wide = (_wide(grad, key), unwrap(query), unwrap(key), _wide(value, key), _wide(out, key), unwrap(sums))
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *wide, dropout, causal, attn_mask=unwrap(bias), scale=kwargs.get("scale")
    )
    return (*wrap((dq, dk, dv[..., : value.shape[-1]].contiguous()), query.device), None)


def _wide(values: Any, key: Any) -> torch.Tensor:
    """As wide as keys, with zeros: the CPU's kernel takes one width alone."""
    plain: torch.Tensor = unwrap(values)
    return torch.nn.functional.pad(plain, (0, key.shape[-1] - values.shape[-1]))


def _choice(func: Any, args: Any, kwargs: Any) -> int:
    query = args[0]
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    one_width = args[2].shape[-1] == query.shape[-1]
    return _FLASH if query.dtype in _HALVES and mask is None and one_width and query.shape[-1] % 8 == 0 else _EFFICIENT


def _histc(func: Any, args: Any, kwargs: Any) -> Any:
    """CUDA counts integers, the CPU does not."""
    values = unwrap(args[0])
    numbers = values if values.is_floating_point() else values.float()
    return wrap(func(numbers, *args[1:], **kwargs).to(values.dtype), args[0].device)


_cpu_attention = torch.nn.functional.scaled_dot_product_attention


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` as on CUDA: flash for 16-bit numbers of one width without a mask, else the
    memory-efficient kernel."""
    if not isinstance(query, CudaTensor):
        return _cpu_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    # Flash reads few heads of keys and values as they are, and takes one width alone.
    flash = query.dtype in _HALVES and attn_mask is None and key.shape[-1] == value.shape[-1]
    if enable_gqa and not flash:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    if flash:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None and not on_cuda(attn_mask):
        COUNT.refuse("scaled_dot_product_attention: Expected query, key, value and attn_mask to be on the same device")
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[
        0
    ]


SPECIAL = {
    "histc": _histc,
    "_grouped_mm": _grouped_mm,
    "_fused_sdp_choice": _choice,
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
}
