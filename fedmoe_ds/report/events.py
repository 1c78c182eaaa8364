"""Events: the types of what readers take from `metrics.jsonl` (docs/outputs.md says what it means).

A record may come from another version or from somebody else, so the type of a field that is read is checked here, once, and
not where it is computed with. Fields and events that are not listed are passed over. Only what an event is sorted
by is required: older versions have not written everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_LAST_SECOND = 253402300799
"""Of the year 9999: a date can have no later one."""

# Bounded everywhere: sums of what a foreign file holds must not become infinite, nor its dates invalid.
Count = Annotated[int, Field(ge=0, le=2**63)]
Round = Annotated[int, Field(ge=0, le=10**6)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=1e15)]
Time = Annotated[float, Field(ge=0, le=_LAST_SECOND)]
LABEL = r"^[0-9]{1,9}( r[0-9]{1,9})?( e[0-9]{1,9})?( l[0-9]{1,9})?( b[0-9]{1,9})?$"
Label = Annotated[str, Field(pattern=LABEL)]
"""Of a tier: `4`, `4 r2`, `4 e8`, `1 b2`."""


class _Fields(BaseModel):
    """What is null may as well be absent: a number that was not finite, or a field that does not apply."""

    # Unknown fields are those of newer versions; a wrong type is an error even where it could be converted.
    model_config = ConfigDict(strict=True, extra="ignore")


class _Tiered(_Fields):
    """Older versions name a tier by its top-k only, under either name."""

    tier_label: Label | None = None
    tier: Count | Label | None = None
    top_k: Count | None = None


class _OfTier(_Tiered):
    """An event that is sorted by its tier."""

    @model_validator(mode="after")
    def _has_a_tier(self) -> _OfTier:
        # Readers take the first that is there, so a null one is no name.
        if not self.model_fields_set or next(iter(self._names()), None) is None:
            raise ValueError("tier_label: missing")
        return self

    def _names(self) -> list[str | int | None]:
        names = ("tier_label", "tier", "top_k")
        # In the order in which `by_client.tier_of` looks.
        return [getattr(self, name) for name in names if name in self.model_fields_set]


class _Place(_Fields):
    rank: Count
    cluster: Count
    shard: Count
    host: str | None = None
    experts: str | None = None


class _Start(_Fields):
    kind: str
    name: str
    method: str | None = None
    round: Round | None = None


class _Gpu(_Fields):
    name: str | None = None
    count: Count | None = None


class Machine(_Fields):
    """What a host of a run is (`machine.host_facts`); a study's note on its own machine says the same."""

    host: str | None = None
    cpu: str | None = None
    cores: Count | None = None
    memory_gib: Amount | None = None
    gpu: _Gpu | None = None
    system_name: str | None = None


class _Devices(_Fields):
    aggregation: str | None = None
    profiles: dict[str, Count] | None = None
    target_perplexity: Amount | None = None
    target_accuracy: Amount | None = None


class _Run(_Fields):
    time: Time | None = None
    name: str | None = None
    method: str | None = None
    seed: int | None = None
    world_size: Count | None = None
    clusters: Count | None = None
    ep_size: Count | None = None
    clients: Count | None = None
    num_experts: Count | None = None
    top_k: Count | None = None
    layers: Count | None = None
    tiers: list[Count] | None = None
    budgets: list[_OfTier] | None = None
    foundation: str | None = None
    foundation_code: str | None = None
    foundation_converted: str | None = None
    start: _Start | None = None
    devices: _Devices | None = None
    reproducible: str | None = None
    versions: dict[str, str] | None = None
    topology: list[_Place] | None = None
    machines: list[Machine] | None = None


class _Resume(_Fields):
    time: Time | None = None
    round: Round | None = None
    world_size: Count | None = None
    checkpoint: str | None = None
    topology: list[_Place] | None = None


class _Client(_OfTier):
    name: str
    samples: Count | None = None
    sequences: Count | None = None
    tokens: Count | None = None
    targets: Count | None = None


