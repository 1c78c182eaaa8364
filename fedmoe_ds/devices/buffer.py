"""Buffered asynchronous aggregation: FedBuff (Nguyen et al., arXiv 2106.06639).

Up to `concurrency` clients are at work at any time. Whenever one arrives or is lost, another is asked, and begins from the
globals of that moment. The server makes a step as soon as `buffer` updates are there; an update whose client has begun tau
steps before counts 1 / sqrt(1 + tau). Step r is round r of a run: it trains those who arrive in it, each from the globals of
tau steps ago. Durations follow from devices, so the order of arrival is a pure function of the clock's state.

Ours: a client is not asked again before the step that its update is for, one whose update would be more than `max_staleness`
steps late is not taken, and whom to ask is drawn among those who are on and not at work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fedmoe_ds.config import DevicesConfig
from fedmoe_ds.devices.availability import SECOND
from fedmoe_ds.devices.flight import LOST, STALE, ClockState, Conditions, Flight, Missed, Selection
from fedmoe_ds.errors import UserError

Pick = Callable[[int], Callable[[], int]]
"""(number of the asking) -> a function that draws one client after the other among all, with replacement."""
MOST_DRAWS = 64
"""Before those who can be asked are looked for one by one."""
MOST_MISSED = 10_000
"""Updates of a step that are not taken; then it is given up."""


def staleness(config: DevicesConfig, tau: int) -> float:
    """The factor on the change of an update that is `tau` server steps late; 1 where updates do not arrive one by one."""
    if not config.simulated or config.aggregation != "buffered" or config.staleness == "constant":
        return 1.0
    return 1.0 / math.sqrt(1 + tau)


@dataclass
class _Step:
    """A server step under way: the clock, who is at work, whose updates are in the buffer, who is not asked before its end."""

    conditions: Conditions
    pick: Pick
    version: int
    time: int
    starts: int
    flights: list[Flight]
    buffer: list[Flight] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    resting: set[int] = field(default_factory=set)

    def fill(self) -> None:
        """Ask clients until enough are at work, or nobody is left to be asked."""
        while len(self.flights) < self.conditions.config.concurrency:
            client = self._next_client()
            if client is None:
                return
            self.flights.append(self.conditions.flight(client, self.version, self.time, self.starts))
            self.starts += 1

    def _next_client(self) -> int | None:
        busy = {flight.client for flight in self.flights} | self.resting
        draw = self.pick(self.starts)
        # Most clients are free and on, so that a draw costs the same among a hundred and among a million.
        for _ in range(MOST_DRAWS):
            client = draw()
            if client not in busy and self.conditions.on(client, self.time):
                return client
        free = self.conditions.on_but(busy, self.time)
        return free[draw() % len(free)] if free else None

    def wait(self) -> None:
        """Nobody is at work and nobody can be asked: let time pass until somebody is on."""
        taken = {flight.client for flight in self.buffer}
        # Whose update was not taken may be asked again, rather than nobody.
        self.resting = taken
        others = [client for client in range(len(self.conditions.fleet)) if client not in taken]
        self.time = self.conditions.first_on(others, self.time)

    def advance(self) -> None:
        """Go to the next moment in which somebody arrives, or is lost."""
        flight = min(self.flights, key=lambda one: (one.ends, one.client))
        self.flights.remove(flight)
        self.time = flight.ends
        self.resting.add(flight.client)
        stale = self.version - flight.version > self.conditions.config.max_staleness
        if flight.arrives and not stale:
            self.buffer.append(flight)
        else:
            self.missed.append(Missed(flight, flight.ends, STALE if flight.arrives else LOST))


def select_step(conditions: Conditions, state: ClockState, round_index: int, pick: Pick) -> Selection:
    """The server step that ends round `round_index`: who arrives for it, with which delay, and when.

    Raises:
        UserError: too few arrive, however long it waits.
    """
    step = _Step(conditions, pick, round_index - 1, state.time, state.starts, list(state.flights))
    while len(step.buffer) < conditions.config.buffer:
        step.fill()
        if step.flights:
            step.advance()
        else:
            step.wait()
        if len(step.missed) > MOST_MISSED:
            raise UserError(
                f"devices: round {round_index}: more than {MOST_MISSED} updates are not taken until virtual second "
                f"{step.time / SECOND:.0f}; use a larger devices.max_staleness, fewer local steps, or devices that are on for "
                "longer"
            )
    after = replace(state, time=step.time, starts=step.starts, flights=tuple(step.flights))
    arrivals = tuple(sorted(step.buffer, key=lambda flight: flight.client))
    return Selection(arrivals, tuple(step.missed), state.time, after)
