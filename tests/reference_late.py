"""CC-FAO in plain float64, key by key: unequal steps from past adapters, a mean of gradients, a rate that falls with delays.

Keys are those of `reference_methods.py`, whose local training this is.
"""

from __future__ import annotations

from typing import Any

import torch
from reference import Adapters
from reference_methods import Late, Returned

from fedmoe_ds.randomness import generator


class CCFAO(Late):
    """x + the mean of changes over the rates of their steps; options: seed, most, threshold."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "delay": self.delay})

    def delay(self, index: int, round_index: int) -> int:
        drawn = generator(self.options["seed"], "cc-fao delay", round_index, index).integers(0, self.options["most"] + 1)
        return min(int(drawn), round_index - 1)

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        late = max(self.delay(one.task.index, len(self.history)) for one in returned)
        self.server.rate = 1.0 / late if late > self.options["threshold"] else 1.0
        for key, old in list(self.adapters.items()):
            gradients = [(one.received[key] - one.trained.adapters[key]) / one.trained.rates for one in returned]
            self.adapters[key] = self.server.step(key, old, old - torch.stack(gradients).mean(0))
        self.history.append(dict(self.adapters))

    def extras(self) -> dict[str, Adapters]:
        """The ring: at every place the newest adapters that belong there, but for the present ones."""
        places = [range(place, len(self.history) - 1, self.options["most"]) for place in range(self.options["most"])]
        return super().extras() | {f"past-{i}": self.history[max(rounds, default=0)] for i, rounds in enumerate(places)}