class _Distribution(_Fields):
    labels: list[str | int] = Field(default_factory=list)
    counts: list[list[Count]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _has_a_count_per_label(self) -> _Distribution:
        if any(len(row) != len(self.labels) for row in self.counts):
            raise ValueError("counts: needs one number per label in every row")
        return self


class _Omissions(_Fields):
    rows: Count
    total: dict[str, Count]
    clients: dict[str, dict[str, Count]]


class _Lengths(_Fields):
    width: Annotated[int, Field(ge=1, le=2**31)]
    counts: dict[Label, list[Count]]


class _Piece(_Fields):
    text: str
    target: bool


class _Sample(_OfTier):
    client: str
    pieces: list[_Piece] | None = None
    tokens: Count | None = None
    targets: Count | None = None


class _File(_Fields):
    """A table beside the record; a name of any other form could lead out of the run folder."""

    file: Annotated[str, Field(pattern=r"^clients/[a-z0-9][a-z0-9-]*\.parquet$")]
    rows: Annotated[int, Field(ge=0, le=2**31)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Table(_Fields):
    time: Time | None = None
    of: Literal["client", "eval"]
    round: Round
    table: _File


class _Data(_Fields):
    time: Time | None = None
    table: _File | None = None
    clients: list[_Client] | None = None
    distribution: _Distribution | None = None
    omissions: _Omissions | None = None
    lengths: _Lengths | None = None


class _Eval(_OfTier):
    round: Round
    split: str
    client: str | None = None
    loss: Number | None = None
    perplexity: Amount | None = None
    accuracy: Number | None = None
    exact_match: Number | None = None
    ranked_choice: Number | None = None
    view_0: Number | None = None
    view_1: Number | None = None
    samples: Count | None = None
    targets: Count | None = None
    tokens: Count | None = None
    virtual_time: Seconds | None = None
    joules_total: Amount | None = None


class _Generation(_OfTier):
    round: Round
    sample: Count
    client: str | None = None
    prompt: str | None = None
    reference: str | None = None
    answer: str | None = None
    exact: bool | None = None
    ended: bool | None = None


class _Trained(_Tiered):
    round: Round
    client: str
    # Absent in records of versions that left nobody out.
    status: str = "ok"
    steps: Count | None = None
    tokens: Count | None = None
    seconds: Seconds | None = None
    flops: Amount | None = None
    loss_first: Number | None = None
    loss_last: Number | None = None
    rescaler: Number | None = None
    change_norm: Amount | None = None
    experts_held: Annotated[list[Count], Field(min_length=1)] | None = None


class _Tally(_Fields):
    seconds: Seconds | None = None
    bytes: Count | None = None


class _Round(_Fields):
    time: Time | None = None
    round: Round
    participants: Count | None = None
    dropped: Count | None = None
    waves: Count | None = None
    tokens: Count | None = None
    tokens_per_s: Amount | None = None
    seconds: Seconds | None = None
    weight_entropy: Number | None = None
    load_variation: Amount | None = None
    epsilon: Amount | None = None
    server_loss_last: Number | None = None
    phases: dict[str, Seconds | None] | None = None
    collectives: dict[str, _Tally] | None = None
    virtual_s: Seconds | None = None
    virtual_time: Seconds | None = None
    joules: Amount | None = None
    joules_total: Amount | None = None
    late: Count | None = None
    lost: Count | None = None
    stale: Count | None = None
    down_bytes: Count | None = None
    up_bytes: Count | None = None
    mean_delay: Amount | None = None
    product_rows: Count | None = None
    product_bytes: Count | None = None


class _Experts(_OfTier):
    round: Round
    # A share; a little above 1 is rounding.
    activation: list[list[Annotated[float, Field(ge=0, le=1.001)] | None]]


class _End(_Fields):
    time: Time | None = None
    rounds: Round | None = None
    digest: str | None = None
    seconds: Seconds | None = None
    peak_bytes: list[Count] | None = None
    device_peak_bytes: list[Count] | None = None


_KINDS: dict[str, type[_Fields]] = {
    "run": _Run,
    "resume": _Resume,
    "data": _Data,
    "table": _Table,
    "sample": _Sample,
    "eval": _Eval,
    "generation": _Generation,
    "client": _Trained,
    "round": _Round,
    "experts": _Experts,
    "end": _End,
}


def wrong_field(event: Mapping[str, Any]) -> str | None:
    """The first field of an event that its readers cannot take, and why; None if there is none."""
    # An event of a newer version is not for these readers.
    kind = _KINDS.get(event["event"])
    if kind is None:
        return None
    try:
        kind.model_validate(event)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # The first problem only: one line tells the user where to look.
        place = ".".join([event["event"], *map(str, first["loc"])])
        return f"{place}: {first['msg']}"
    return None
