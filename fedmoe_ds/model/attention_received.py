"""Attention received: how much the tokens of a sequence look at each of its tokens, for methods that ask.

    a_t = sum over heads of  (1 / n) sum_q P[h, q, t]         P the attention weights of a sequence of n tokens

Attention kernels keep no weights, so they are computed once more, without a gradient, client by client at its own length: which
clients share a pass decides no bit of them.

Legend: B sequences, H heads, G heads of keys, S positions of the pass, K head width, T token rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmoe_ds.kernels.per_client import Segment


@torch.no_grad()
def received(
    query_BHSK: Tensor, key_BGSK: Tensor, valid_T: Tensor, segments: Sequence[Segment], scale: float | None, window: int | None
) -> Tensor:
    """float32 [T]: what every token row receives; zero in padding.

    Args:
        scale: on products of queries and keys; None: one over the root of their width.
        window: how many positions, its own among them, a token sees; None for all before it.
    """
    sequences, heads, positions, width = query_BHSK.shape
    valid_BS = valid_T.view(sequences, positions)
    found_BS = query_BHSK.new_zeros(sequences, positions, dtype=torch.float32)
    factor = width**-0.5 if scale is None else scale
    for segment in segments:
        own, length = slice(segment.start, segment.stop), min(segment.longest, positions)
        query, key = query_BHSK[own, :, :length].float(), key_BGSK[own, :, :length].float()
        # Heads of queries that share keys stand side by side.
        products = query @ key.repeat_interleave(heads // key.shape[1], dim=1).transpose(-1, -2)
        weights = (factor * products).masked_fill(~_seen(length, window, query.device), -torch.inf).softmax(-1)
        # Rows of padding look at tokens, too.
        looking = valid_BS[own, None, :length, None]
        columns = (weights * looking).sum(2).sum(1)
        found_BS[own, :length] = columns * valid_BS[own, :length] / looking.sum((1, 2, 3)).unsqueeze(1)
    return found_BS.flatten()


def _seen(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [S, S]: a position sees itself and those before it, as far as the window goes."""
    back = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return back >= 0 if window is None else (back >= 0) & (back < window)
