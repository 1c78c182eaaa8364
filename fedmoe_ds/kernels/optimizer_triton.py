"""Client optimizers as Triton kernels: one launch for a block of all layers, experts and clients of a wave.

Legend: L layers, E experts held by this rank, C clients, K columns of the factors' table.

An item is one client's parameter of one layer (and expert). Every program has a part of one item and reads its client's factors
from the table; programs of clients that take no step end at once. Moments in bfloat16 are passed as their bits and rounded as
in `clients/stochastic_rounding.py`, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmoe_ds.kernels.client_block import FACTORS, ClientBlock
from fedmoe_ds.kernels.device_kernels import PINNED

BLOCK = 1024

_ACTIVE, _CLIP, _RATE, _KEEP, _ROOT, _BLEND1, _BLEND2 = map(tl.constexpr, FACTORS)
"""A kernel reads globals of this type only."""


@triton.jit
def adamw_items(
    value: tl.tensor,
    grad: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    factors: tl.tensor,
    bases: tl.tensor,
    columns: tl.tensor,
    experts: tl.tensor,
    clients: tl.tensor,
    first_expert: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    DECAY: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One AdamW step (see `rows.adamw`); gradients are cleared. Program p has block p mod B of item p div B."""
    # The grid has one side: a whole expert has more blocks than a second side may have programs.
    blocks = tl.cdiv(size, BLOCK)
    item = tl.program_id(0) // blocks
    mine = factors + item % clients
    if tl.load(mine + _ACTIVE * columns) == 0.0:
        return
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside, at = place < size, item.to(tl.int64) * size + place
    slope = tl.load(grad + at, mask=inside, other=0.0) * tl.load(mine + _CLIP * columns)
    mean, square, w = (
        load_moment(first, at, inside, HALF),
        load_moment(second, at, inside, HALF),
        tl.load(value + at, mask=inside),
    )
    mean += (slope - mean) * tl.load(mine + _BLEND1 * columns)
    square += (slope * slope - square) * tl.load(mine + _BLEND2 * columns)
    if DECAY:
        w *= tl.load(mine + _KEEP * columns)
    root, rate = tl.load(mine + _ROOT * columns), tl.load(mine + _RATE * columns)
    tl.store(value + at, w - rate * tl.div_rn(mean, tl.div_rn(tl.sqrt_rn(square), root) + eps), mask=inside)
    tl.store(grad + at, tl.zeros((BLOCK,), tl.float32), mask=inside)
    bits = tl.zeros((BLOCK,), tl.uint32)
    if HALF:
        bits = random_bits(place, item_key(bases, item, experts, clients, first_expert))
    store_moment(first, at, mean, bits, inside, HALF)
    store_moment(second, at, square, bits >> 16, inside, HALF)


