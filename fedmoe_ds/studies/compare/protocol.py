"""Protocol: what a study fixes besides its base configuration: each method's own keys, and what is expected of them.

methods:
  flame-t0: {name: flame, set: {method.temperature: 0.0}}
  hetlora: {take: [adapters.rank]}
expectations:
  - {claim: flame < fedit, tiers: [1, 2], source: "arXiv ..., abstract"}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from fedmoe_ds.config.problems import explained, first_of
from fedmoe_ds.config.section import Section
from fedmoe_ds.config.yaml12 import parse_yaml
from fedmoe_ds.errors import UserError

Metric = Literal[
    "perplexity",
    "clients_perplexity",
    "accuracy",
    "mean_accuracy",
    "worst_accuracy",
    "accuracy_spread",
    "rounds",
    "virtual_time",
    "joules",
    "flops",
]
"""Figures after the last round; of accuracy over clients, each once, its mean, worst tenth and standard deviation; and what it
takes to get to a target: rounds, and time and energy of simulated devices or of a method that plans its energy."""
_OVER = ("perplexity", "rounds", "virtual_time", "joules")


class MethodEntry(Section):
    """How a label becomes a run; without an entry the label is the method's name and only its `method` section is its own."""

    name: str | None = Field(None, description="the method; default: the label")
    take: list[str] = Field(default_factory=list, description="further keys taken from the method's own file")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted key -> value")


class Expectation(Section):
    """A published ordering of two methods: the figure of `left` is below that of `right`."""

    claim: str = Field(description="left < right, two labels")
    metric: Metric = "perplexity"
    over: int = Field(
        1, ge=1, description="successive evaluations whose mean counts as one: the last of the run, or those up to a target"
    )
    tiers: list[int] = Field(min_length=1, description="the caps on top-k it speaks of")
    more_than_at: int | None = Field(None, description="expected is not the order but that it is clearer than at this tier")
    source: str = Field(min_length=1, description="who says so")

    @field_validator("claim")
    @classmethod
    def _is_an_order(cls, claim: str) -> str:
        if not re.fullmatch(r"[^\s<]+\s*<\s*[^\s<]+", claim.strip()):
            raise ValueError(f"{claim}: is no ordering; write left < right with two labels")
        return claim

    @model_validator(mode="after")
    def _has_evaluations(self) -> Expectation:
        if self.over > 1 and self.metric not in _OVER:
            raise ValueError(
                f"over: {self.over}: {self.metric} is of the last round alone; use 1, or one of {', '.join(_OVER)}"
            )
        return self

    @property
    def sides(self) -> tuple[str, str]:
        """(left, right)."""
        left, right = (side.strip() for side in self.claim.split("<"))
        return left, right


class Protocol(Section):
    """The whole file."""

    methods: dict[str, MethodEntry] = Field(default_factory=dict)
    expectations: Sequence[Expectation] = Field(default_factory=list)


def read_protocol(path: Path) -> Protocol:
    """Read a study file. Raises UserError, one line, for a missing or malformed file and for its first wrong key."""
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(f"--study: {path}: cannot be read: {reason}; give a YAML file with methods and expectations") from None
    try:
        # An empty file is a study without entries: all labels are methods, and nothing is expected.
        return Protocol.model_validate(raw or {})
    except ValidationError as error:
        raise UserError(f"--study: {path}: {first_of(explained(error, Protocol))}") from None
