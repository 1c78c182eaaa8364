"""Rounds with an end: synchronous ones, and those with a deadline (Bonawitz et al., arXiv 1902.01046).

synchronous   a round waits for every client that it has asked, until its update is there or its connection is lost
deadline      more clients are asked than needed (`over_selection`); the first ones to arrive within `deadline_s` are taken, and
              the round ends with the last of them, or when nobody is left to wait for

A device that is off when the round begins is not asked. A round in which nobody arrives is tried again, later and with others.
Where a method plans its rounds it does so among those who are asked, before anybody is lost: it cannot know who will be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fedmoe_ds.devices.availability import SECOND, ticks
from fedmoe_ds.devices.flight import LATE, LOST, ClockState, Conditions, Flight, Missed, Selection
from fedmoe_ds.devices.work import Work
from fedmoe_ds.errors import UserError

MOST_ATTEMPTS = 100
Draw = Callable[[Sequence[int] | None, int, int], list[int]]
"""(clients to draw among, None for all; how many; attempt) -> those drawn."""
Plan = Callable[[Sequence[int]], Mapping[int, Work]]
"""(clients that are asked) -> what those whom a method plans with are predicted to do."""


def select_round(
    conditions: Conditions, state: ClockState, round_index: int, wanted: int, draw: Draw, plan: Plan | None = None
) -> Selection:
    """Who is asked in a round, and who arrives.

    Args:
        wanted: how many updates it is for.
        plan: what a method makes of those who are asked; None: they all do what the configuration says.
    Raises:
        UserError: nobody arrives, however often it is tried.
    """
    missed: list[Missed] = []
    began, time = -1, state.time
    for attempt in range(MOST_ATTEMPTS):
        asked, time = _asked(conditions, time, wanted, draw, attempt)
        began = time if began < 0 else began
        works = _works(conditions, asked, time, plan)
        flights = [conditions.flight(c, round_index - 1, time, round_index, attempt, work=works[c]) for c in works]
        if not flights:  # a method that plans with nobody changes nothing, and waits for nobody
            return Selection((), tuple(missed), began, replace(state, time=time))
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
    config = conditions.config
    factor = config.over_selection if config.aggregation == "deadline" else 1.0
    size = min(math.ceil(wanted * factor), len(conditions.fleet))
    # Nobody is off: drawn among all, as without devices.
    if conditions.fleet.always_on:
        return draw(None, size, attempt), time
    on = conditions.on_but((), time)
    if not on:
        time = conditions.first_on((), time)
        on = conditions.on_but((), time)
    return (draw(on, size, attempt) if len(on) > size else on), time


def _works(conditions: Conditions, asked: Sequence[int], time: int, plan: Plan | None) -> Mapping[int, Work | None]:
    """What every client does that is asked in the end; None: what the configuration says."""
    if plan is None:
        return dict.fromkeys(asked)
    # Whomever a method plans with, a device that is off hears nothing of it; those who are asked are on.
    known = set(asked)
    return {client: work for client, work in plan(asked).items() if client in known or conditions.on(client, time)}


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
