"""Stochastic rounding: float32 to bfloat16 at random, up or down with the chances that make the mean right.

To the nearest, a moving average stands still as soon as a step changes it by less than half of its last digit: with eight bits
and beta2 = 0.999 the second moment of AdamW does after some 256 steps. At random (Gupta et al., arXiv 1502.02551) it goes on
moving, in the mean as it does in float32.

The random bits of a number are a hash of its address (seed, round, client, block, the client's own step; layer, global expert;
place within the item). No stream is used up, so no slot, no other client in flight, no expert-parallel size and no resume
changes a bit. `kernels/rows.cpp` has the same hash and the same rounding.

Legend: L layers, E experts held by this rank, N numbers of an item.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.randomness import address_key

Keys = NDArray[np.uint64]

# SplitMix64's distance between states.
_STRIDE = 0x9E3779B97F4A7C15
# The bits that bfloat16 drops, and the pattern of infinity: larger magnitudes are NaN.
_LOW, _HIGH = 0xFFFF, 0x7F800000


class Rounding:
    """The keys of what one rank keeps.

    Args:
        seed: run seed.
        held: global ids of the experts on this rank.
    """

    def __init__(self, seed: int, held: range) -> None:
        self.seed, self.held = seed, held

    def keys(self, spec: BlockSpec, round_index: int, client: int, step: int) -> Keys:
        """64 bits per item of a client's block at the client's own `step`: [L, E], or [L] for dense blocks."""
        base = torch.tensor(self.base(spec, round_index, client, step))
        return mixed(base, self.numbers(spec)).numpy().view(np.uint64)

    def base(self, spec: BlockSpec, round_index: int, client: int, step: int) -> int:
        """What the keys of a client's block start from at the client's own `step`: 64 bits, as a signed number."""
        return _signed(address_key(self.seed, "moments", round_index, client, spec.name, step) % (1 << 64))

    def numbers(self, spec: BlockSpec) -> Tensor:
        """The items' own numbers, int64 [L, E], or [L] for dense blocks."""
        # Layer in the upper half, global expert in the lower: one 64-bit number per item, none twice.
        layers_L = torch.arange(len(spec.layers)) << 32
        return layers_L.unsqueeze(-1) | torch.tensor(self.held) if spec.expert else layers_L


def _signed(bits: int) -> int:
    """The int64 of the same 64 bits."""
    return bits - (1 << 64) if bits >> 63 else bits


def mixed(bases: Tensor, numbers: Tensor) -> Tensor:
    """SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): its outputs `numbers` when it starts from `bases`; all int64."""
    # int64 wraps around as the published generator's unsigned numbers do; `_shifted` fills up with zeros as theirs.
    x = bases + numbers * _signed(_STRIDE)
    x = _shifted(x, 30).mul_(_signed(0xBF58476D1CE4E5B9))
    x = _shifted(x, 27).mul_(_signed(0x94D049BB133111EB))
    return _shifted(x, 31)


def at_layer(bases: Tensor, layer: int) -> Tensor:
    """Bases from which the items of layer 0 get the keys that those of `layer` have from `bases`."""
    return bases + _signed((layer << 32) * _STRIDE % (1 << 64))


def random_bits(keys: Keys | Tensor, count: int, device: torch.device | None = None) -> Tensor:
    """32 random bits for each of the `count` numbers of every item: int32 [*keys.shape, count].

    A 32-bit integer hash (lowbias32 by C. Wellons) of the place within the item. Half of the item's key goes in before it and
    half between its multiplications, so that items whose first halves are near each other do not share their bits.
    """
    whole = keys if isinstance(keys, Tensor) else torch.from_numpy(keys.view(np.int64)).to(device)
    # int32 takes the lower half of the bits, and after a shift the upper one.
    low, high = whole.to(torch.int32), (whole >> 32).to(torch.int32)
    x = torch.arange(count, dtype=torch.int32, device=device) + low.unsqueeze(-1)  # int32 wraps around, as uint32 does
    x = _shifted(x, 16).mul_(0x7FEB352D)
    # torch multiplies no unsigned 32-bit integers: the factor is the negative int32 of the same bits.
    x = _shifted(x, 15).bitwise_xor_(high.unsqueeze(-1)).mul_(0x846CA68B - (1 << 32))
    return _shifted(x, 16)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x ^ (x >> by), in place, with zeros from the left."""
    # Signed shifts copy the sign to the left; the mask takes those copies off again.
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (8 * x.element_size() - by)) - 1))


def rounded(value: Tensor, bits: Tensor) -> Tensor:
    """`value` (float32) in bfloat16, rounded by the lower 16 of its random `bits` (int32, same shape).

    Numbers that bfloat16 can hold, zeros and infinities stay what they are, NaN stays NaN; beyond the largest bfloat16 the next
    number is infinity, as it is for rounding to the nearest.
    """
    pattern = value.view(torch.int32)
    # A carry out of the lower 16 bits has the chance fraction / 2^16: the mean is right. The sign is a bit of its own, so
    # negative numbers are rounded by magnitude in the same way.
    up = (pattern + (bits & _LOW)) >> 16
    is_nan = (pattern & 0x7FFFFFFF) > _HIGH  # its fraction would carry into the sign
    # 0x40 sets a bit of the fraction that is kept: a NaN whose payload lies in the dropped half would turn into infinity.
    return torch.where(is_nan, (pattern >> 16) | 0x40, up).to(torch.int16).view(torch.bfloat16)


def store(moments: list[Tensor], values: list[Tensor], keys: Keys | Tensor) -> None:
    """Keep one or two moments in bfloat16: the first takes the lower half of the random bits, the second the upper.

    Args:
        moments: bfloat16, [*keys.shape, *item] each.
        values: float32, the same shapes.
    """
    count = math.prod(values[0].shape[keys.ndim :])
    bits = random_bits(keys, count, values[0].device).view(values[0].shape)
    for place, (moment, value) in enumerate(zip(moments, values, strict=True)):
        moment.copy_(rounded(value, bits >> (16 * place)))
