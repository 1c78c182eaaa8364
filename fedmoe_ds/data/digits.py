"""Handwritten digits: the 1797 labelled 8x8 images that scikit-learn carries (a part of the UCI set "Optical Recognition
of Handwritten Digits", https://archive.ics.uci.edu/dataset/80), so that an image run needs no download either.

About a quarter of them is for pre-training the built-in image foundations, the rest is dealt to clients. An image's side
follows from its own pixels and from nothing else: no seed can let a foundation see a client's image.

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

NAME = "digits"
LABEL = "label"
SHAPE = (1, 8, 8)
CLASSES = 10
INK = 16
"""Largest grey value: a cell counts the inked pixels of a 4x4 block."""

# Changing salt or share moves images between pre-training and federation, hence every published digest.
SPLIT_SALT = "fedmoe_ds"
PRETRAIN_SHARE = 64 / 256


@dataclass(frozen=True)
class Images:
    """Labelled images: `pixels_NCHW` float32 in [-1, 1] (paper -1, ink 1), `labels_N` int64."""

    pixels_NCHW: NDArray[np.float32]
    labels_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels_N)

    def digest(self) -> str:
        """Return a sha256 over all pixels and labels."""
        # Shape first: equal bytes cut into other images must not hash alike. Fixed byte order: equal on any machine.
        content = hashlib.sha256(np.array(self.pixels_NCHW.shape, dtype="<i8").tobytes())
        content.update(self.pixels_NCHW.astype("<f4", copy=False).tobytes())
        content.update(self.labels_N.astype("<i8", copy=False).tobytes())
        return content.hexdigest()


def split() -> tuple[Images, Images]:
    """Return (pretraining, federated), each in scikit-learn's order; no image is in both, by the hash of its pixels."""
    return divided(*_load(), INK)


def divided(grey_NHW: NDArray[np.uint8], labels_N: NDArray[np.int64], ink: int) -> tuple[Images, Images]:
    """Return (pretraining, federated) of grey images whose darkest value is `ink`, in their order; see `split`."""
    salt = f"{SPLIT_SALT}:".encode()
    first_N = np.array([hashlib.sha256(salt + grey_HW.tobytes()).digest()[0] for grey_HW in grey_NHW])
    chosen_N = first_N < 256 * PRETRAIN_SHARE
    pixels_NCHW = (grey_NHW.astype(np.float32) * (2 / ink) - 1)[:, None]
    return Images(pixels_NCHW[chosen_N], labels_N[chosen_N]), Images(pixels_NCHW[~chosen_N], labels_N[~chosen_N])


@cache
def _load() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    # Imported late: only image runs need scikit-learn.
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.uint8), data.target.astype(np.int64)
