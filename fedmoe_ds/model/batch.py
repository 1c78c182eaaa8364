"""Batch: what a pass runs on, stacked and padded, with its targets: token sequences, or images with their classes.

Legend: B sequences or images, S positions (of an image: the class token and its patches), T = B * S rows as the blocks see
them, C channels, H height, W width, N targets, L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.data import ImageInput, Sequences
from fedmoe_ds.kernels.per_client import Segment
from fedmoe_ds.model.adapter_dropout import Address, Drawn
from fedmoe_ds.model.expert_masks import ExpertMasks, counts_of, stacked
from fedmoe_ds.model.packing import PackedSamples
from fedmoe_ds.model.router import Demand
from fedmoe_ds.model.upload import upload

CLASS_TOKEN = 0
"""Position of an image whose hidden state is read out."""


@dataclass(frozen=True)
class Rows:
    """Sequences, or images, of one client in a pass.

    Of `input_ids`/`loss_mask` and `pixels`/`labels`, one pair is in use. `positions` is what the blocks see per image.
    `members`: where several models of the client share the pass, the experts of each; its sequences, equally many, lie one
    member after the other, and `allowed_LE` is None.
    """

    slot: int
    cap: int
    input_ids: list[np.ndarray]
    loss_mask: list[np.ndarray]
    allowed_LE: np.ndarray | None = None
    pixels: np.ndarray | None = None  # float32 [B, C, H, W]
    labels: np.ndarray | None = None  # int64 [B]
    positions: int = 1
    drawn_at: Address | None = None  # where dropout draws; None outside training
    scores: np.ndarray | None = None  # float32 [B], of images whose form knows one
    members: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(
        cls,
        slot: int,
        cap: int,
        data: Sequences,
        chosen: Iterable[int],
        allowed_LE: np.ndarray | None = None,
        images: ImageInput | None = None,
        drawn_at: Address | None = None,
        view: int | None = None,
    ) -> Rows:
        """The samples `chosen` of an owner, whatever they are; `images` is the foundation's, None for text; `view`: the part of
        their channels that is read, None: all."""
        part = data.select(chosen)
        assert (part.labels is None) == (images is None), "data and foundation are checked to be of one task"
        positions = 1 if images is None else images.positions
        pixels = part.pixels if images is None or view is None else _seen(part.pixels, view, images)
        own = (part.input_ids, part.loss_mask, allowed_LE, pixels, part.labels)
        return cls(slot, cap, *own, positions, drawn_at, part.scores)

    @classmethod
    def fused(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of several members of one client, of the same samples, in one pass."""
        first = parts[0]
        ids, masks = ([each for part in parts for each in getattr(part, name)] for name in ("input_ids", "loss_mask"))
        given: dict[str, Any] = {"input_ids": ids, "loss_mask": masks, "allowed_LE": None}
        given["members"] = tuple(part.masks[0] for part in parts)
        for name in ("pixels", "labels", "scores"):
            own = [getattr(part, name) for part in parts]
            given[name] = None if own[0] is None else np.concatenate(own)
        return replace(first, **given)

    def __len__(self) -> int:
        return len(self.input_ids) if self.labels is None else len(self.labels)

    @property
    def masks(self) -> Sequence[np.ndarray | None]:
        """Of each of its members in the pass, the experts that their rows may be routed to, None for all."""
        return self.members or (self.allowed_LE,)

    @property
    def lengths(self) -> list[int]:
        """Rows of every sequence, or image."""
        return [len(ids) for ids in self.input_ids] if self.labels is None else [self.positions] * len(self.labels)

    @property
    def longest(self) -> int:
        """Rows of the longest sequence, or of an image."""
        return max((len(ids) for ids in self.input_ids), default=0) if self.labels is None else self.positions

    @property
    def targets_of_samples(self) -> list[int]:
        """Next tokens to be predicted, of every sequence; an image has one target."""
        return [int(mask.sum()) for mask in self.loss_mask] if self.labels is None else [1] * len(self.labels)

    @property
    def targets(self) -> int:
        """Of all samples."""
        return sum(self.targets_of_samples)

    @property
    def tokens(self) -> int:
        """Rows without padding that the blocks see: tokens, or images times positions."""
        return sum(len(ids) for ids in self.input_ids) if self.labels is None else len(self.labels) * self.positions


