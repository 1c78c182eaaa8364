"""Outline: a model without regard to its weights, which may be on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedmoe_ds.data import ImageInput, Task
from fedmoe_ds.foundation.autoep import HostedLayer
from fedmoe_ds.foundation.dense import FeedForwardSite, feed_forward_sites, image_input, type_task


@dataclass(frozen=True)
class Outline:
    """What of a model is known from its configuration.

    Attributes:
        model: the transformers model; its parameters may have no memory.
        layers: hosted mixture layers in depth order; empty for a dense model.
        sites: feed-forward blocks of a dense model in depth order; empty for a sparse one.
        images: of an image classifier, else None.
    """

    model: Any
    layers: list[HostedLayer]
    sites: list[FeedForwardSite]
    task: Task
    images: ImageInput | None


def outline(model: Any, layers: list[HostedLayer]) -> Outline:
    """The outline of a model whose mixture layers are hosted."""
    task = type_task(model.config.model_type)
    images = image_input(model.config) if task == "image_classification" else None
    return Outline(model, layers, [] if layers else feed_forward_sites(model), task, images)
