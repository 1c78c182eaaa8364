"""Groups: contiguous groups of rows, as grouped products take them, and what follows from where they end.

Legend: N rows, G groups.

A plan has its groups made once, and all products over them share what they need to know: forward, backward, frozen weights and
adapters. Nothing is computed before a product asks for it: kernels that read the ends alone cost nothing more. Only `bounds`
waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Scale = float | Tensor
"""One number for all rows, or float32 [G]: one for the rows of each group."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups that cover all rows of a tensor, one after the other.

    Attributes:
        ends_G: int32, each group's end row, on the device of the rows.
        rows: of all groups: the last end, as the host knows it.
    """

    ends_G: Tensor
    rows: int
    _bounds: dict[int, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.ends_G.shape[0]

    @cached_property
    def rows_G(self) -> Tensor:
        """int32: rows of each group."""
        return torch.diff(self.ends_G, prepend=self.ends_G.new_zeros(1))

    @cached_property
    def empty_G(self) -> Tensor:
        """bool: groups without rows."""
        return self.rows_G == 0

    @cached_property
    def group_N(self) -> Tensor:
        """int32: the group of each row."""
        places_G = torch.arange(len(self), dtype=torch.int32, device=self.ends_G.device)
        # Without the number of rows it would be fetched from the device.
        return places_G.repeat_interleave(self.rows_G, output_size=self.rows)

    def spread(self, each_G: Tensor) -> Tensor:
        """[N]: for each row what its group has."""
        return each_G.index_select(0, self.group_N)

    def chunks(self, most: int) -> Iterator[tuple[slice, slice]]:
        """(groups, their rows) of every chunk of `most` groups that has rows.

        Rows are cut on the host, so the first call waits for the device; calls after it, of this plan, do not.
        """
        start = 0
        for first, stop in zip(range(0, len(self), most), self.bounds(most), strict=True):
            if stop > start:
                yield slice(first, first + most), slice(start, stop)
            start = stop

    def bounds(self, most: int) -> list[int]:
        """The end row of every chunk of `most` groups, on the host."""
        if most not in self._bounds:
            # One transfer for all chunks: only the last end of each decides where rows are cut.
            before_last = self.ends_G[most - 1 : max(len(self) - 1, 0) : most]
            self._bounds[most] = torch.cat([before_last, self.ends_G[-1:]]).tolist()
        return self._bounds[most]
