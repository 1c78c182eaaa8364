"""Work: what a client does in a round, how long its device takes for it, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe_ds.devices.availability import ticks
from fedmoe_ds.devices.profile import DeviceProfile


@dataclass(frozen=True)
class Work:
    """FLOPs of local training, and bytes that the client receives before it and sends after it."""

    flops: float
    down_bytes: int
    up_bytes: int


@dataclass(frozen=True)
class Span:
    """Ticks of the three parts of a client's work, one after the other."""

    down: int
    compute: int
    up: int

    @property
    def total(self) -> int:
        return self.down + self.compute + self.up


def span_of(profile: DeviceProfile, work: Work, pace: float = 1.0) -> Span:
    """How long a device takes, `pace` times as long as its profile says."""
    return Span(
        ticks(pace * work.down_bytes / profile.down_bytes_per_s),
        ticks(pace * work.flops / profile.flops_per_s),
        ticks(pace * work.up_bytes / profile.up_bytes_per_s),
    )


def joules_of(profile: DeviceProfile, work: Work) -> float:
    """Energy of all of it: what takes longer at another pace costs the same."""
    sent, received = work.up_bytes * profile.joules_per_byte_sent, work.down_bytes * profile.joules_per_byte_received
    return received + work.flops * profile.joules_per_flop + sent


def joules_until(profile: DeviceProfile, work: Work, span: Span, elapsed: int) -> float:
    """Energy of work that ends early, `elapsed` ticks after it has begun: a part in hand counts by its share of time."""
    parts = (
        (span.down, work.down_bytes * profile.joules_per_byte_received),
        (span.compute, work.flops * profile.joules_per_flop),
        (span.up, work.up_bytes * profile.joules_per_byte_sent),
    )
    spent, left = 0.0, elapsed
    for length, joules in parts:
        done = min(max(left, 0), length)
        spent += joules * (done / length if length else 1.0)
        left -= length
        if left < 0:
            break
    return spent
