"""Parameters: how many numbers blocks have for one client on one rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedmoe_ds.model.adapter_bank import BlockSpec


def parameters_per_client(blocks: Sequence[BlockSpec], experts: int) -> tuple[int, int]:
    """(expert, dense) numbers of one client on one rank that holds `experts` experts."""
    # An expert's block is there once for every expert of the rank.
    expert = sum(len(b.layers) * experts * math.prod(b.item) for b in blocks if b.expert)
    dense = sum(len(b.layers) * math.prod(b.item) for b in blocks if not b.expert)
    return expert, dense