@dataclass(frozen=True)
class Batch:
    """One batch. Padding is on the right: causal attention never looks at it, and it is neither routed nor a target.

    Images need no padding; only the stand-in of an idle rank is not valid then. A packed batch needs none either: it is [T, 1],
    one sequence per token of its samples, and `packed` says which tokens are a sample.
    """

    input_ids: Tensor  # [B, S]; images: [B, 0]
    segments: list[Segment]
    slot_T: Tensor
    cap_T: Tensor
    valid_T: Tensor
    masks: ExpertMasks | None
    predict_N: Tensor  # int64 rows of the T whose hidden states predict a target (the next token, or the image's class)
    labels_N: Tensor  # those targets, in row order
    targets: list[int]  # per segment
    demands: list[Demand]  # per segment, and member of it
    pixels_BCHW: Tensor | None = None
    packed: PackedSamples | None = None
    drawn_at: list[Drawn] | None = None  # per segment; None outside training
    scores_T: Tensor | None = None  # float32, of every row its sample's; None where samples have none

    def predicting(self, hidden_BSD: Tensor) -> Tensor:
        """[N, D]: the hidden states that predict a target, in row order."""
        return hidden_BSD.flatten(0, 1).index_select(0, self.predict_N)


def make_batch(rows: list[Rows], device: torch.device, images: ImageInput | None = None, packing: bool = False) -> Batch:
    """Stack the rows of several clients; with none, a single padding token stands in, so that an idle rank still takes part.

    Args:
        images: the foundation's, None for text; the stand-in is then an empty image.
        packing: lay the sequences end to end; text only.
    """
    # The stand-in has nothing to pack.
    if packing and rows:
        return _pack_text(rows, device)
    return _stack_text(rows, device) if images is None else _stack_images(rows, device, images)


def _stack_text(rows: list[Rows], device: torch.device) -> Batch:
    ids = [seq for part in rows for seq in part.input_ids]
    masks = [mask for part in rows for mask in part.loss_mask]
    shape = (max(len(ids), 1), max((len(seq) for seq in ids), default=1))
    # With no rows, one token that is not valid: the pass then has a shape, and nothing of it is routed or predicted.
    input_ids, valid = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    predict = np.zeros(shape, dtype=bool)
    for b, (seq, mask) in enumerate(zip(ids, masks, strict=True)):
        input_ids[b, : len(seq)], valid[b, : len(seq)] = seq, True
        # The hidden state at s predicts token s + 1, so the mask of targets moves one to the left.
        predict[b, : len(seq) - 1] = mask[1:]
    # Sequence by sequence, then by position: the order of `predict` flattened.
    labels = np.concatenate([seq[1:][mask[1:]] for seq, mask in zip(ids, masks, strict=True)] or [np.zeros(0, np.int64)])
    return _batch(rows, device, input_ids, valid, predict, labels, None)


def _pack_text(rows: list[Rows], device: torch.device) -> Batch:
    ids = [seq for part in rows for seq in part.input_ids]
    masks = [mask for part in rows for mask in part.loss_mask]
    # As in `_stack_text`, sample by sample: a sample's last hidden state predicts nothing, not the token after it.
    predict = np.concatenate([np.append(mask[1:], False) for mask in masks])[:, None]
    labels = np.concatenate([seq[1:][mask[1:]] for seq, mask in zip(ids, masks, strict=True)])
    input_ids, packed = np.concatenate(ids)[:, None], PackedSamples.of([len(seq) for seq in ids], device)
    return _batch(rows, device, input_ids, np.ones_like(predict), predict, labels, None, packed)


