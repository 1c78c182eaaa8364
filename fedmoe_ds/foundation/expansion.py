"""Expansion: where a dense decoder has more layers than its files, and what these begin as (block expansion, arXiv 2401.02415).

The L layers are cut into G equal groups, and after each comes one more layer: a copy of the group's last, with the output
projections of attention and of the feed-forward block zero. A layer that normalises first adds both to the residual stream, so
it is the identity then, and the model's logits are those of the original, bit for bit. The frozen model has no memory for these
layers: their weights are clients' (`model/client_layers.py`), and their first values are made of the layer before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedmoe_ds.config.foundation_section import ExpandConfig
from fedmoe_ds.errors import UserError

EXPANDABLE = ("llama", "mistral", "qwen3")
"""Model types whose layers normalise before attention and before the feed-forward block, by RMS norms with a weight each."""
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
"""What a layer adds to the residual stream comes out of these."""
_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Expansion:
    """Of a model with so many layers of its own; `blocks` divides `depth`."""

    depth: int
    blocks: int

    @property
    def group(self) -> int:
        """Layers of a group."""
        return self.depth // self.blocks

    @property
    def layers(self) -> tuple[int, ...]:
        """The further layers, as the expanded model counts."""
        return tuple((self.group + 1) * (block + 1) - 1 for block in range(self.blocks))

    def original(self, layer: int) -> int:
        """Which layer of the files one is, or is a copy of."""
        block, place = divmod(layer, self.group + 1)
        return block * self.group + min(place, self.group - 1)

    def holds(self, name: str) -> bool:
        """Whether a tensor of the expanded model belongs to a further layer."""
        found = _LAYER.fullmatch(name)
        return found is not None and int(found[2]) in self.layers

    def source(self, name: str) -> str:
        """What a tensor of the expanded model is called in the files."""
        found = _LAYER.fullmatch(name)
        return name if found is None else f"{found[1]}{self.original(int(found[2]))}{found[3]}"

    def placed(self, name: str) -> str:
        """What a tensor of the files is called in the expanded model."""
        found = _LAYER.fullmatch(name)
        return name if found is None else f"{found[1]}{int(found[2]) + int(found[2]) // self.group}{found[3]}"

    def widened(self, kinds: list[Any]) -> list[Any]:
        """Something said of every layer of the files, said of every layer of the expanded model."""
        return [kinds[self.original(layer)] for layer in range(self.depth + self.blocks)]

    def weights(self, model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(path within a layer, shape) of what a further layer consists of."""
        for path, parameter in model.base_model.layers[self.layers[0]].named_parameters():
            yield path.removesuffix(".weight"), tuple(parameter.shape)


def expand(config: Any, asked: ExpandConfig, where: str) -> Expansion:
    """Make a model's configuration that of the expanded model.

    Raises:
        UserError: its layers cannot be the identity, or are not divided by the number of blocks.
    """
    if config.model_type not in EXPANDABLE:
        raise UserError(
            f"foundation.expand: {where}: layers of '{config.model_type}' are not the identity where their outputs are zero, "
            f"or have more than matrices and RMS norms; use a dense model of {', '.join(EXPANDABLE)}"
        )
    found = Expansion(config.num_hidden_layers, asked.blocks)
    if found.depth % found.blocks:
        raise UserError(
            f"foundation.expand.blocks: {found.blocks}: does not divide the {found.depth} layers into equal groups; use another"
        )
    config.num_hidden_layers = found.depth + found.blocks
    if getattr(config, "layer_types", None):
        config.layer_types = found.widened(config.layer_types)
    return found


def expansion_of(model: Any, asked: ExpandConfig | None) -> Expansion | None:
    """That of a model which was built so."""
    return None if asked is None else Expansion(model.config.num_hidden_layers - asked.blocks, asked.blocks)


def check_parts(model: nn.Module, where: str) -> None:
    """Raise UserError where layers have biases."""
    if any(name.endswith(".bias") and _LAYER.fullmatch(name) for name, _ in model.named_parameters()):
        raise UserError(f"foundation.expand: {where}: its layers have biases, which no client trains; use a model without")
