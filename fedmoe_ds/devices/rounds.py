"""Rounds with an end: synchronous ones, and those with a deadline (Bonawitz et al., arXiv 1902.01046).

synchronous   a round waits for every client that it has asked, until its update is there or its connection is lost
deadline      more clients are asked than needed (`over_selection`); the first ones to arrive within `deadline_s` are taken, and
              the round ends with the last of them, or when nobody is left to wait for

A device that is off when the round begins is not asked. A round in which nobody arrives is tried again, later and with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from fedmoe_ds.devices.availability import SECOND, ticks
from fedmoe_ds.devices.flight import LATE, LOST, ClockState, Conditions, Flight, Missed, Selection
from fedmoe_ds.errors import UserError

MOST_ATTEMPTS = 100
Draw = Callable[[Sequence[int] | None, int, int], list[int]]
"""(clients to draw among, None for all; how many; attempt) -> those drawn."""


def select_round(conditions: Conditions, state: ClockState, round_index: int, wanted: int, draw: Draw) -> Selection:
    """Who is asked in a round, and who arrives. `wanted`: how many updates it is for.

    Raises:
        UserError: nobody arrives, however often it is tried.
    """
    missed: list[Missed] = []
    began, time = -1, state.time
    for attempt in range(MOST_ATTEMPTS):
        asked, time = _asked(conditions, time, wanted, draw, attempt)
        began = time if began < 0 else began
        flights = [conditions.flight(client, round_index - 1, time, round_index, attempt) for client in asked]
        taken, end = _taken(conditions, flights, time, wanted)
        in_time = {flight.client for flight in taken}
        missed += [_missed(flight, end) for flight in flights if flight.client not in in_time]
        time = end
        if taken:
            arrivals = tuple(sorted(taken, key=lambda flight: flight.client))
            return Selection(arrivals, tuple(missed), began, replace(state, time=end))
    raise UserError(
        f"devices: round {round_index}: nobody's update arrives, tried {MOST_ATTEMPTS} times until virtual second "
        f"{time / SECOND:.0f}; use a longer devices.deadline_s, fewer local steps, or devices that are on for longer"
    )


def _asked(conditions: Conditions, time: int, wanted: int, draw: Draw, attempt: int) -> tuple[list[int], int]:
    """The clients that a round asks, and when: as soon as anybody is on."""
    config, everybody = conditions.config, range(len(conditions.fleet))
    factor = config.over_selection if config.aggregation == "deadline" else 1.0
    size = min(math.ceil(wanted * factor), len(everybody))
    # Nobody is off: drawn among all, as without devices.
    if conditions.fleet.always_on:
        return draw(None, size, attempt), time
    on = conditions.on_but((), time)
    if not on:
        time = conditions.first_on(everybody, time)
        on = conditions.on_but((), time)
    return (draw(on, size, attempt) if len(on) > size else on), time


def _taken(conditions: Conditions, flights: list[Flight], time: int, wanted: int) -> tuple[list[Flight], int]:
    """Whose updates are taken, and when the round ends."""
    limit = conditions.config.deadline_s
    last = max(flight.ends for flight in flights)
    if conditions.config.aggregation == "synchronous":
        return [flight for flight in flights if flight.arrives], last
    end = last if limit is None else min(last, time + ticks(limit))
    arrived = sorted((f for f in flights if f.arrives and f.ends <= end), key=lambda flight: (flight.ends, flight.client))
    if len(arrived) >= wanted:
        return arrived[:wanted], arrived[wanted - 1].ends
    return arrived, end


def _missed(flight: Flight, end: int) -> Missed:
    # Who is lost before the round ends has stopped by itself; the others are told that it is over.
    lost = not flight.arrives and flight.ends <= end
    return Missed(flight, min(flight.ends, end), LOST if lost else LATE)
