"""Traffic: bytes of adapters that a client receives before its training and sends after it, in float32.

What counts is what the method says travels: blocks that are averaged, with the LoRA rows that the client holds; both ways their
control variates under SCAFFOLD. Where the server moves products of LoRA pairs into the frozen weights, not the pairs but these
products come down, as factors: with FLoRA and FedEx-LoRA the stacks of a round, with FLoRIST the rows that the last round has
kept. A method's statistics come down with the adapters, and go up with a weight for each key. Of a client that sends only what
it changed most, each number comes up with its place in its tensor, where that is less than the whole tensor. What does not
count: the frozen model, which a client has, and what stays with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch import Tensor

from fedmoe_ds.aggregation.sparse_changes import INDEX_BYTES, kept_of
from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.model.adapter_bank import BlockSpec, shared_blocks

_BYTES = 4


@dataclass(frozen=True)
class Products:
    """What a round has moved into the frozen weights: rows of all factors A together, and numbers of all factors."""

    rows: int = 0
    numbers: int = 0

    @property
    def bytes(self) -> int:
        return _BYTES * self.numbers

    def plus(self, b_OQ: Tensor, a_QI: Tensor) -> Products:
        return Products(self.rows + len(a_QI), self.numbers + b_OQ.numel() + a_QI.numel())


class Traffic:
    """Of one run, in which `drawn` clients take part in a round.

    Attributes:
        products: numbers of the factors that come down to a client where LoRA pairs do not; None where they do. A method that
            chooses their rank sends nothing before the first round, and is told of every other.
    """

    def __init__(self, spec: RunSpec, clients: Sequence[Client], drawn: int) -> None:
        method = spec.method
        self._blocks = shared_blocks(spec.blocks) if method.averages else []
        self._experts = spec.expert_layout.num_experts
        self._keyed = list(method.statistics().values())
        # Changes of dual variables (FedVRA) follow from the adapters; SCAFFOLD's control variates travel both ways.
        self._variates = 2 if spec.config.local.drift == "scaffold" else 1
        # Of a round whose participants nobody knows yet: as many rows as clients have on average.
        rank = sum(client.rank for client in clients[:1000]) / len(clients[:1000])
        pairs = [block for block in self._blocks if block.rank_axis is not None]
        stacked = round(drawn * rank * sum(self._copies(b) * _length(b, 1) for b in pairs))
        self.products = None if not method.absorbs else 0 if method.chooses_rank else stacked

    def fields(self, assignment: Assignment, rank: int) -> dict[str, int]:
        """What a client's report says of it."""
        down, up = self.of(rank, assignment)
        return {"down_bytes": down, "up_bytes": up}

    def of(self, rank: int, assignment: Assignment | None = None) -> tuple[int, int]:
        """Bytes down and up of a client that holds so many LoRA rows, of all layers and experts unless it is told otherwise."""
        down = up = 0
        density = None if assignment is None else assignment.density
        for block in self._blocks:
            received, sent, length = self._received(block, assignment), self._sent(block, assignment), _length(block, rank)
            # A client that is not told of an expert can send nothing of it. Changes of control variates come up whole.
            up += min(received, sent) * (_sent_bytes(length, density) + (self._variates - 1) * _BYTES * length)
            if self.products is None or block.rank_axis is None:
                down += received * length
        down = self._variates * (down + (self.products or 0))
        numbers, keys = sum(map(math.prod, self._keyed)), sum(shape[0] for shape in self._keyed)
        return _BYTES * (down + numbers), up + _BYTES * (numbers + keys)

    def _copies(self, block: BlockSpec) -> int:
        return len(block.layers) * (self._experts if block.expert else 1)

    def _received(self, block: BlockSpec, assignment: Assignment | None) -> int:
        held_LE = None if assignment is None else assignment.held_LE
        return self._copies(block) if held_LE is None or not block.expert else int(held_LE.sum())

    def _sent(self, block: BlockSpec, assignment: Assignment | None) -> int:
        trained = None if assignment is None else assignment.trains(block)
        if trained is None:
            return self._copies(block)
        shape = (len(block.layers), self._experts) if block.expert else (len(block.layers),)
        return int(np.broadcast_to(trained, shape).sum())


def _sent_bytes(numbers: int, density: float | Fraction | None) -> int:
    """Of a tensor with so many numbers."""
    whole = _BYTES * numbers
    return whole if density is None else min(whole, (_BYTES + INDEX_BYTES) * kept_of(density, numbers))


def _length(block: BlockSpec, rank: int) -> int:
    """Numbers of one layer (and expert) of a block, of so many LoRA rows."""
    if block.rank_axis is None:
        return math.prod(block.item)
    # A's rows are as long as the other axis of its item, and so are B's columns.
    return rank * block.item[1 - block.rank_axis]
