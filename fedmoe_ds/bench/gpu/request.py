"""Request: what a step of a visit is told, and how it tells what it finds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.harness.shapes import Shape, find_shape
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.kernels.lora_products import Kernels

_SMALL_SIDE, _SIDE = 256, 8192
_SMALL_LENGTH, _LENGTH = 24, 512
_LARGE_HIDDEN = 1024  # model width from which on a shape is one for a GPU


CORRECTNESS, QUICKSTART, WAVE, PROFILE = "correctness.xml", "quickstart", "gpu-wave-{tokens}.json", "profile-{kernels}.jsonl"
"""What steps leave in the folder of results."""


class WrongError(Exception):
    """What was found is not what it has to be."""


@dataclass(frozen=True)
class Request:
    """Of one step.

    Attributes:
        shape: of the model, by name.
        model: the folder of its weights, which the step `model` writes.
        output: the folder of the visit's results.
        seed: of the weights and of all data.
    """

    shape: str
    model: str
    output: str
    seed: int = 0

    @property
    def sizes(self) -> Shape:
        return find_shape(self.shape)

    @property
    def large(self) -> bool:
        """Whether the model is one for a GPU. A small one only goes through everything, and its figures mean nothing."""
        return self.sizes.hidden >= _LARGE_HIDDEN

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return _LENGTH if self.large else _SMALL_LENGTH

    @property
    def side(self) -> int:
        """Of the square factors of a large product."""
        return _SIDE if self.large else _SMALL_SIDE

    def folder(self) -> Path:
        """The model's. Raises WrongError where it has not been written."""
        found = Path(self.model)
        if not found.is_dir():
            raise WrongError("there is no model: its step has failed")
        return found

    def workload(self, sequences: int, kernels: Kernels = "auto", steps: int = 1) -> Workload:
        """The clients of the targets, with so many sequences each in a step."""
        settings: dict[str, Any] = {"dtype": "bfloat16", "device": "cuda", "kernels": kernels}
        return Workload(self.sizes, steps, sequences, self.length, self.seed, **settings)


@dataclass(frozen=True)
class Tell:
    """Takes facts, one JSON line each, as soon as they are known: a step that is ended keeps what it has told."""

    file: Path

    def __call__(self, **facts: Any) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def told(self) -> list[dict[str, Any]]:
        """All of it. A line that was being written when the step was ended is left out."""
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True) if self.file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]
