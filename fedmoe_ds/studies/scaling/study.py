"""Study: the file that says what is varied, over which values, and what grows with it.

base: base.yaml            # a run configuration, looked up beside the study file
scaling: weak
axis: ranks
values: [1, 2, 4]
repeats: 5
grows: {data.partition.clients: 4}
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from fedmoe_ds.config.problems import explained, first_of, shown
from fedmoe_ds.config.section import Section
from fedmoe_ds.config.yaml12 import parse_yaml
from fedmoe_ds.errors import UserError

Axis = Literal["ranks", "ep_size", "clients", "experts", "k"]
KEYS: dict[str, str] = {
    "ep_size": "topology.ep_size",
    "clients": "data.partition.clients",
    "experts": "adapters.moe.experts",
    "k": "federation.tiers",
}
"""The key that an axis sets; ranks are no key but the size of the world."""


class Study(Section):
    """The whole file; `name` is set from the file's name unless it is given."""

    name: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", description="default: the file's name")
    base: str = Field(min_length=1, description="run configuration, relative to the study file")
    axis: Axis = Field(description="what is varied")
    values: list[int] = Field(min_length=1, description="its values, rising; the first is what the others are compared with")
    scaling: Literal["weak", "strong"] | None = Field(
        None,
        description="of the axes ranks and ep_size: weak, work grows with the ranks; strong, the federation stays the same",
    )
    grows: dict[str, int] = Field(default_factory=dict, description="weak: dotted key -> amount per cluster or rank")
    per: Literal["cluster", "rank"] = Field("cluster", description="what the amounts in `grows` are multiplied with")
    repeats: int = Field(5, ge=1, description="runs per value, same seed: only their times differ")
    order_seed: int = Field(0, ge=0, description="of the order in which the runs of a repeat are started")
    ranks: int | None = Field(None, ge=1, description="size of the world on every axis but ranks; default 1")
    clusters: int | None = Field(
        None, ge=1, description="axis ep_size: this many clusters instead, so that ranks grow with ep_size"
    )
    set: dict[str, Any] = Field(default_factory=dict, description="dotted key -> value, for every point")

    @field_validator("values")
    @classmethod
    def _rise(cls, values: list[int]) -> list[int]:
        if values[0] < 1 or any(left >= right for left, right in itertools.pairwise(values)):
            raise ValueError(f"{shown(values)}: must rise from 1 or more; list every value once, smallest first")
        return values

    @model_validator(mode="after")
    def _is_one_kind_of_scaling(self) -> Study:
        # On any other axis the work itself changes, and neither word would be true.
        on_ranks = self.axis in ("ranks", "ep_size")
        if on_ranks and self.scaling is None:
            raise ValueError(f"scaling: missing; say weak or strong for the axis {self.axis}")
        if not on_ranks and self.scaling is not None:
            raise ValueError(f"scaling: {self.scaling}: the axis {self.axis} itself changes the federation; leave it out")
        if self.scaling == "weak" and not self.grows:
            raise ValueError("grows: missing; name what grows in weak scaling, e.g. {data.partition.clients: 4}")
        if self.scaling != "weak" and self.grows:
            raise ValueError(f"grows: {shown(self.grows)}: only weak scaling lets something grow; leave it out")
        return self

    @model_validator(mode="after")
    def _has_one_world(self) -> Study:
        if self.axis == "ranks" and self.ranks is not None:
            raise ValueError(f"ranks: {self.ranks}: is the axis; leave it out")
        if self.clusters is not None and self.axis != "ep_size":
            raise ValueError(f"clusters: {self.clusters}: belongs to the axis ep_size; leave it out")
        if self.clusters is not None and self.ranks is not None:
            raise ValueError(f"clusters: {self.clusters}: ranks is given too; keep one of them")
        for key in [*self.grows, *self.set]:
            if key in ("name", "output") or key == KEYS.get(self.axis):
                raise ValueError(f"{'set' if key in self.set else 'grows'}: {key}: is decided by the study; leave it out")
        return self

    def world(self, value: int) -> int:
        """Ranks at a value of the axis."""
        if self.axis == "ranks":
            return value
        return self.clusters * value if self.clusters is not None else self.ranks or 1

    @property
    def title(self) -> str:
        """Weak scaling over ranks; Scaling over k."""
        return f"{f'{self.scaling} scaling' if self.scaling else 'scaling'} over {self.axis}".capitalize()

    @property
    def by_flops(self) -> bool:
        """Whether throughput is compared in FLOP/s: on the axis k a token costs more or less at every value."""
        return self.axis == "k"


def read_study(path: Path) -> Study:
    """Read a study file. Raises UserError, one line, for a missing or malformed file and for its first wrong key."""
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UserError(f"--config: {path}: cannot be read: {reason}; give a study like configs/scaling/weak.yaml") from None
    if not isinstance(raw, dict):
        raise UserError(f"--config: {path}: holds {shown(raw)}; expected a mapping of {', '.join(Study.model_fields)}")
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"--config: {path}: {first_of(explained(error, Study))}") from None
    return study if study.name else study.model_copy(update={"name": path.stem})
