"""Scale factors: what multiplies alpha / rank for each client of a wave, where a method wants clients to differ.

Legend: E experts, C client slots, G groups of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ScaleFactors:
    """One factor per client slot, for the time of a wave.

    Attributes:
        each: by slot.
    """

    each: list[float]
    _placed: dict[tuple[float, int, torch.device], Tensor] = field(default_factory=dict)

    def of_groups(self, scale: float, experts: int, device: torch.device) -> Tensor:
        """float32 [E x C]: `scale` times the factor of each group; groups are experts x clients, in that order."""
        key = (scale, experts, device)
        if key not in self._placed:
            # Uploaded once per wave: every product of every layer asks.
            factors_C = torch.tensor(self.each, device=device)
            self._placed[key] = factors_C.repeat(experts) * scale
        return self._placed[key]
