"""Grey and colour: two views of a digit. One shows its shape, white on black; the other a blank in a colour of its class.

Every class has a hue of its own, evenly around the circle, and an image's colour is drawn about it: how far decides how much
the second view tells. The views share nothing but the class.

Legend: N images, H height, W width; 3: red, green, blue; 6: of the first view, then of the second.
"""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_form_section import DataFormConfig
from fedmoe_ds.data.digits import CLASSES
from fedmoe_ds.data.forms.colours import CHANNELS, painted
from fedmoe_ds.data.forms.form import Dealt, Formed, Shape
from fedmoe_ds.randomness import generator


def grey_and_colour(dealt: Dealt, config: DataFormConfig) -> Formed:
    """Return [N, 6, H, W]: the views of every image."""
    grey_NHW = dealt.pixels_NCHW[:, 0]
    white_N3 = np.ones((len(grey_NHW), CHANNELS), np.float32)
    shape_N3HW = painted(grey_NHW, white_N3, -white_N3)
    noise_N3 = generator(dealt.seed, "data-form-colour").standard_normal(white_N3.shape, dtype=np.float32)
    colour_N3 = np.clip(hues()[dealt.labels_N] + config.spread * noise_N3, -1, 1).astype(np.float32)
    # Ink and paper alike: nothing of the shape is left.
    blank_N3HW = painted(grey_NHW, colour_N3, colour_N3)
    return Formed(np.concatenate([shape_N3HW, blank_N3HW], 1))


def two_views(shape: Shape) -> Shape:
    """Return the [C, H, W] of both views of grey images of this shape."""
    return (2 * CHANNELS, *shape[1:])


def hues() -> NDArray[np.float32]:
    """Return [classes, 3]: the colour of each class."""
    rgb = [colorsys.hsv_to_rgb(place / CLASSES, 1.0, 1.0) for place in range(CLASSES)]
    return (2 * np.array(rgb) - 1).astype(np.float32)
