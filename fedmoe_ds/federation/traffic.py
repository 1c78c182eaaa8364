"""Traffic: bytes of adapters that a client receives before its training and sends after it, in float32.

What counts is what the method says travels: blocks that are averaged, with the LoRA rows that the client holds; both ways their
control variates under SCAFFOLD; with FLoRA, whose server adds the stacked factors of a round to the frozen weights, these
factors on the way down. What does not count: the frozen model, which a client has, and what stays with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.model.adapter_bank import shared_blocks

_BYTES = 4


class Traffic:
    """Of one run, in which `drawn` clients take part in a round."""

    def __init__(self, spec: RunSpec, clients: Sequence[Client], drawn: int) -> None:
        experts, method = spec.expert_layout.num_experts, spec.method
        per_row, whole = 0, 0
        for block in shared_blocks(spec.blocks):
            copies = len(block.layers) * (experts if block.expert else 1)
            if block.rank_axis is None:
                whole += copies * math.prod(block.item)
            else:
                # A's rows are as long as the other axis of its item, and so are B's columns.
                per_row += copies * block.item[1 - block.rank_axis]
        variates = 2 if spec.config.local.drift == "scaffold" else 1
        self._row, self._whole = _BYTES * variates * per_row, _BYTES * variates * whole
        self._averages = method.averages
        # Of a round whose participants nobody knows yet: as many rows as clients have on average.
        mean = sum(client.rank for client in clients[:1000]) / len(clients[:1000])
        self._stacked = round(drawn * mean * _BYTES * per_row) if method.absorbs else None

    def fields(self, assignment: Assignment, rank: int) -> dict[str, int]:
        """What a client's report says of it."""
        down, up = self.of(rank)
        return {"down_bytes": down, "up_bytes": up}

    def of(self, rank: int) -> tuple[int, int]:
        """Bytes down and up of a client that holds so many LoRA rows."""
        if not self._averages:
            return 0, 0
        own = self._whole + rank * self._row
        return (own if self._stacked is None else self._whole + self._stacked), own
