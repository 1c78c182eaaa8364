"""Built-in profiles: phones, laptops, edge boxes. Where each figure is from, and which are assumptions: docs/devices.md.

Energy per FLOP is sustained power over sustained speed. Energy per byte of a link is 8 (alpha + beta / throughput), the model
of Huang et al. (MobiSys 2012) for LTE and Wi-Fi.
"""

from __future__ import annotations

from fedmoe_ds.devices.availability import ALWAYS, Availability
from fedmoe_ds.devices.profile import DeviceProfile

GIB, MBIT = 2.0**30, 1e6 / 8
NIGHT = Availability.of([[0.0, 8 * 3600.0]], 86_400.0)
"""Idle and charging for eight hours of a day; at which hour they begin is drawn for every client."""
WORKDAY = Availability.of([[0.0, 9 * 3600.0]], 86_400.0)


def _profile(
    name: str,
    gflops: float,
    watts: float,
    memory_gib: float,
    down_mbit: float,
    up_mbit: float,
    nanojoules_sent: float,
    nanojoules_received: float,
    availability: Availability,
) -> DeviceProfile:
    speed = gflops * 1e9
    links = down_mbit * MBIT, up_mbit * MBIT, watts / speed, nanojoules_sent * 1e-9, nanojoules_received * 1e-9
    return DeviceProfile(name, speed, memory_gib * GIB, *links, availability)


BUILTIN = {
    profile.name: profile
    for profile in (
        _profile("phone-entry", 10, 2.0, 2, 13, 6, 5220, 1210, NIGHT),
        _profile("phone-mid", 40, 3.0, 4, 55, 12, 4370, 600, NIGHT),
        _profile("phone-high", 150, 4.0, 8, 166, 21, 4000, 480, NIGHT),
        _profile("laptop", 200, 28.0, 12, 107, 54, 2290, 1110, WORKDAY),
        _profile("laptop-gpu", 4000, 80.0, 8, 107, 54, 2290, 1110, WORKDAY),
        _profile("edge-small", 400, 10.0, 6, 107, 54, 100, 100, ALWAYS),
        _profile("edge-large", 2000, 40.0, 48, 1000, 1000, 100, 100, ALWAYS),
    )
}
"""By name."""
