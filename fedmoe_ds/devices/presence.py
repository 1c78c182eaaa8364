"""Presence: which of all devices are on at a moment, in one go.

Legend: N clients, K profiles, I intervals of all profiles, one profile after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.devices.profile import DeviceProfile

FEW = 64
"""Profiles that are looked at one by one; a trace has one of every device."""


class Presence:
    """Arguments as of a `Fleet`."""

    def __init__(self, profiles: Sequence[DeviceProfile], kind_N: NDArray[np.int64], shift_N: NDArray[np.int64]) -> None:
        self.kind_N, self.shift_N = kind_N, shift_N
        self.days = [profile.availability for profile in profiles]
        self.few = len(profiles) <= FEW
        if self.few:
            return
        # Devices of a trace have days of their own and no shift, so that a profile is on or off for all of its clients.
        assert not shift_N.any()
        self.periods_K = np.array([day.period for day in self.days], np.int64)
        counts_K = np.array([len(day.starts) for day in self.days], np.int64)
        self.first_K, self.row_I = np.cumsum(counts_K) - counts_K, np.repeat(np.arange(len(profiles)), counts_K)
        self.starts_I = np.array([start for day in self.days for start in day.starts], np.int64)
        self.ends_I = np.array([end for day in self.days for end in day.ends], np.int64)

    def on_N(self, time: int) -> NDArray[np.bool_]:
        """Whether each client's device is on."""
        if not self.few:
            place_I = (time % self.periods_K)[self.row_I]
            inside_I = (self.starts_I <= place_I) & (place_I < self.ends_I)
            on_K: NDArray[np.bool_] = np.logical_or.reduceat(inside_I, self.first_K)
            return on_K[self.kind_N]
        found_N = np.zeros(len(self.kind_N), np.bool_)
        for kind, day in enumerate(self.days):
            mine = np.flatnonzero(self.kind_N == kind)
            place = (time - self.shift_N[mine]) % day.period
            before = np.searchsorted(day.starts, place, side="right") - 1
            found_N[mine] = (before >= 0) & (place < np.array(day.ends)[before])
        return found_N
