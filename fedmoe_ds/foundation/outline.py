"""Outline: a model without regard to its weights, which may be on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedmoe_ds.config.foundation_section import ExpandConfig
from fedmoe_ds.data import ImageInput, Task
from fedmoe_ds.foundation.autoep import HostedLayer
from fedmoe_ds.foundation.dense import FeedForwardSite, feed_forward_sites, image_input, type_task
from fedmoe_ds.foundation.expansion import Expansion, expansion_of


@dataclass(frozen=True)
class Outline:
    """What of a model is known from its configuration.

    Attributes:
        model: the transformers model; its parameters may have no memory.
        layers: hosted mixture layers in depth order; empty for a dense model.
        sites: feed-forward blocks of a dense model in depth order; empty for a sparse one.
        images: of an image classifier, else None.
        expansion: where it has further layers, else None.
    """

    model: Any
    layers: list[HostedLayer]
    sites: list[FeedForwardSite]
    task: Task
    images: ImageInput | None
    expansion: Expansion | None = None


def outline(model: Any, layers: list[HostedLayer], asked: ExpandConfig | None = None) -> Outline:
    """The outline of a model whose mixture layers are hosted; `asked`: the further layers that it was built with."""
    task = type_task(model.config.model_type)
    images = image_input(model.config) if task == "image_classification" else None
    sites = [] if layers else feed_forward_sites(model)
    return Outline(model, layers, sites, task, images, expansion_of(model, asked))
