"""Low resolution: what clients and the hold-outs see is coarse; images of the public split keep their resolution.

FedMox (arXiv 2508.16568) has labelled images of high resolution at the server and unlabelled ones of low resolution at its
clients. Here 2x2 blocks of pixels become their mean, and the means are interpolated to the old size, so that one foundation
takes both.

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_form_section import DataFormConfig
from fedmoe_ds.data.dealing import SERVER
from fedmoe_ds.data.forms.form import Dealt, Formed


def low_resolution(dealt: Dealt, config: DataFormConfig) -> Formed:
    """Return all images but those of the public split at half their resolution; no draw is needed."""
    public_N111 = (dealt.client_N == SERVER)[:, None, None, None]
    return Formed(np.where(public_N111, dealt.pixels_NCHW, coarse(dealt.pixels_NCHW)))


def coarse(pixels_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return images of the same size made of the means of 2x2 blocks, bilinearly: those of constant images are themselves."""
    height, width = pixels_NCHW.shape[2:]
    # An odd last row or column is a block with itself.
    even_NCHW = np.pad(pixels_NCHW, ((0, 0), (0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    half = (*even_NCHW.shape[:2], -(-height // 2), 2, -(-width // 2), 2)
    mean_NCHW = even_NCHW.reshape(half).mean((3, 5), dtype=np.float32)
    found: NDArray[np.float32] = _doubled(_doubled(mean_NCHW, 2), 3)[:, :, :height, :width]
    return found


def _doubled(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Twice as many values along an axis, each three quarters of its own block and a quarter of the nearer neighbour."""
    ends = [(0, 0)] * values.ndim
    ends[axis] = (1, 1)
    padded, count = np.pad(values, ends, mode="edge"), values.shape[axis]
    before, after = (np.take(padded, range(first, first + count), axis) for first in (0, 2))
    # A quarter and three quarters are exact, so that equal neighbours leave a value as it is.
    pair = np.stack([np.float32(0.75) * values + np.float32(0.25) * other for other in (before, after)], axis + 1)
    shape = list(values.shape)
    shape[axis] *= 2
    return pair.reshape(shape)