def _stack_images(rows: list[Rows], device: torch.device, images: ImageInput) -> Batch:
    pixels = [part.pixels for part in rows if part.pixels is not None]
    labels = [part.labels for part in rows if part.labels is not None]
    assert len(pixels) == len(labels) == len(rows), "text in a pass of an image classifier"
    pixels_BCHW = np.concatenate(pixels or [np.zeros((1, *images.shape), dtype=np.float32)])
    assert pixels_BCHW.shape[1:] == images.shape, (pixels_BCHW.shape, images.shape)
    valid = np.full((len(pixels_BCHW), images.positions), bool(rows))
    predict = np.zeros_like(valid)
    # bool(rows) is False for the stand-in alone.
    predict[:, CLASS_TOKEN] = bool(rows)
    no_ids = np.zeros((len(pixels_BCHW), 0), dtype=np.int64)
    labels_N = np.concatenate(labels or [np.zeros(0, np.int64)])
    return _batch(rows, device, no_ids, valid, predict, labels_N, pixels_BCHW)


def _batch(
    rows: list[Rows],
    device: torch.device,
    input_ids: np.ndarray,
    valid: np.ndarray,
    predict: np.ndarray,
    labels: np.ndarray,
    pixels_BCHW: np.ndarray | None,
    packed: PackedSamples | None = None,
) -> Batch:
    counts = [len(part) if packed is None else part.tokens for part in rows]
    segments, slot, cap = _segments(rows, counts, valid.shape)
    # Where the mask is True and not the mask itself: to index by a mask, the host has to ask the device how many there are.
    arrays = [input_ids, slot, cap, valid.reshape(-1), predict.reshape(-1).nonzero()[0], labels]
    masks = [mask for part in rows for mask in part.masks]
    allowed = stacked(masks)
    # The mask is that of the client, or of one of its members, and each row says which one is its own.
    of_masks = [n * valid.shape[1] // len(part.masks) for n, part in zip(counts, rows, strict=True) for _ in part.masks]
    masked = [] if allowed is None else [allowed, np.repeat(np.arange(len(masks)), of_masks)]
    scores_T = _scores(rows, valid.shape)
    tensors = upload(arrays + masked + [array for array in (pixels_BCHW, scores_T) if array is not None], device)
    scored = None if scores_T is None else tensors.pop()
    pixels = None if pixels_BCHW is None else tensors.pop()
    allowing = ExpertMasks(tensors[6], tensors[7], counts_of(masks)) if masked else None
    ids, slot_T, cap_T, valid_T, predict_N, labels_N = tensors[:6]
    demands = [Demand(part.tokens // len(part.masks), part.cap) for part in rows for _ in part.masks]
    targets = [part.targets for part in rows]
    own = (slot_T, cap_T, valid_T, allowing, predict_N, labels_N)
    return Batch(ids, segments, *own, targets, demands, pixels, packed, _drawn(rows), scored)


def _scores(rows: list[Rows], shape: tuple[int, ...]) -> np.ndarray | None:
    """Float32 [T], of every row its sample's."""
    found = [part.scores for part in rows if part.scores is not None]
    assert len(found) in (0, len(rows)), "all clients of a pass have scores, or none"
    return np.concatenate(found).repeat(shape[1]) if found else None


def _seen(pixels_BCHW: np.ndarray | None, view: int, images: ImageInput) -> np.ndarray | None:
    """One view of images, which have them channel by channel, one after the other."""
    assert pixels_BCHW is not None, "text has no views"
    channels = images.shape[0]
    return pixels_BCHW[:, view * channels : (view + 1) * channels]


def _drawn(rows: list[Rows]) -> list[Drawn] | None:
    found = [Drawn(part.drawn_at, part.lengths) for part in rows if part.drawn_at is not None]
    assert len(found) in (0, len(rows)), "all clients of a pass train, or none"
    return found or None


def _segments(rows: list[Rows], counts: list[int], shape: tuple[int, ...]) -> tuple[list[Segment], np.ndarray, np.ndarray]:
    # Cap 1 for the stand-in: routing asks for 1 <= cap <= K.
    slot, cap = np.zeros(shape[0], dtype=np.int64), np.ones(shape[0], dtype=np.int64)
    segments, start = [], 0
    for part, count in zip(rows, counts, strict=True):
        stop = start + count
        segments.append(Segment(part.slot, start, stop, part.longest))
        slot[start:stop], cap[start:stop] = part.slot, part.cap
        start = stop
    return segments, slot.repeat(shape[1]), cap.repeat(shape[1])
