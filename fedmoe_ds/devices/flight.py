"""Flight: one client at work, from the moment in which it is asked to the one in which its update arrives, or it is lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmoe_ds.config import DevicesConfig
from fedmoe_ds.devices.fleet import Fleet
from fedmoe_ds.devices.work import Work, joules_until, span_of
from fedmoe_ds.randomness import generator

LATE, LOST, STALE = "late", "lost", "stale"
"""Why an update is not taken: it comes after the round's end, its client was gone before, it is too many steps late."""


@dataclass(frozen=True)
class Flight:
    """One client at work; times in ticks.

    Attributes:
        version: server steps behind the globals that it has begun from.
        pace: how many times as long as its profile says it takes.
        arrives: whether its update arrives at `ends`; else it is lost there.
        work: what it is predicted to do, where that is not what the configuration says; of a round with an end alone.
    """

    client: int
    version: int
    began: int
    ends: int
    pace: float = 1.0
    arrives: bool = True
    work: Work | None = None


@dataclass(frozen=True)
class Missed:
    """A client whose update is not taken, until when it worked for it, and why."""

    flight: Flight
    until: int
    why: str


@dataclass(frozen=True)
class ClockState:
    """What a run's virtual clock knows between rounds.

    Attributes:
        time: virtual ticks since the run began.
        joules: spent so far, by all clients.
        starts: clients that were ever asked (buffered).
        flights: clients at work, in the order in which they were asked (buffered).
    """

    time: int = 0
    joules: float = 0.0
    starts: int = 0
    flights: tuple[Flight, ...] = ()


@dataclass(frozen=True)
class Selection:
    """What happens in a round: a pure function of the clock's state before it.

    Attributes:
        arrivals: those whose updates are taken, in the order of clients.
        missed: those that worked in vain.
        began: when the round's first client is asked.
        after: the state afterwards, but for the energy.
    """

    arrivals: tuple[Flight, ...]
    missed: tuple[Missed, ...]
    began: int
    after: ClockState


@dataclass(frozen=True)
class Conditions:
    """Under which clients work: their devices, and what they are predicted to do in a round.

    Attributes:
        work: by client. Predicted, because who arrives when is decided before anybody has trained, so that nobody trains in
            vain; it does not depend on the round, in which nobody knows when a client will arrive.
    """

    config: DevicesConfig
    fleet: Fleet
    seed: int
    work: Callable[[int], Work]

    def flight(self, client: int, version: int, began: int, *address: int, work: Work | None = None) -> Flight:
        """A client that is asked at a time; `address` names this asking among all others, `work` is as in `Flight`."""
        config, pace = self.config, 1.0
        if config.spread:
            pace = math.exp(config.spread * generator(self.seed, "device-pace", *address, client).standard_normal())
        device = self.fleet[client]
        length = span_of(device.profile, work or self.work(client), pace).total
        ends, arrives = began + length, True
        if config.dropout:
            draw = generator(self.seed, "device-dropout", *address, client)
            if draw.random() < config.dropout:
                ends, arrives = began + int(draw.random() * length), False
        off = device.until(began)
        # A device that is asked is on; -1 stands for one that is never off.
        if off is not None and 0 <= off < ends:
            ends, arrives = off, False
        return Flight(client, version, began, ends, pace, arrives, work)

    def wasted(self, missed: Missed) -> float:
        """Energy of a client whose update is not taken."""
        flight = missed.flight
        work = flight.work or self.work(flight.client)
        profile = self.fleet[flight.client].profile
        return joules_until(profile, work, span_of(profile, work, flight.pace), missed.until - flight.began)

    def on(self, client: int, time: int) -> bool:
        return self.fleet[client].until(time) is not None

    def on_but(self, others: Collection[int], time: int) -> list[int]:
        """All clients whose devices are on, but for some."""
        on_N = self.fleet.wait_N(time) == 0
        on_N[list(others)] = False
        found: list[int] = np.flatnonzero(on_N).tolist()
        return found

    def first_on(self, others: Collection[int], time: int) -> int:
        """The first moment from `time` on in which any client is on, but for some."""
        wait_N = self.fleet.wait_N(time)
        wait_N[list(others)] = np.iinfo(np.int64).max
        return time + int(wait_N.min())


def state_of(saved: Mapping[str, Any] | None) -> ClockState:
    """A state as a checkpoint keeps it; that of the beginning where it has none."""
    if saved is None:
        return ClockState()
    flights = tuple(Flight(*flight) for flight in saved["flights"])
    return ClockState(saved["time"], saved["joules"], saved["starts"], flights)


def saved_state(state: ClockState) -> dict[str, Any]:
    """A state as JSON keeps it, to the bit."""
    flights = [[f.client, f.version, f.began, f.ends, f.pace, f.arrives] for f in state.flights]
    return {"time": state.time, "joules": state.joules, "starts": state.starts, "flights": flights}
