"""Colours: grey digits painted with an ink and on a paper of some colour, three channels.

Legend: N images, H height, W width; 3: red, green, blue.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.data.digits import Images
from fedmoe_ds.randomness import generator

CHANNELS = 3


def painted(grey_NHW: NDArray[np.float32], ink_N3: NDArray[np.float32], paper_N3: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return [N, 3, H, W]: where grey is 1 an image's ink, where it is -1 its paper, and between them in proportion.

    All values are in [-1, 1]. White ink on black paper is the grey image three times.
    """
    share_N1HW = (grey_NHW[:, None] + 1) / 2
    ink_N311, paper_N311 = ink_N3[:, :, None, None], paper_N3[:, :, None, None]
    return (paper_N311 + (ink_N311 - paper_N311) * share_N1HW).astype(np.float32)


def in_any_colours(images: Images, seed: int) -> Images:
    """Return grey images in drawn colours, a light ink on a dark paper: what a foundation that sees colours is trained on."""
    draw = generator(seed, "any-colours")
    size = (len(images), CHANNELS)
    # Apart, so that every digit can be read: ink above, paper below.
    ink_N3, paper_N3 = draw.uniform(0.2, 1, size), draw.uniform(-1, -0.2, size)
    painted_N3HW = painted(images.pixels_NCHW[:, 0], ink_N3.astype(np.float32), paper_N3.astype(np.float32))
    return Images(painted_N3HW, images.labels_N)
