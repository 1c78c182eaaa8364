"""Gloo control: the control plane over gloo, flat among few ranks, a tree of two levels among many.

gloo's gathers and sums go round a ring: as many hops as there are ranks. Among many ranks, blocks of neighbours (on a cluster:
mostly ranks of one host) meet first, then the blocks' heads, and each head tells its block. So a gather takes about twice the
square root of as many hops (`gather_hops`), and no group has more members than that, whatever the size of the world.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.control import Alone, Control

FLAT = 16
"""The largest world whose ranks are one group."""
_FIRST, _LENGTH = 256, 8
"""Bytes of the first message of a rank, and of its beginning that says how long the payload is: most payloads fit beside it."""
_made: Counter[str] = Counter()
"""Groups of this process by their members."""


class GlooControl(ABC):
    """Ranks that are members of gloo groups, this process's among them.

    Args:
        ranks: global ranks, ascending.
        timeout: of one collective.
    """

    def __init__(self, ranks: Sequence[int], name: str, timeout: timedelta) -> None:
        self.ranks, self.name, self.timeout = ranks, name, timeout
        self.rank, self.size = ranks.index(torch_dist.get_rank()), len(ranks)

    @abstractmethod
    def reduce(self, tensor: Tensor, operation: torch_dist.ReduceOp.RedOpType) -> Tensor:
        """One tensor of all of the ranks', in place on every rank."""

    def sum(self, total: Tensor) -> Tensor:
        with activity.collective("sum", self.name, total.nbytes):
            return self.reduce(total, torch_dist.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        with activity.collective("largest", self.name, values.nbytes):
            return self.reduce(values, torch_dist.ReduceOp.MAX)

    def split(self, ranks: Sequence[int], name: str) -> Control:
        return gloo_control([self.ranks[rank] for rank in ranks], name, self.timeout)


class FlatControl(GlooControl):
    """Over one gloo group."""

    def __init__(self, ranks: Sequence[int], name: str, timeout: timedelta) -> None:
        super().__init__(ranks, name, timeout)
        self.group = make_group(ranks, timeout)

    def gather(self, payload: bytes) -> list[bytes]:
        with activity.collective("gather", self.name, len(payload)):
            parts = [torch.empty(_FIRST, dtype=torch.uint8) for _ in range(self.size)]
            self.group.allgather([parts], [_first(payload)]).wait()
            sizes = [_length(part) for part in parts]
            if max(sizes) <= _FIRST - _LENGTH:
                return [_beside(part, size) for part, size in zip(parts, sizes, strict=True)]
            # Each in its own place, zeros elsewhere: the sum is all of them. A gather takes messages of one length, so every
            # rank's would be as long as the longest, which is mostly rank 0's alone.
            starts = [0, *itertools.accumulate(sizes)]
            everything = torch.zeros(starts[-1], dtype=torch.uint8)
            everything[starts[self.rank] : starts[self.rank + 1]] = _bytes(payload)
            self.group.allreduce([everything]).wait()
        whole = everything.numpy().tobytes()
        return [whole[start:stop] for start, stop in itertools.pairwise(starts)]

    def broadcast(self, payload: bytes) -> bytes:
        with activity.collective("broadcast", self.name, len(payload) if self.rank == 0 else 0):
            first = self.send_down(_first(payload if self.rank == 0 else b""))
            size = _length(first)
            if size <= _FIRST - _LENGTH:
                return _beside(first, size)
            rest = _bytes(payload) if self.rank == 0 else torch.empty(size, dtype=torch.uint8)
            return self.send_down(rest).numpy().tobytes()

    def reduce(self, tensor: Tensor, operation: torch_dist.ReduceOp.RedOpType) -> Tensor:
        self.group.allreduce([tensor], operation).wait()
        return tensor

    def send_down(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, in place on every rank."""
        self.group.broadcast(tensor, 0).wait()
        return tensor


class TreeControl(GlooControl):
    """Blocks of consecutive ranks, and their first ranks, the heads.

    Args:
        width: ranks of a block; the last one may have fewer.
    """

    def __init__(self, ranks: Sequence[int], name: str, timeout: timedelta, width: int) -> None:
        super().__init__(ranks, name, timeout)
        block, heads = tree_groups(self.rank, self.size, width)
        here = [ranks[rank] for rank in block]
        self.block = FlatControl(here, name, timeout) if len(here) > 1 else None
        self.heads = FlatControl([ranks[rank] for rank in heads], name, timeout) if heads else None

    def gather(self, payload: bytes) -> list[bytes]:
        with activity.collective("gather", self.name, len(payload)):
            ours = [payload] if self.block is None else self.block.gather(payload)
            everything = b"" if self.heads is None else b"".join(self.heads.gather(_pack(ours)))
            if self.block is not None:
                everything = self.block.broadcast(everything)
        return _unpack(everything)

    def broadcast(self, payload: bytes) -> bytes:
        with activity.collective("broadcast", self.name, len(payload) if self.rank == 0 else 0):
            if self.heads is not None:
                payload = self.heads.broadcast(payload)
            return payload if self.block is None else self.block.broadcast(payload)

    def reduce(self, tensor: Tensor, operation: torch_dist.ReduceOp.RedOpType) -> Tensor:
        for level in (self.block, self.heads):
            if level is not None:
                level.reduce(tensor, operation)
        return tensor if self.block is None else self.block.send_down(tensor)


def make_group(ranks: Sequence[int], timeout: timedelta) -> Any:
    """A gloo group of some global ranks, this one among them; every member calls it, and no other rank.

    Not the world's own group: that may be NCCL's, which carries no tensors of the CPU. Nor one of torch's `new_group`: either
    all ranks make all groups, and NCCL splits the world for each of them, or a group is named by how many groups a rank has,
    and heads of blocks have more than others.
    """
    world = torch_dist.distributed_c10d._get_default_store()
    members = ",".join(map(str, ranks))
    # All members have made the same number of groups of just these ranks.
    _made[members] += 1
    store = PrefixStore(f"control {_made[members]} of {members}", world)
    return torch_dist.ProcessGroupGloo(store, ranks.index(torch_dist.get_rank()), len(ranks), timeout)


def gloo_control(ranks: Sequence[int], name: str, timeout: timedelta, flat: int = FLAT) -> Control:
    """The communicator of some global ranks, ascending, this process's among them; up to `flat` of them are one group."""
    if len(ranks) == 1:
        return Alone()
    if len(ranks) <= flat:
        return FlatControl(ranks, name, timeout)
    return TreeControl(ranks, name, timeout, block_width(len(ranks)))


def block_width(size: int) -> int:
    """Ranks of a block: about as many as there are blocks, which makes the sum of both least."""
    return math.isqrt(size - 1) + 1


def gather_hops(size: int) -> int:
    """Messages one after another in a gather of so many ranks: a ring, or two and a broadcast within the block above `FLAT`."""
    if size <= FLAT:
        return size - 1
    others = block_width(size) - 1
    return 2 * others + others.bit_length()


def tree_groups(rank: int, size: int, width: int) -> tuple[range, range]:
    """The block of a rank, and the heads of all blocks where it is one of them."""
    first = rank // width * width
    block = range(first, min(first + width, size))
    return block, range(0, size, width) if rank == first else range(0)


def _first(payload: bytes) -> Tensor:
    """The first message of a payload: its length, and its first bytes."""
    begin = (len(payload).to_bytes(_LENGTH, "little") + payload[: _FIRST - _LENGTH]).ljust(_FIRST, b"\0")
    return _bytes(begin)


def _length(first: Tensor) -> int:
    return int.from_bytes(first[:_LENGTH].numpy().tobytes(), "little")


def _beside(first: Tensor, size: int) -> bytes:
    return first[_LENGTH : _LENGTH + size].numpy().tobytes()


def _bytes(payload: bytes) -> Tensor:
    # frombuffer wants writable memory, hence the copy, and refuses an empty buffer.
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)


def _pack(payloads: list[bytes]) -> bytes:
    """Several payloads as one: how many, their lengths, their bytes."""
    sizes = np.array([len(payloads), *map(len, payloads)], dtype="<i8")
    return sizes.tobytes() + b"".join(payloads)


def _unpack(packs: bytes) -> list[bytes]:
    """The payloads of packs that follow each other."""
    found, at = list[bytes](), 0
    while at < len(packs):
        (count,) = np.frombuffer(packs, "<i8", 1, at)
        sizes = np.frombuffer(packs, "<i8", int(count), at + 8).tolist()
        at += 8 * (1 + int(count))
        for size in sizes:
            found.append(packs[at : at + size])
            at += size
    return found
