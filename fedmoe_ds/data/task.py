"""Task: what a foundation predicts, and which data sources serve it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.data import digits
from fedmoe_ds.data.forms import seen_shape
from fedmoe_ds.data.forms.colours import CHANNELS
from fedmoe_ds.data.forms.form import Shape
from fedmoe_ds.data.mnist import IMAGE_SETS, ImageSet
from fedmoe_ds.errors import UserError

Task = Literal["causal_lm", "image_classification"]


@dataclass(frozen=True)
class ImageInput:
    """What an image classifier takes and gives.

    `positions` is the number of rows its blocks see per image: one per patch, and one for the class token.
    """

    channels: int
    height: int
    width: int
    classes: int
    positions: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one image."""
        return (self.channels, self.height, self.width)


def source_task(config: DataConfig) -> Task:
    """The task that `data.source` serves; every source but the image sets is text."""
    return "image_classification" if isinstance(config.source, str) and config.source in IMAGE_SETS else "causal_lm"


def check_task(task: Task, config: DataConfig, images: ImageInput | None = None) -> None:
    """Refuse data that the foundation cannot read; nothing is opened for it.

    Args:
        task: what the foundation is.
        images: where known, what it takes; compared with the source's images.

    Raises:
        UserError: text for an image classifier, images for a language model, images of another size or with other
            classes, or settings that only text has.
    """
    source = f"data.source: {config.source}"
    if task == "causal_lm" and source_task(config) != task:
        raise UserError(
            f"{source}: labelled images, and the foundation is a causal language model; "
            f"use foundation.preset={IMAGE_SETS[str(config.source)].preset} or a text source"
        )
    # Text has no size to compare, and of the settings of images the form alone.
    if task == "causal_lm":
        if config.form.kind != "plain":
            raise UserError(f"data.form.kind: {config.form.kind}: for images only, and {source} is text; drop the key")
        if config.labels != "shown":
            raise UserError(
                f"data.labels: {config.labels}: the labels of text are its own tokens, and {source} is text; drop the key"
            )
        return
    if source_task(config) != task:
        raise UserError(
            f"{source}: plain text, and the foundation is an image classifier, which needs labelled images; "
            f"use data.source={' or '.join(IMAGE_SETS)}, or a language model"
        )
    _refuse_text_settings(config)
    given = IMAGE_SETS[str(config.source)]
    shape = seen_shape(config.form, given.shape)
    if images is not None and (images.shape, images.classes) != (shape, given.classes):
        raise UserError(
            f"{source}: images [channels, height, width] {list(shape)} in {given.classes} classes, and the "
            f"foundation takes {list(images.shape)} in {images.classes}; use {_fitting(shape, given)} of this size"
        )


def _fitting(shape: Shape, given: ImageSet) -> str:
    name = {given.shape: given.preset, (CHANNELS, *given.shape[1:]): given.colour_preset}.get(shape)
    return "a model" if name is None else f"foundation.preset={name} or a model"


def _refuse_text_settings(config: DataConfig) -> None:
    """Refuse keys that only text has: an image set has its labels and nothing to tokenise, so they would have no effect."""
    plain = DataConfig()
    # Saved configurations of earlier versions say `text`, which was the default.
    legal = {"template": ("auto", "text")}
    keys = ("template", "prompt", "chat_template", "columns", "label_names", "separator", "encoding", "validation", "split")
    for name in keys:
        if (value := getattr(config, name)) not in legal.get(name, (getattr(plain, name),)):
            raise UserError(f"data.{name}: {value}: for text only, and data.source is '{config.source}'; drop the key")
    column = config.partition.column
    if column not in (None, digits.LABEL):
        raise UserError(
            f"data.partition.column: {column}: no such column; data.source={config.source} has '{digits.LABEL}' only; "
            "drop the key"
        )
