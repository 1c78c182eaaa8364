"""Batch: token rows of one pass, padded, with their targets.

Legend: B sequences, S positions, T = B * S token rows, N target tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.adapters.segmented import Segment


@dataclass(frozen=True)
class Rows:
    """Sequences of one client in a pass."""

    slot: int
    cap: int
    input_ids: list[np.ndarray]
    loss_mask: list[np.ndarray]
    allowed_E: Tensor | None = None

    @property
    def targets(self) -> int:
        return int(sum(int(mask.sum()) for mask in self.loss_mask))

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.input_ids)


@dataclass(frozen=True)
class Batch:
    """One padded batch. Padding is on the right: causal attention never looks at it, and it is neither routed nor a target."""

    input_ids: Tensor  # [B, S]
    segments: list[Segment]
    slot_T: Tensor
    cap_T: Tensor
    valid_T: Tensor
    allowed_TE: Tensor | None
    predict_BS: Tensor  # bool: the hidden state at this position predicts a target (the next token)
    labels_N: Tensor  # those targets, in row order
    targets: list[int]  # per segment


def make_batch(rows: list[Rows], num_experts: int, device: torch.device) -> Batch:
    """Stack the rows of several clients; with none, a single padding token stands in, so that an idle rank still takes part."""
    ids = [seq for part in rows for seq in part.input_ids]
    masks = [mask for part in rows for mask in part.loss_mask]
    shape = (max(len(ids), 1), max((len(seq) for seq in ids), default=1))
    input_ids, valid = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    predict = np.zeros(shape, dtype=bool)
    for b, (seq, mask) in enumerate(zip(ids, masks, strict=True)):
        input_ids[b, : len(seq)], valid[b, : len(seq)] = seq, True
        predict[b, : len(seq) - 1] = mask[1:]
    labels = np.concatenate([seq[1:][mask[1:]] for seq, mask in zip(ids, masks, strict=True)] or [np.zeros(0, np.int64)])
    segments, slot, cap = _segments(rows, shape)
    allowed = None
    if any(part.allowed_E is not None for part in rows):
        everyone = torch.ones(num_experts, dtype=torch.bool)
        per_part = [part.allowed_E if part.allowed_E is not None else everyone for part in rows]
        repeats = torch.tensor([len(part.input_ids) * shape[1] for part in rows])
        allowed = torch.stack(per_part).repeat_interleave(repeats, 0).to(device)
    return Batch(
        torch.from_numpy(input_ids).to(device),
        segments,
        torch.from_numpy(slot).to(device),
        torch.from_numpy(cap).to(device),
        torch.from_numpy(valid.reshape(-1)).to(device),
        allowed,
        torch.from_numpy(predict).to(device),
        torch.from_numpy(labels).to(device),
        [part.targets for part in rows],
    )


def _segments(rows: list[Rows], shape: tuple[int, int]) -> tuple[list[Segment], np.ndarray, np.ndarray]:
    slot, cap = np.zeros(shape[0], dtype=np.int64), np.ones(shape[0], dtype=np.int64)
    segments, start = [], 0
    for part in rows:
        stop = start + len(part.input_ids)
        segments.append(Segment(part.slot, start, stop))
        slot[start:stop], cap[start:stop] = part.slot, part.cap
        start = stop
    return segments, slot.repeat(shape[1]), cap.repeat(shape[1])
