"""Images: pre-training of a built-in image classifier on the digits that no client is given.

The foundation sees faded prints: ink at a part of its darkness. Clients' digits are at full contrast, so it knows what digits
look like and still has something to learn from the federation.

Shape suffixes: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification

from fedmoe_ds.config.foundation_section import PretrainConfig
from fedmoe_ds.data.digits import Images
from fedmoe_ds.foundation.builtin.loop import Progress, train_new
from fedmoe_ds.foundation.builtin.loop_state import TrainingState
from fedmoe_ds.foundation.builtin.presets import Preset

INK_SHARE = 0.6
"""Darkness of ink in pre-training, of full ink."""


def train_on_images(
    preset: Preset, config: PretrainConfig, seed: int, images: Images, progress: Progress, state: TrainingState
) -> tuple[list[Any], dict[str, Any]]:
    """Train the model; return it, to be saved in a folder, and the facts of its training."""
    pixels_NCHW, labels_N = faded(torch.from_numpy(images.pixels_NCHW)), torch.from_numpy(images.labels_N)
    progress(f"foundation: {len(images)} faded images")

    def batch_loss(model: Any, rows_B: Tensor) -> Tensor:
        loss: Tensor = model(pixel_values=pixels_NCHW[rows_B], labels=labels_N[rows_B]).loss
        return loss

    def create() -> Any:
        return AutoModelForImageClassification.from_config(preset.config(), trust_remote_code=False)

    model, losses = train_new(create, batch_loss, len(images), (1, "images"), config, seed, progress, state)
    return [model], {"images": len(images), "losses": losses}


def faded(pixels_NCHW: Tensor) -> Tensor:
    """Prints with less ink: values from -1 (paper) to 1 (ink) end at 2 * INK_SHARE - 1."""
    return (pixels_NCHW + 1) * INK_SHARE - 1
