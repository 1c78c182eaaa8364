"""Profile: what one kind of device can do, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedmoe_ds.config import ProfileConfig
from fedmoe_ds.devices.availability import ALWAYS, Availability
from fedmoe_ds.errors import UserError

FIGURES = (
    "flops_per_s",
    "memory_bytes",
    "down_bytes_per_s",
    "up_bytes_per_s",
    "joules_per_flop",
    "joules_per_byte_sent",
    "joules_per_byte_received",
)
"""Numbers of a profile, by the names that configurations and traces use, too."""


@dataclass(frozen=True)
class DeviceProfile:
    """One kind of device.

    Attributes:
        flops_per_s: what it sustains in training, not its peak.
        memory_bytes: what a client's model and its training may take.
        down_bytes_per_s, up_bytes_per_s: of its link, from the server and to it.
        joules_per_flop, joules_per_byte_sent, joules_per_byte_received: energy.
        availability: when it is on.
    """

    name: str
    flops_per_s: float
    memory_bytes: float
    down_bytes_per_s: float
    up_bytes_per_s: float
    joules_per_flop: float
    joules_per_byte_sent: float
    joules_per_byte_received: float
    availability: Availability = ALWAYS


def resolved(name: str, given: ProfileConfig, base: DeviceProfile | None, place: str) -> DeviceProfile:
    """A profile as somebody wrote it, over the one that it is like.

    Args:
        place: what comes before the name of a field in a message.
    Raises:
        UserError: it is like no other and lacks a number.
    """
    numbers = {key: value for key in FIGURES if (value := getattr(given, key)) is not None}
    on = _availability(given, base)
    if base is not None:
        return replace(base, name=name, availability=on, **numbers)
    if missing := [key for key in FIGURES if key not in numbers]:
        raise UserError(f"{place}{missing[0]}: missing; give it, or name a built-in profile in `like`")
    return DeviceProfile(name, availability=on, **numbers)


def _availability(given: ProfileConfig, base: DeviceProfile | None) -> Availability:
    if given.on is not None:
        return Availability.of(given.on, 86_400.0 if given.period_s is None else given.period_s)
    return ALWAYS if base is None else base.availability
