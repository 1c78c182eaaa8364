"""Traffic: bytes of adapters that a client receives before its training and sends after it, in float32.

What counts is what the method says travels: blocks that are averaged, with the LoRA rows that the client holds; both ways their
control variates under SCAFFOLD; with FLoRA, whose server adds the stacked factors of a round to the frozen weights, these
factors on the way down. What does not count: the frozen model, which a client has, and what stays with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.model.adapter_bank import BlockSpec, shared_blocks

_BYTES = 4


class Traffic:
    """Of one run, in which `drawn` clients take part in a round."""

    def __init__(self, spec: RunSpec, clients: Sequence[Client], drawn: int) -> None:
        method = spec.method
        self._blocks = shared_blocks(spec.blocks) if method.averages else []
        self._experts = spec.expert_layout.num_experts
        self._variates = 2 if spec.config.local.drift == "scaffold" else 1
        # Of a round whose participants nobody knows yet: as many rows as clients have on average.
        rank = sum(client.rank for client in clients[:1000]) / len(clients[:1000])
        pairs = [block for block in self._blocks if block.rank_axis is not None]
        self._stacked = round(drawn * rank * sum(self._copies(b) * _length(b, 1) for b in pairs)) if method.absorbs else None

    def fields(self, assignment: Assignment, rank: int) -> dict[str, int]:
        """What a client's report says of it."""
        down, up = self.of(rank, assignment)
        return {"down_bytes": down, "up_bytes": up}

    def of(self, rank: int, assignment: Assignment | None = None) -> tuple[int, int]:
        """Bytes down and up of a client that holds so many LoRA rows, of all layers and experts unless it is told otherwise."""
        down = up = 0
        for block in self._blocks:
            received, sent = self._received(block, assignment), self._sent(block, assignment)
            # A client that is not told of an expert can send nothing of it.
            down, up = down + received * _length(block, rank), up + min(received, sent) * _length(block, rank)
        if self._stacked is not None:
            down = self._stacked
        return _BYTES * self._variates * down, _BYTES * self._variates * up

    def _copies(self, block: BlockSpec) -> int:
        return len(block.layers) * (self._experts if block.expert else 1)

    def _received(self, block: BlockSpec, assignment: Assignment | None) -> int:
        if assignment is None or assignment.allowed_LE is None or not block.expert:
            return self._copies(block)
        return int(assignment.allowed_LE.sum())

    def _sent(self, block: BlockSpec, assignment: Assignment | None) -> int:
        trained = None if assignment is None else assignment.trains(block)
        if trained is None:
            return self._copies(block)
        shape = (len(block.layers), self._experts) if block.expert else (len(block.layers),)
        return int(np.broadcast_to(trained, shape).sum())


def _length(block: BlockSpec, rank: int) -> int:
    """Numbers of one layer (and expert) of a block, of so many LoRA rows."""
    if block.rank_axis is None:
        return math.prod(block.item)
    # A's rows are as long as the other axis of its item, and so are B's columns.
    return rank * block.item[1 - block.rank_axis]
