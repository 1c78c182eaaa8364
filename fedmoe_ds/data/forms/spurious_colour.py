"""Spurious colour: digits in an ink that agrees with their label for many images of every client, and for few of the hold-out.

An environment is a probability of agreement: client i is of environment i modulo how many there are, and has the same in its
own hold-out; the public split is of the first one. The global hold-out is an environment of its own, where the colour
misleads. What predicts the label in all of them is the shape. As in coloured MNIST (Arjovsky et al., arXiv 1907.02893), but for
the noise on labels, which a form cannot change.

Legend: N images, K colours, C = 3 channels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_form_section import DataFormConfig
from fedmoe_ds.data.dealing import NOBODY
from fedmoe_ds.data.forms.colours import CHANNELS, painted
from fedmoe_ds.data.forms.form import Dealt, Formed
from fedmoe_ds.randomness import generator

_PAPER = -0.6
_COLOURS = {"parity": 2, "class": 10}


def spurious_colour(dealt: Dealt, config: DataFormConfig) -> Formed:
    """Return the images in colour; the score is 1 where the colour agrees with the label, else 0."""
    agreement_K = np.array(config.agreement)
    mine_N = agreement_K[np.maximum(dealt.client_N, 0) % len(agreement_K)]
    wanted_N = np.where(dealt.client_N == NOBODY, config.holdout_agreement, mine_N)
    draw, count = generator(dealt.seed, "data-form-agreement"), _COLOURS[config.tied_to]
    agrees_N = draw.random(len(wanted_N)) < wanted_N
    # One of the others, each as likely.
    away_N = draw.integers(1, count, len(wanted_N))
    colour_N = (dealt.labels_N + np.where(agrees_N, 0, away_N)) % count
    paper_NC = np.full((len(wanted_N), CHANNELS), _PAPER, dtype=np.float32)
    return Formed(painted(dealt.pixels_NCHW[:, 0], inks(count)[colour_N], paper_NC), agrees_N.astype(np.float32))


def inks(count: int) -> NDArray[np.float32]:
    """Return [K, C]: light colours around the wheel of hues, as far from each other as can be."""
    turn_KC = np.arange(count)[:, None] / count - np.arange(CHANNELS) / CHANNELS
    ink_KC: NDArray[np.float32] = (0.6 + 0.4 * np.cos(2 * np.pi * turn_KC)).astype(np.float32)
    return ink_KC


def in_colour(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the shape of a painted image."""
    return CHANNELS, shape[1], shape[2]
