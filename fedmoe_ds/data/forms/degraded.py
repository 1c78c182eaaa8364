"""Degraded images: blurred, then noisy, each by a severity in [0, 1] that is its score.

Clients differ: a client has a level of its own, and `skew` says how much of an image's severity that level is. An image of the
global hold-out, or of the public split, has one of its own, so the hold-out has all severities.

Legend: N images, K clients.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_form_section import DataFormConfig
from fedmoe_ds.data.forms.form import Dealt, Formed
from fedmoe_ds.randomness import generator


def degraded(dealt: Dealt, config: DataFormConfig) -> Formed:
    """Return the images with blur and noise in proportion to their severities; severity 0 leaves an image as it is."""
    # Imported late: only image runs need scipy.
    from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]

    severity_N = severities(dealt, config.skew)
    pixels_NCHW = dealt.pixels_NCHW.copy()
    for image_CHW, severity in zip(pixels_NCHW, severity_N.tolist(), strict=True):
        # Paper goes on beyond the edge. Channels are blurred each by itself.
        image_CHW[:] = gaussian_filter(image_CHW, (0, severity * config.blur, severity * config.blur), mode="nearest")
    noise_NCHW = generator(dealt.seed, "data-form-noise").standard_normal(pixels_NCHW.shape, dtype=np.float32)
    pixels_NCHW += noise_NCHW * (config.noise * severity_N)[:, None, None, None]
    return Formed(np.clip(pixels_NCHW, -1, 1), severity_N)


def severities(dealt: Dealt, skew: float) -> NDArray[np.float32]:
    """Return a severity per image: skew x its client's level + (1 - skew) x a draw of its own."""
    draw = generator(dealt.seed, "data-form-severity")
    own_N, nobodys_N = draw.random((2, len(dealt.labels_N)))
    # One level per client by number, so that another number of images changes none of them.
    level_K = generator(dealt.seed, "data-form-level").random(dealt.clients)
    level_N = np.where(dealt.client_N < 0, nobodys_N, level_K[np.maximum(dealt.client_N, 0)])
    severity_N: NDArray[np.float32] = (skew * level_N + (1 - skew) * own_N).astype(np.float32)
    return severity_N
