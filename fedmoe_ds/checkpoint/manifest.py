"""Manifest: the types of what a checkpoint says of itself, which somebody else may have written."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _even(rows: list[list[int]]) -> list[list[int]]:
    if len({len(row) for row in rows}) > 1:
        raise ValueError("expected rows of one length")
    return rows


_Count = Annotated[int, Field(ge=0, lt=2**63)]  # fits int64
_Counts = Annotated[list[list[_Count]], AfterValidator(_even)]
"""Routed rows per (layer, expert)."""


class _Report(BaseModel):
    """What a client has reported of an unfinished round; it becomes an event when the round ends, which adds its own fields."""

    model_config = ConfigDict(strict=True)

    client: str
    status: str
    tokens: _Count
    targets: _Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _leaves_room(cls, given: Any) -> Any:
        if isinstance(given, dict) and (taken := {"event", "round", "time"} & given.keys()):
            raise ValueError(f"{min(taken)}: not part of a report")
        return given


class _Partial(BaseModel):
    """An unfinished round; `sums` says how they lie in their files."""

    model_config = ConfigDict(strict=True)

    # Keys of a JSON object are text: these become indices of clients again.
    done: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], _Report]
    activation: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}( [relb][0-9]{1,9}){0,4}$")], _Counts]
    seconds: Annotated[float, Field(ge=0, le=1e15)]


_Ticks = Annotated[int, Field(ge=0, le=10**30)]


class _Clock(BaseModel):
    """A virtual clock: its time, the energy spent, and clients at work as (client, version, began, ends, pace, arrives)."""

    model_config = ConfigDict(strict=True, extra="forbid")

    time: _Ticks
    joules: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    starts: _Count
    # A list in JSON is no tuple to a strict reader.
    flights: list[Annotated[tuple[_Count, _Count, _Ticks, _Ticks, float, bool], Field(strict=False)]]


class Manifest(BaseModel):
    """The types of a manifest's fields."""

    model_config = ConfigDict(strict=True)

    round: Annotated[int, Field(ge=0, le=10**6)]
    identity: dict[str, Any]
    metrics_position: _Count
    partial: _Partial | None
    utilisation: _Counts | None
    files: dict[str, str]
    clock: _Clock | None = None
    sent_down: _Count = 0
