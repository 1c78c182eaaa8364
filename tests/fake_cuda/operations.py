"""Operations: which of torch's operations launch kernels on CUDA, how many, and for which the host waits.

Sources: aten/src/ATen/native of torch (cuda/Copy.cu, cuda/Nonzero.cu, cuda/SummaryOps.cu, cuda/Sort.cu, cuda/IndexKernel.cpp).
"""

from __future__ import annotations

_VIEWS = """view _unsafe_view t transpose permute select slice expand unsqueeze squeeze detach alias as_strided split
    split_with_sizes unbind diagonal lift_fresh movedim _reshape_alias unfold chunk _conj real imag view_as narrow"""
_NO_WORK = """empty empty_like empty_strided new_empty new_empty_strided resize_ set_ _local_scalar_dense is_pinned
    requires_grad_
    _fused_sdp_choice sym_size _functional_assert_async record_stream"""
NO_KERNEL = frozenset((_VIEWS + " " + _NO_WORK).split())
KERNELS = {
    "bincount": 4,
    "sort": 12,
    "argsort": 12,
    "topk": 2,
    "nonzero": 4,
    "_grouped_mm": 2,
    "repeat_interleave": 4,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "index_put_": 5,
    "_index_put_impl_": 5,
}
"""Launches of one call where it is not one."""

WAITS = {
    "_local_scalar_dense": 1,
    "nonzero": 1,
    "bincount": 2,
    "masked_select": 1,
    "_unique2": 1,
    "equal": 1,
    "_linalg_svd": 1,
    "is_nonzero": 1,
    "repeat_interleave": 1,
    "histc": 1,
}
"""How often the host waits in one call: a size of the result, or the result itself, is needed there."""

COPIES = frozenset({"copy_", "_to_copy", "_copy_from", "lift_fresh", "_pin_memory", "is_pinned"})
"""These may see tensors of two devices."""

INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"})
PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "_scaled_dot_product_flash_attention"})
GATHERS = frozenset({"embedding", "index_select", "gather"})
"""They read what they write and little else, however large the table is."""
