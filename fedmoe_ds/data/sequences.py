"""Sequences: what one owner has, in memory or as views of a store, and the digest of what all owners have.

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.data.ragged import Ragged
from fedmoe_ds.distributed.stop_points import stop_point


@dataclass(frozen=True)
class Sequences:
    """What one owner has: variable-length token sequences, or labelled images. Views of a memory map are read-only.

    Text: `input_ids[i]` int64 [length_i], 2 <= length_i <= sequence_length. `loss_mask[i]` bool [length_i], True where the
    token at that position counts as a target, that is, the prediction of token j from the tokens before j; position 0
    never does.

    Images: `pixels` float32 [N, C, H, W] and `labels` int64 [N], both None for text; `input_ids` and `loss_mask` are empty
    then. An image is one sample with one target, its class. `scores` float32 [N] is what the data's form knows of each image
    (`data.forms`), None where it knows nothing.
    """

    input_ids: list[NDArray[np.int64]]
    loss_mask: list[NDArray[np.bool_]]
    pixels: NDArray[np.float32] | None = None
    labels: NDArray[np.int64] | None = None
    scores: NDArray[np.float32] | None = None

    @classmethod
    def of_images(
        cls, pixels_NCHW: NDArray[np.float32], labels_N: NDArray[np.int64], scores_N: NDArray[np.float32] | None = None
    ) -> Sequences:
        """Labelled images as an owner's samples."""
        assert pixels_NCHW.ndim == 4 and len(pixels_NCHW) == len(labels_N), (pixels_NCHW.shape, labels_N.shape)
        return cls([], [], pixels_NCHW, labels_N, scores_N)

    def __len__(self) -> int:
        return len(self.input_ids) if self.labels is None else len(self.labels)

    def select(self, rows: Iterable[int]) -> Sequences:
        """Return the sequences or images at `rows`, in that order."""
        chosen = [int(row) for row in rows]
        if self.pixels is not None and self.labels is not None:
            scores_N = None if self.scores is None else self.scores[chosen]
            return Sequences.of_images(self.pixels[chosen], self.labels[chosen], scores_N)
        return Sequences([self.input_ids[row] for row in chosen], [self.loss_mask[row] for row in chosen])

    def followed_by(self, other: Sequences) -> Sequences:
        """These sequences, and other ones behind them."""
        assert self.labels is None and other.labels is None, "images are never joined"
        return Sequences(self.input_ids + other.input_ids, self.loss_mask + other.loss_mask)

    def targets_N(self) -> NDArray[np.int64]:
        """Targets of every sequence, or image."""
        if self.labels is not None:
            return np.ones(len(self), np.int64)
        # Not `sum`: of a short mask that takes several times as long.
        return np.fromiter(map(np.count_nonzero, self.loss_mask), np.int64, len(self))

    def rows_N(self) -> NDArray[np.int64]:
        """Token rows of every sequence: its tokens; one of an image, whose positions are the foundation's to say."""
        if self.labels is not None:
            return np.ones(len(self), np.int64)
        return np.fromiter(map(len, self.input_ids), np.int64, len(self))

    def target_count(self) -> int:
        """Return the number of targets: of target tokens, or of images."""
        return int(self.targets_N().sum())

    def row_count(self) -> int:
        """Return the number of token rows, or of images."""
        return int(self.rows_N().sum())


def fingerprint(content: Sequences, owned: Ragged) -> str:
    """Return the sha256 over all tokens and targets, or pixels, labels and scores, owner by owner, whatever the file format.

    `owned` has the rows of `content` of each owner.
    """
    digest = hashlib.sha256()
    if content.pixels is not None and content.labels is not None:
        for own in owned:
            stop_point()
            pixels_NCHW = content.pixels[own]
            digest.update(np.array(pixels_NCHW.shape, dtype="<i8").tobytes())
            digest.update(pixels_NCHW.astype("<f4", copy=False).tobytes())
            digest.update(content.labels[own].astype("<i8", copy=False).tobytes())
            if content.scores is not None:
                digest.update(content.scores[own].astype("<f4", copy=False).tobytes())
        return digest.hexdigest()
    tokens, masks, rows = content.input_ids, content.loss_mask, owned.values_N.tolist()
    for start, end in owned.spans(range(len(owned))):
        stop_point()
        # Lengths first: the same tokens cut into other sequences are other data. Byte order and widths are fixed.
        digest.update(struct.pack(f"<{end - start + 1}q", end - start, *(len(tokens[row]) for row in rows[start:end])))
        for row in rows[start:end]:
            digest.update(np.ascontiguousarray(tokens[row], "<i8").data)
            digest.update(np.ascontiguousarray(masks[row]).data)
    return digest.hexdigest()
