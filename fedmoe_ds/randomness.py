"""Addressed randomness: every draw is a pure function of (seed, purpose, address), never of what was drawn before it.

The address is usually (round, client). Because no stream is shared, the number of ranks, the order of clients and a resume
cannot change a single draw (invariant 6 of the design).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch


def address_key(seed: int, purpose: str, *address: int | str) -> int:
    """Return the 128-bit integer that stands for one address."""
    # A separator, so that ("a", "bc") and ("ab", "c") are different addresses.
    text = "\x1f".join([str(seed), purpose, *map(str, address)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def generator(seed: int, purpose: str, *address: int | str) -> np.random.Generator:
    """A numpy generator (Philox, counter based) for one address."""
    return np.random.Generator(np.random.Philox(key=address_key(seed, purpose, *address)))


def generators(seed: int, purpose: str, addresses: Iterable[int | str]) -> Iterator[np.random.Generator]:
    """For each address the generator that `generator(seed, purpose, address)` would be, valid until the next is asked for."""
    # One generator is moved from key to key: making one takes several times as long, which a million clients would notice.
    bits = np.random.Philox(key=0)
    start, moved = bits.state, np.random.Generator(bits)
    for address in addresses:
        key = address_key(seed, purpose, address)
        start["state"]["key"][:] = key & (2**64 - 1), key >> 64
        bits.state = start
        yield moved


def torch_generator(seed: int, purpose: str, *address: int | str) -> torch.Generator:
    """A CPU torch generator for one address."""
    return torch.Generator().manual_seed(address_key(seed, purpose, *address) % (1 << 63))
