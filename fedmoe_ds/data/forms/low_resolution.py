"""Low resolution: what clients and the hold-outs see is coarse; images of the public split keep their resolution.

FedMox (arXiv 2508.16568) has labelled images of high resolution at the server and unlabelled ones of low resolution at its
clients. Here 2x2 blocks of pixels become their mean, and the mean four pixels again, so that one foundation takes both.

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_form_section import DataFormConfig
from fedmoe_ds.data.dealing import SERVER
from fedmoe_ds.data.forms.form import Dealt, Formed


def low_resolution(dealt: Dealt, config: DataFormConfig) -> Formed:
    """Return all images but those of the public split at half the resolution, upsampled; no draw is needed."""
    public_N111 = (dealt.client_N == SERVER)[:, None, None, None]
    return Formed(np.where(public_N111, dealt.pixels_NCHW, coarse(dealt.pixels_NCHW)))


def coarse(pixels_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean of every 2x2 block in the place of its four pixels; a last odd row or column stays as it is."""
    coarse_NCHW = pixels_NCHW.copy()
    height, width = (size // 2 * 2 for size in pixels_NCHW.shape[2:])
    even_NCHW = pixels_NCHW[:, :, :height, :width]
    mean_NCHW = even_NCHW.reshape(*even_NCHW.shape[:2], height // 2, 2, width // 2, 2).mean((3, 5), keepdims=True)
    blocks_NCHW = np.broadcast_to(mean_NCHW, (*even_NCHW.shape[:2], height // 2, 2, width // 2, 2))
    coarse_NCHW[:, :, :height, :width] = blocks_NCHW.reshape(even_NCHW.shape)
    return coarse_NCHW
