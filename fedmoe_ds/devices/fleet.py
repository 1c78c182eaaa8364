"""Fleet: which client has which device.

Columns and not objects, as a population is: ten thousand devices of a mix are one array. Legend: N clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config import DevicesConfig
from fedmoe_ds.devices.availability import ALWAYS
from fedmoe_ds.devices.builtin import BUILTIN
from fedmoe_ds.devices.presence import Presence
from fedmoe_ds.devices.profile import DeviceProfile, resolved
from fedmoe_ds.devices.trace import Trace, read_trace
from fedmoe_ds.errors import UserError, nearest
from fedmoe_ds.randomness import generator


@dataclass(frozen=True)
class Device:
    """One client's device: its profile, and how many ticks its day begins later than the clock's."""

    profile: DeviceProfile
    shift: int = 0

    def until(self, time: int) -> int | None:
        """When it goes off for the first time from `time` on: None where it is off; never (-1) where it is always on."""
        if self.profile.availability.always:
            return -1
        end = self.profile.availability.until(time - self.shift)
        return None if end is None else end + self.shift

    def next(self, time: int) -> int:
        """The first moment from `time` on in which it is on."""
        return self.profile.availability.next(time - self.shift) + self.shift


class Fleet(Sequence[Device]):
    """The devices of all clients, in the order of clients.

    Args:
        profiles: of which there are.
        kind_N: the place of every client's profile among them.
        shift_N: ticks by which its day begins later.
        digest: SHA-256 of the trace that they are from, if they are from one.
    """

    def __init__(
        self,
        profiles: Sequence[DeviceProfile],
        kind_N: NDArray[np.int64],
        shift_N: NDArray[np.int64],
        digest: str | None = None,
    ) -> None:
        self.profiles, self.kind_N, self.shift_N, self.digest = list(profiles), kind_N, shift_N, digest

    def __len__(self) -> int:
        return len(self.kind_N)

    def __getitem__(self, client: int) -> Device:  # type: ignore[override]
        return Device(self.profiles[self.kind_N[client]], int(self.shift_N[client]))

    @cached_property
    def always_on(self) -> bool:
        """Whether no device is ever off."""
        return all(profile.availability.always for profile in self.profiles)

    @cached_property
    def _presence(self) -> Presence:
        return Presence(self.profiles, self.kind_N, self.shift_N)

    def on_N(self, time: int) -> NDArray[np.bool_]:
        """Whether each device is on at a moment."""
        return self._presence.on_N(time)

    def counts(self) -> dict[str, int]:
        """How many clients have each profile, by its name."""
        found = np.bincount(self.kind_N, minlength=len(self.profiles)).tolist()
        return {profile.name: count for profile, count in zip(self.profiles, found, strict=True) if count}


@dataclass(frozen=True)
class Sources:
    """What devices a configuration has, before it is known which clients there are: a trace, or the profiles of a mix."""

    config: DevicesConfig
    profiles: list[DeviceProfile]
    trace: Trace | None = None

    @property
    def names_clients(self) -> bool:
        """Whether devices belong to certain clients."""
        return self.trace is not None and self.trace.clients is not None

    def fleet(self, clients: int, names: Sequence[str], seed: int) -> Fleet:
        """The devices of so many clients; `names` are theirs. Raises UserError where a trace that names clients lacks one."""
        if self.trace is not None:
            return _traced(self.trace, self.profiles, self.config, clients, names, seed)
        kind_N = _dealt(list(self.config.mix.values()), clients, seed)
        # A number of every client, whether its profile needs it or not: another profile changes no other client's day.
        part_N = generator(seed, "device-days").random(clients)
        periods_N = np.array([profile.availability.period for profile in self.profiles], np.int64)[kind_N]
        return Fleet(self.profiles, kind_N, (part_N * periods_N).astype(np.int64))


def read_sources(config: DevicesConfig) -> Sources | None:
    """The devices that a configuration names; None where none are simulated.

    Raises:
        UserError: a profile or a file is not what it has to be.
    """
    if not config.simulated:
        return None
    if config.trace is not None:
        trace = read_trace(Path(config.trace))
        return Sources(config, [_as_available(profile, config) for profile in trace.profiles], trace)
    known = _known(config)
    for name in config.mix:
        if name not in known:
            raise UserError(f"devices.mix.{name}: there is no such profile{nearest(name, known)}")
    return Sources(config, [_as_available(known[name], config) for name in config.mix])


def make_fleet(config: DevicesConfig, clients: int, names: Sequence[str], seed: int) -> Fleet | None:
    """The devices of a run; None where none are simulated. Raises UserError as `read_sources` and `Sources.fleet` do."""
    sources = read_sources(config)
    return None if sources is None else sources.fleet(clients, names, seed)


def _known(config: DevicesConfig) -> dict[str, DeviceProfile]:
    """Built-in profiles, and the configuration's own."""
    found = dict(BUILTIN)
    for name, given in config.profiles.items():
        place = f"devices.profiles.{name}."
        if given.like is not None and given.like not in BUILTIN:
            raise UserError(f"{place}like: {given.like}: there is no such built-in profile{nearest(given.like, BUILTIN)}")
        found[name] = resolved(name, given, None if given.like is None else BUILTIN[given.like], place)
    return found


def _as_available(profile: DeviceProfile, config: DevicesConfig) -> DeviceProfile:
    return profile if config.availability == "profile" else replace(profile, availability=ALWAYS)


def _dealt(shares: Sequence[float], clients: int, seed: int) -> NDArray[np.int64]:
    """The place of every client's profile: as many of each as its share says (largest remainders), dealt by lot."""
    wanted = np.array(shares) / sum(shares) * clients
    counts = np.floor(wanted).astype(np.int64)
    # Stable: among equal remainders the first profile of the mix gets the client.
    most = np.argsort(-(wanted - counts), kind="stable")[: clients - int(counts.sum())]
    counts[most] += 1
    dealt = np.repeat(np.arange(len(shares)), counts)
    return dealt[generator(seed, "devices").permutation(clients)]


def _traced(
    trace: Trace, profiles: list[DeviceProfile], config: DevicesConfig, clients: int, names: Sequence[str], seed: int
) -> Fleet:
    """Rows by the client that they name; else dealt by lot, and again from the first one where there are fewer than clients."""
    still = np.zeros(clients, np.int64)
    if trace.clients is None:
        kind_N = generator(seed, "devices").permutation(clients) % len(profiles)
        return Fleet(profiles, kind_N, still, trace.digest)
    row = {client: place for place, client in enumerate(trace.clients)}
    for name in names:
        if name not in row:
            raise UserError(f"devices.trace: {config.trace}: client: no row names client '{name}'; add one, or drop the column")
    return Fleet(profiles, np.array([row[name] for name in names], np.int64), still, trace.digest)