@triton.jit
def sgd_items(
    value: tl.tensor,
    grad: tl.tensor,
    buffer: tl.tensor,
    factors: tl.tensor,
    bases: tl.tensor,
    columns: tl.tensor,
    experts: tl.tensor,
    clients: tl.tensor,
    first_expert: tl.tensor,
    size: tl.tensor,
    momentum: tl.tensor,
    decay: tl.tensor,
    BUFFER: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One step of SGD with classical momentum; gradients are cleared."""
    # The grid has one side: a whole expert has more blocks than a second side may have programs.
    blocks = tl.cdiv(size, BLOCK)
    item = tl.program_id(0) // blocks
    mine = factors + item % clients
    if tl.load(mine + _ACTIVE * columns) == 0.0:
        return
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside, at = place < size, item.to(tl.int64) * size + place
    w = tl.load(value + at, mask=inside)
    update = tl.load(grad + at, mask=inside, other=0.0) * tl.load(mine + _CLIP * columns) + w * decay
    if BUFFER:
        update += load_moment(buffer, at, inside, HALF) * momentum
        bits = tl.zeros((BLOCK,), tl.uint32)
        if HALF:
            bits = random_bits(place, item_key(bases, item, experts, clients, first_expert))
        store_moment(buffer, at, update, bits, inside, HALF)
    tl.store(value + at, w - update * tl.load(mine + _RATE * columns), mask=inside)
    tl.store(grad + at, tl.zeros((BLOCK,), tl.float32), mask=inside)


@triton.jit
def item_key(bases: tl.tensor, item: tl.tensor, experts: tl.tensor, clients: tl.tensor, first_expert: tl.tensor) -> tl.tensor:
    """The 64 bits that an item's rounding starts from: SplitMix64 of its client's base, its layer and its global expert."""
    pair = item // clients
    number = ((pair // experts).to(tl.uint64) << 32) | (first_expert + pair % experts).to(tl.uint64)
    key = tl.load(bases + item % clients).to(tl.uint64, bitcast=True) + number * 0x9E3779B97F4A7C15
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    return key ^ (key >> 31)


@triton.jit
def random_bits(place: tl.tensor, key: tl.tensor) -> tl.tensor:
    """32 bits for each place of an item."""
    x = place.to(tl.uint32) + (key & 0xFFFFFFFF).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ (key >> 32).to(tl.uint32)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def load_moment(moment: tl.tensor, at: tl.tensor, inside: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    if HALF:
        bits = tl.load(moment + at, mask=inside, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
        x = (bits << 16).to(tl.float32, bitcast=True)
    else:
        x = tl.load(moment + at, mask=inside, other=0.0)
    return x


@triton.jit
def store_moment(
    moment: tl.tensor, at: tl.tensor, x: tl.tensor, bits: tl.tensor, inside: tl.tensor, HALF: tl.constexpr
) -> None:
    if HALF:
        pattern = x.to(tl.uint32, bitcast=True)
        # A NaN's fraction would carry into the sign.
        is_nan = (pattern & 0x7FFFFFFF) > 0x7F800000
        kept = tl.where(is_nan, pattern | 0x400000, pattern + (bits & 0xFFFF)) >> 16
        tl.store(moment + at, kept.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
    else:
        tl.store(moment + at, x, mask=inside)


def adamw(block: ClientBlock, eps: float) -> None:
    """One AdamW step of all clients of a block."""
    _run(adamw_items, block, block.moments, (eps,), DECAY=block.decay > 0, HALF=block.bases_C is not None)


def sgd(block: ClientBlock, momentum: float) -> None:
    """One step of SGD of all clients of a block, without momentum where it has no moments."""
    kept = bool(block.moments)
    # A pointer is asked for even where nothing is read through it.
    moments = block.moments or [block.grad]
    _run(sgd_items, block, moments, (momentum, block.decay), BUFFER=kept, HALF=kept and block.bases_C is not None)


def _run(kernel: Any, block: ClientBlock, moments: list[Tensor], constants: tuple[float, ...], **flags: bool) -> None:
    # A block without items (no experts here, no layers) has nothing to step.
    if block.value.numel() == 0:
        return
    bits = [moment.view(torch.int16) if moment.dtype == torch.bfloat16 else moment for moment in moments]
    tensors = (block.value, block.grad, *bits)
    for tensor in tensors:
        # Kernels see pointers only: another stride would not fail, it would read other numbers.
        assert tensor.is_contiguous() and tensor.shape == block.value.shape, (tensor.shape, tensor.stride())
    factors, bases = block.factors_7C, block.bases_C
    assert factors.stride(1) == 1 and (bases is None or bases.stride(0) == 1), factors.stride()
    clients, size = factors.shape[1], math.prod(block.value.shape[block.value.dim() - block.item_axes :])
    numbers = (factors.stride(0), block.experts, clients, block.first_expert, size, *map(float, constants))
    grid = (block.value.numel() // size * triton.cdiv(size, BLOCK),)
    kernel[grid](*tensors, factors, factors if bases is None else bases, *numbers, **flags, BLOCK=BLOCK, **PINNED)
