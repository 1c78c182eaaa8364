"""The `devices:` section: the machines that clients train on, as a run simulates them."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from fedmoe_ds.config.section import Section

MOST_INTERVALS = 10_000
LONGEST_PERIOD = 366 * 86_400
TARGETS = ("target_perplexity", "target_accuracy")
"""Keys that only say what reports look for."""


class ProfileConfig(Section):
    """One kind of device; what is not said is as in the profile that it is `like`."""

    like: str | None = Field(None, description="a built-in profile")
    # Bounded: what takes longer than centuries, or costs more than a city has, is a slip of units.
    flops_per_s: float | None = Field(None, ge=1, le=1e21, description="sustained, in training")
    memory_bytes: float | None = Field(None, ge=1, le=1e21, description="for a client's model and its training")
    down_bytes_per_s: float | None = Field(None, ge=1, le=1e21, description="of its link, from the server")
    up_bytes_per_s: float | None = Field(None, ge=1, le=1e21, description="of its link, to the server")
    joules_per_flop: float | None = Field(None, ge=0, le=1, description="in training")
    joules_per_byte_sent: float | None = Field(None, ge=0, le=1)
    joules_per_byte_received: float | None = Field(None, ge=0, le=1)
    on: list[list[float]] | None = Field(
        None,
        min_length=1,
        max_length=MOST_INTERVALS,
        description="[from, to] in seconds of `period_s`, in order; else it is off",
    )
    period_s: float | None = Field(None, gt=0, le=LONGEST_PERIOD, description="after which `on` begins again; default: a day")

    @model_validator(mode="after")
    def _check_intervals(self) -> ProfileConfig:
        if self.on is None:
            return self
        period = 86_400.0 if self.period_s is None else self.period_s
        for interval in self.on:
            if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= period:
                raise ValueError(f"on: {interval}: expected [from, to] with 0 <= from < to <= period_s ({period:g})")
        for before, after in pairwise(self.on):
            if after[0] < before[1]:
                raise ValueError(f"on: {after}: begins before {before} ends; give intervals in order, none over another")
        return self


class DevicesConfig(Section):
    """The machines that clients train on: virtual time and energy (docs/devices.md). None without `mix` or `trace`."""

    mix: dict[str, float] = Field(default_factory=dict, description="profile -> share of the clients, dealt by lot")
    trace: str | None = Field(None, min_length=1, description="file with one device per row (.csv, .jsonl), in place of `mix`")
    profiles: dict[str, ProfileConfig] = Field(
        default_factory=dict, description="profiles of your own, for `mix`; a built-in one's name replaces it"
    )
    availability: Literal["profile", "always"] = Field(
        "profile", description="when devices are on; always: what profiles say is left out"
    )

    spread: float = Field(
        0.0, ge=0, le=3, description="of a client's pace from time to time: sigma of a log-normal factor on how long it takes"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="chance that a client is lost in the middle of its work")
    aggregation: Literal["synchronous", "deadline", "buffered"] = Field(
        "synchronous",
        description="synchronous: a round waits for all; deadline: for those in time; buffered: asynchronous, a server step "
        "for every `buffer` updates that arrive (FedBuff)",
    )
    deadline_s: float | None = Field(None, gt=0, le=LONGEST_PERIOD, description="deadline: virtual seconds of a round")
    over_selection: float = Field(
        1.0, ge=1, le=100, description="deadline: so many times as many clients are asked, and the first to arrive are taken"
    )
    buffer: int = Field(10, ge=1, description="buffered: updates of a server step; federation.participation does nothing then")
    concurrency: int = Field(30, ge=1, description="buffered: clients at work at the same time")
    staleness: Literal["sqrt", "constant"] = Field(
        "sqrt", description="buffered: factor on an update that is tau steps late; sqrt: 1 / sqrt(1 + tau); constant: 1"
    )
    max_staleness: int = Field(20, ge=0, le=1000, description="buffered: most tau; a later update is not taken")
    target_perplexity: float | None = Field(
        None, gt=1, description="reports say when and at what cost the global hold-out's perplexity is this low; null: a ladder"
    )
    target_accuracy: float | None = Field(None, gt=0, lt=1, description="the same of its accuracy, a share of 1")

    @property
    def simulated(self) -> bool:
        """Whether there are any."""
        return bool(self.mix) or self.trace is not None

    @model_validator(mode="after")
    def _check_source(self) -> DevicesConfig:
        if self.mix and self.trace is not None:
            raise ValueError(f"trace: {self.trace}: the devices are given by mix already; drop one of the two")
        for name, share in self.mix.items():
            if not 0 < share <= 1e9:
                raise ValueError(f"mix.{name}: {share}: expected a share above 0")
        return self

    @model_validator(mode="after")
    def _check_deadline(self) -> DevicesConfig:
        if self.simulated and self.aggregation == "deadline" and self.deadline_s is None and self.over_selection == 1.0:
            raise ValueError("deadline_s: null: with aggregation=deadline; give it, or over_selection above 1")
        return self
