"""Flat buffer: sums that travel together lie together.

One allocation holds the tensors of all blocks, one after the other, so that a collective over all of them works in place:
nothing is packed before it and nothing is copied back after it. Dense blocks come first, because they travel once more than
the others: inside the cluster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe_ds.distributed.collectives import Summing
from fedmoe_ds.model.adapter_bank import BlockSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Flat:
    """Zeros for the blocks of a rank.

    Attributes:
        memory: [numbers], all of them.
        dense: [numbers of dense blocks], its beginning.
        parts: by block, its tensors: contiguous views of `memory`.
    """

    memory: Tensor
    dense: Tensor
    parts: dict[str, tuple[Tensor, ...]]

    @classmethod
    def zeros(
        cls, shapes: Sequence[tuple[BlockSpec, tuple[Shape, ...]]], dtype: torch.dtype, device: torch.device | None = None
    ) -> Flat:
        """Room for the tensors of each block, in this order within its kind."""
        # False sorts before True: dense blocks first. The sort is stable, so blocks of a kind keep their order on every rank.
        ordered = sorted(shapes, key=lambda pair: pair[0].expert)
        counts = [math.prod(shape) for _, each in ordered for shape in each]
        memory = torch.zeros(sum(counts), dtype=dtype, device=device)
        pieces = iter(torch.split(memory, counts))
        parts = {spec.name: tuple(next(pieces).view(shape) for shape in each) for spec, each in ordered}
        dense = sum(math.prod(shape) for spec, each in shapes if not spec.expert for shape in each)
        return cls(memory, memory[:dense], parts)

    def reduce(self, cluster: Summing, shard: Summing) -> None:
        """Dense sums meet inside the cluster, then ONE sum over the ranks with the same expert shard takes everything."""
        # A client's dense part is on its home rank alone, so the ranks of a cluster hold sums of different clients until they
        # meet here. Each then has its cluster's sum, and the second collective counts every cluster once.
        if self.dense.numel():
            cluster.sum(self.dense)
        if self.memory.numel():
            shard.sum(self.memory)

    def largest(self, cluster: Summing, shard: Summing) -> None:
        """As `reduce`, but the largest of each number instead of their sum."""
        if self.dense.numel():
            cluster.largest(self.dense)
        if self.memory.numel():
            shard.largest(self.memory)
