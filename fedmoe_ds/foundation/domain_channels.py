"""Domain channels: which channels of a feed-forward block serve every domain of a text, and which one of them alone.

Read-ME (arXiv 2410.19123) makes experts of a dense model by how large its activations are on texts of D domains. CODE: of every
domain the r F channels with the largest mean |a|; permanent are those that all domains have, an expert the rest of its
domain's. COMPLETION: widths that are equal in all layers and experts, since experts of one shape are one block here: permanent
are the P channels whose smallest mean over domains is largest, an expert the K channels with the largest mean among the others.
A channel may belong to several experts, as there.

Legend: D domains, L layers, F channels of a block, P permanent ones, K channels of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROW = 4
"""Channels of whole 16-byte rows, which bitwise mode needs."""


@dataclass(frozen=True)
class DomainChannels:
    """Numbers of channels, in rising order: `permanent_LP`, and `expert_DLK` of each domain."""

    permanent_LP: Tensor
    expert_DLK: Tensor

    def masks(self, channels: int) -> Tensor:
        """float32 [L, D, F]: 1 for the channels of an expert, without the permanent ones."""
        own_LDK = self.expert_DLK.transpose(0, 1)
        return torch.zeros(*own_LDK.shape[:2], channels).scatter_(2, own_LDK, 1.0)


def width(share: float, channels: int) -> int:
    """How many channels a share of them is, in whole rows; all of them are all of them."""
    return channels if share == 1 else ROW * round(share * channels / ROW)


def choose(mean_DLF: Tensor, permanent: int, expert: int) -> DomainChannels:
    """The channels by their mean |a| in every domain."""
    least_LF = mean_DLF.amin(0)
    permanent_LP = _largest(least_LF, permanent)
    # Means are not negative: what is permanent comes after everything else.
    left_DLF = mean_DLF.scatter(2, permanent_LP.expand(len(mean_DLF), -1, -1), -1.0)
    return DomainChannels(permanent_LP, _largest(left_DLF, expert))


def _largest(values: Tensor, count: int) -> Tensor:
    # A stable sort: of equal ones those that come first, on every machine.
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values
