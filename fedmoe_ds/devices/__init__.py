"""Devices: what clients train on, simulated: profiles, traces of real ones, and who has which.

`DeviceProfile` is what others build on: its fields keep their names and units.
"""

from fedmoe_ds.devices.availability import ALWAYS, SECOND, Availability, ticks
from fedmoe_ds.devices.builtin import BUILTIN
from fedmoe_ds.devices.fleet import Device, Fleet, Sources, make_fleet, read_sources
from fedmoe_ds.devices.profile import DeviceProfile
from fedmoe_ds.devices.work import Work

__all__ = [
    "ALWAYS",
    "BUILTIN",
    "SECOND",
    "Availability",
    "Device",
    "DeviceProfile",
    "Fleet",
    "Sources",
    "Work",
    "make_fleet",
    "read_sources",
    "ticks",
]
