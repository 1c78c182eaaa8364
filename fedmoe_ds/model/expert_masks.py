"""Expert masks: which experts the rows of a pass may be routed to, client by client and layer by layer.

Legend: S segments of a pass (parts of clients, or of members of them), T token rows, L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fedmoe_ds.model.router import Demand


@dataclass(frozen=True)
class ExpertMasks:
    """Masks of one pass. One client with a mask gives every row one; rows of clients without allow all experts.

    Attributes:
        allowed_SLE: bool.
        part_T: int64, the segment that each row belongs to.
        counts_SL: how many experts each segment may use, None where it has no mask; the host knows it without a look at the
            device.
    """

    allowed_SLE: Tensor
    part_T: Tensor
    counts_SL: list[list[int] | None]

    def rows(self, place: int) -> Tensor:
        """Bool [T, E]: the masks of all rows in the layer at this place among those with experts."""
        # Made layer by layer: masks of all layers would take L times the rows.
        return self.allowed_SLE[:, place].index_select(0, self.part_T)

    def demands(self, place: int, demands: list[Demand]) -> list[Demand]:
        """What the rows ask of the router of that layer."""
        return [
            demand if counts_L is None else replace(demand, allowed=counts_L[place])
            for demand, counts_L in zip(demands, self.counts_SL, strict=True)
        ]


def stacked(masks: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Bool [S, L, E] of segments' masks; None where nobody has one."""
    shapes = {mask.shape for mask in masks if mask is not None}
    if not shapes:
        return None
    (shape,) = shapes
    return np.stack([np.ones(shape, dtype=bool) if mask is None else mask for mask in masks])


def counts_of(masks: Sequence[np.ndarray | None]) -> list[list[int] | None]:
    """How many experts each segment may use in every layer."""
    return [None if mask is None else mask.sum(1).tolist() for mask in masks]
