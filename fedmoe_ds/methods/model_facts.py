"""Model facts: what a method may ask about the model and the run, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedmoe_ds.config import LocalConfig


@dataclass(frozen=True)
class ModelFacts:
    """What a method may ask about the model and the run.

    `layers` are those with experts, `depth` counts all, and `expanded` are further layers, which clients train whole
    (`foundation.expand`).
    The head tells `classes` (of images, or tokens) apart, by features of this `width`. `sequences` are those of the client that
    has most to train on, `clients` all there are, `participants` those that a round draws; 1 until the data are known.
    `labelled`: whether clients know the labels of what they train on.
    """

    top_k: int
    num_experts: int
    rank: int
    seed: int
    renormalised: bool = False
    layers: tuple[int, ...] = ()
    local: LocalConfig = field(default_factory=LocalConfig)
    depth: int = 1
    classes: int = 0
    width: int = 0
    sequences: int = 1
    clients: int = 1
    participants: int = 1
    labelled: bool = True
    expanded: tuple[int, ...] = ()

    @property
    def experts_shape(self) -> tuple[int, int]:
        """[L, E]: of what is kept of every expert of every layer."""
        return len(self.layers), self.num_experts
