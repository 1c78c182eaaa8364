"""Averaged statistics: numbers that clients sum up beside their adapters, averaged key by key and delivered with these.

Legend: K keys of a statistic (classes, say), item the shape of what is averaged of one key.

Nobody trains a statistic, and the server's optimizer has no part in it. A client gives its own value and weight of every key;
the new value is the weighted mean, and a key whose weights sum to zero keeps what it has. The sums are those of the adapters'
means (`weighted_average.py`), with the keys in the place of the layers: a rank adds up the clients at home there, and no bit
depends on where that is. What nobody has had yet is zero, and is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.aggregation.weighted_average import Statistics
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

STATISTICS = "statistics"
"""Their name in the server's state."""
Summary = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""By statistic what one client has of it: its own value [K, *item], and the weight of every key [K], not negative."""


@dataclass(frozen=True)
class Statistic:
    """A statistic as clients receive it.

    Attributes:
        value: float32 [K, *item]; zero where it is not known.
        known: bool [K], the keys that any client has had by now.
    """

    value: Tensor
    known: Tensor


class AveragedStatistics:
    """Those of a run; the numbers themselves lie in the server's state.

    Args:
        shapes: names and shapes [K, *item]; none: nothing is kept, and nothing is summed.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        # One number per key is an item of one number: every block has an item.
        self.specs = [
            BlockSpec(name, tuple(range(keys)), tuple(item) or (1,), axis="keys") for name, (keys, *item) in shapes.items()
        ]
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}

    def banks(self, device: torch.device | None = None) -> dict[str, Bank]:
        """The values before the first round, and which of them are known: part of the state of a run."""
        known = [BlockSpec(_known(spec), spec.layers, (1,), axis=spec.axis) for spec in self.specs]
        return {STATISTICS: Bank([*self.specs, *known], 0, 1, device=device, with_grad=False)} if self.specs else {}

    def sums(self, exact: bool, device: torch.device | None = None) -> Statistics | None:
        """Empty sums for one round."""
        return Statistics(self.specs, 0, exact, device) if self.specs else None

    def add(self, sums: Statistics, summary: Summary) -> None:
        """Add what one client has, on its home rank alone."""
        device = sums.flat.memory.device
        for spec in self.specs:
            value, weight_K = summary[spec.name]
            shape = self._shapes[spec.name]
            assert (value.shape, weight_K.shape) == (shape, shape[:1]), f"{spec.name}: {value.shape}, {weight_K.shape}"
            # float32 is what travels.
            sent = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)).view(len(spec.layers), *spec.item)
            sums.add(spec.name, sent.to(device), weight_K)

    @torch.no_grad()
    def step(self, sums: Statistics, own: Mapping[str, Bank]) -> None:
        """Replace the values by the means of a round, whose `sums` have been reduced."""
        bank = own[STATISTICS]
        for name, mean in sums.average(bank).items():
            bank.client(name, 0).copy_(mean)
        for spec in self.specs:
            bank.client(_known(spec), 0)[:, 0].masked_fill_(sums.weight(spec.name) > 0, 1.0)

    def delivered(self, own: Mapping[str, Bank]) -> dict[str, Statistic]:
        """What clients of the next round receive."""
        return {
            spec.name: Statistic(
                own[STATISTICS].client(spec.name, 0).view(self._shapes[spec.name]),
                own[STATISTICS].client(_known(spec), 0)[:, 0] > 0,
            )
            for spec in self.specs
        }


def _known(spec: BlockSpec) -> str:
    return f"{spec.name}.known"
