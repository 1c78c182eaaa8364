"""Form: a pure function of dealt images. It knows whose an image is, and nothing of ranks.

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_form_section import DataFormConfig

Shape = tuple[int, int, int]
"""[C, H, W] of an image."""


@dataclass(frozen=True)
class Dealt:
    """Images whose client is known.

    Attributes:
        pixels_NCHW: float32 in [-1, 1], paper -1 and ink 1.
        labels_N: int64.
        client_N: int64, the place of an image's client in canonical order; `dealing.NOBODY` in the global hold-out,
            `dealing.SERVER` in the public split.
        clients: how many there are.
        seed: of the run. Draws are addressed by it and by an image's or a client's number.
    """

    pixels_NCHW: NDArray[np.float32]
    labels_N: NDArray[np.int64]
    client_N: NDArray[np.int64]
    clients: int
    seed: int


@dataclass(frozen=True)
class Formed:
    """What a form makes of dealt images, in their order; `scores_N`, float32, is what it knows about each of them."""

    pixels_NCHW: NDArray[np.float32]
    scores_N: NDArray[np.float32] | None = None


def _same(shape: Shape) -> Shape:
    return shape


@dataclass(frozen=True)
class Form:
    """One kind: what it makes of images, which [C, H, W] they have then (of several views the channels lie one view after the
    other), and whether it gives every image a score."""

    make: Callable[[Dealt, DataFormConfig], Formed]
    shape: Callable[[Shape], Shape] = _same
    scored: bool = False
    views: int = 1
