"""Packing workload: short samples of unequal lengths, which all systems train on step by step.

Legend: C clients, N steps, B samples per client and step, T token rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedmoe_ds.bench.harness.checks import check_least
from fedmoe_ds.bench.harness.shapes import Shape, check_positions
from fedmoe_ds.data import Sequences
from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import generator


@dataclass(frozen=True)
class PackingWorkload:
    """What is trained in a wave; the optimizer is AdamW without decay or clipping.

    Attributes:
        samples: of a client in a step.
        shortest, longest: tokens of a sample, both possible; lengths are drawn evenly between them.
        length: tokens of a full sequence, which micro-batches are sized for.
    """

    shape: Shape
    clients: int
    steps: int
    samples: int
    shortest: int
    longest: int
    length: int
    seed: int
    rank: int = 8
    lr: float = 1e-3

    def __post_init__(self) -> None:
        least = {"clients": 1, "steps": 1, "samples": 1, "shortest": 2, "longest": 2, "length": 8, "seed": 0}
        for name, smallest in least.items():
            check_least(f"--{name}", getattr(self, name), smallest)
        check_positions(self.length)
        for name, most in (("shortest", self.longest), ("longest", self.length)):
            if getattr(self, name) > most:
                raise UserError(f"--{name}: {getattr(self, name)}: use {most} or less")

    def lengths(self, client: int) -> np.ndarray:
        """int64 [N * B] of one client's samples."""
        draw = generator(self.seed, "bench-packing-lengths", client)
        return draw.integers(self.shortest, self.longest + 1, self.steps * self.samples)

    def sequences(self, client: int) -> Sequences:
        """One client's samples; the second half of each is predicted, as an answer is."""
        draw, lengths = generator(self.seed, "bench-packing-tokens", client), self.lengths(client)
        ids = [draw.integers(2, self.shape.vocab, length) for length in lengths]
        return Sequences(ids, [np.arange(length) >= length - length // 2 for length in lengths])

    @property
    def tokens(self) -> int:
        """Token rows of a wave, without padding."""
        return sum(int(self.lengths(client).sum()) for client in range(self.clients))

    def facts(self) -> dict[str, Any]:
        """What a row says about the work."""
        names = ("clients", "steps", "shortest", "longest", "length", "seed", "rank", "lr")
        wave = {"step_samples": self.samples, **{name: getattr(self, name) for name in names}}
        return {**wave, **self.shape.facts()}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> PackingWorkload:
        return cls(**{**tree, "shape": Shape(**tree["shape"])})
