"""Packing: a pass whose samples lie end to end, without padding, and the way from there to every sample's own attention.

Legend: T token rows, P rows with every sample padded to a width, N samples of one width, S positions of a sample (its width),
H heads, K head width.

To the model a packed pass is T sequences of one token, [T, 1], each with its position in its sample: embeddings, norms,
products, routers and experts treat every row by itself and need to know no more. Attention alone looks from row to row, so
it gets the samples back, each as a sequence of its own.

How a kernel cuts its work depends on the length that it is given, and with it the last bits of a result. So a sample's width
follows from its own length and from nothing else: no neighbour changes its bits, whichever client it is of. Widths grow by
steps of a third to a half, so that few calls serve all samples and little of them is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.model.upload import upload

WIDTHS = np.array(sorted(base << power for power in range(40) for base in (16, 24)))
"""16, 24, 32, 48, 64, 96 and so on: no sample of more than 16 tokens is padded by more than half of its length."""


class _Apart(torch.autograd.Function):
    """Rows to their places among zeros; every place is taken once, so its gradient is a look-up."""

    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, place_T: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(place_T)
        return x_THK.new_zeros(rows, *x_THK.shape[1:]).index_copy_(0, place_T, x_THK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place_T,) = ctx.saved_tensors
        return grads[0].index_select(0, place_T), None, None


class _Together(torch.autograd.Function):
    """The way back: the rows of padding stay behind, and get no gradient."""

    @staticmethod
    def forward(ctx: Any, y_PHK: Tensor, place_T: Tensor) -> Tensor:
        ctx.save_for_backward(place_T)
        ctx.rows = len(y_PHK)
        return y_PHK.index_select(0, place_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Not index_select's own gradient, which adds row by row: here no two rows have one place.
        (place_T,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.rows, *grads[0].shape[1:]).index_copy_(0, place_T, grads[0]), None


@dataclass(frozen=True)
class PackedSamples:
    """Where the samples of a packed pass are.

    Attributes:
        position_T1: int64, of every token in its sample.
        place_T: int64, of every token among the P rows: the samples by width, those of one width in the order of the pass.
        groups: (N, S) of every width in use.
    """

    position_T1: Tensor
    place_T: Tensor
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedSamples:
        """Of samples with these lengths, laid end to end in this order."""
        tokens = np.array(lengths, dtype=np.int64)
        width = WIDTHS[np.searchsorted(WIDTHS, tokens)]
        # Stable: the samples of a width stay in the order of the pass.
        order = np.argsort(width, kind="stable")
        first = np.empty_like(tokens)
        first[order] = np.cumsum(width[order]) - width[order]
        position = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
        widths, counts = np.unique(width, return_counts=True)
        position_T1, place_T = upload([position[:, None], np.repeat(first, tokens) + position], device)
        return cls(position_T1, place_T, tuple(zip(counts.tolist(), widths.tolist(), strict=True)))

    def apart(self, heads_TH1K: Tensor) -> list[Tensor]:
        """Every width's samples, [N, H, S, K]; behind a sample's last token there are zeros."""
        sizes = [samples * width for samples, width in self.groups]
        rows_PHK: Tensor = _Apart.apply(heads_TH1K.squeeze(2), self.place_T, sum(sizes))  # type: ignore[no-untyped-call]
        # A split, not slices: the gradient of each slice would be a tensor of all P rows.
        parts = torch.split(rows_PHK, sizes)
        return [part.view(*group, *part.shape[1:]).transpose(1, 2) for part, group in zip(parts, self.groups, strict=True)]

    def together(self, found: list[Tensor]) -> Tensor:
        """[T, 1, H, K] of results [N, S, H, K] for every width."""
        y_PHK = torch.cat([y_NSHK.flatten(0, 1) for y_NSHK in found])
        y_THK: Tensor = _Together.apply(y_PHK, self.place_T)  # type: ignore[no-untyped-call]
        return y_THK.unsqueeze(1)
