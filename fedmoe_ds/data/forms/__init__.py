"""Forms of images: what becomes of an image set's pictures once it is known whose they are, before anybody sees them.

A kind is one file with a pure function; `data.form.kind` names it.
"""

from __future__ import annotations

from dataclasses import replace

from fedmoe_ds.config.data_form_section import DataFormConfig, Kind
from fedmoe_ds.data.forms.degraded import degraded
from fedmoe_ds.data.forms.form import Dealt, Form, Formed, Shape
from fedmoe_ds.data.forms.grey_and_colour import grey_and_colour, two_views
from fedmoe_ds.data.forms.low_resolution import low_resolution
from fedmoe_ds.data.forms.spurious_colour import in_colour, spurious_colour
from fedmoe_ds.data.sequences import Sequences

__all__ = ["FORMS", "Dealt", "Form", "Formed", "formed", "formed_shape", "has_scores", "seen_shape"]

FORMS: dict[Kind, Form] = {
    "plain": Form(lambda dealt, config: Formed(dealt.pixels_NCHW)),
    "degraded": Form(degraded, scored=True),
    "low-resolution": Form(low_resolution),
    "spurious-colour": Form(spurious_colour, in_colour, scored=True),
    "grey-and-colour": Form(grey_and_colour, two_views, views=2),
}


def formed(content: Sequences, dealt: Dealt, config: DataFormConfig) -> Sequences:
    """Return the images of `content` in their form; `dealt` says whose they are."""
    made = FORMS[config.kind].make(dealt, config)
    assert (made.scores_N is not None) == has_scores(config), config.kind
    assert made.pixels_NCHW.shape[1:] == formed_shape(config, dealt.pixels_NCHW.shape[1:]), made.pixels_NCHW.shape
    return replace(content, pixels=made.pixels_NCHW, scores=made.scores_N)


def has_scores(config: DataFormConfig) -> bool:
    """Return whether every image has a score in its form."""
    return FORMS[config.kind].scored


def formed_shape(config: DataFormConfig, shape: tuple[int, ...]) -> Shape:
    """Return the [C, H, W] that images of this shape have in their form."""
    channels, height, width = shape
    return FORMS[config.kind].shape((channels, height, width))


def seen_shape(config: DataFormConfig, shape: tuple[int, ...]) -> Shape:
    """Return the [C, H, W] that a foundation reads of them: of one view."""
    channels, height, width = formed_shape(config, shape)
    return (channels // FORMS[config.kind].views, height, width)
