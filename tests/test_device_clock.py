"""The virtual clock's rules: who arrives in a round, when it ends, and the asynchronous buffer, against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.config import DevicesConfig, config_of
from fedmoe_ds.devices import BUILTIN, SECOND, Availability, DeviceProfile, Fleet, buffer
from fedmoe_ds.devices.buffer import select_step
from fedmoe_ds.devices.fleet import make_fleet
from fedmoe_ds.devices.flight import LATE, LOST, STALE, ClockState, Conditions, saved_state, state_of
from fedmoe_ds.devices.rounds import select_round
from fedmoe_ds.devices.work import Span, Work, joules_of, joules_until, span_of
from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import generator

WORK = Work(0.0, 0, 500)


def conditions(seconds: list[float], on: list[Availability | None] | None = None, seed: int = 0, **keys: Any) -> Conditions:
    """Clients whose work takes so many seconds, all of it on the way up."""
    profiles = [
        DeviceProfile(str(i), 1e21, 1.0, 1e21, 500 / length, 1e-9, 1e-6, 1e-6, *([on[i]] if on and on[i] else []))
        for i, length in enumerate(seconds)
    ]
    config = config_of({"devices": {"mix": {"laptop": 1.0}, **keys}}).devices
    fleet = Fleet(profiles, np.arange(len(seconds)), np.zeros(len(seconds), np.int64))
    return Conditions(config, fleet, seed, lambda client: WORK)


def draw_first(among: Any, size: int, attempt: int) -> list[int]:
    return list(among if among is not None else range(size))[:size]


def seconds_of(ticks: int) -> float:
    return ticks / SECOND


def test_a_span_is_bytes_and_flops_over_speeds() -> None:
    profile = BUILTIN["laptop"]
    work = Work(4e11, 13_375_000, 6_750_000)
    assert span_of(profile, work) == Span(SECOND, 2 * SECOND, SECOND)
    assert span_of(profile, work, 2.0).total == 8 * SECOND
    expected = 4e11 * profile.joules_per_flop + 13_375_000 * profile.joules_per_byte_received
    expected += 6_750_000 * profile.joules_per_byte_sent
    assert math.isclose(joules_of(profile, work), expected)


@given(st.integers(0, 5 * SECOND))
def test_energy_grows_with_time_up_to_all_of_it(elapsed: int) -> None:
    profile, work = BUILTIN["laptop"], Work(4e11, 13_375_000, 6_750_000)
    span = span_of(profile, work)
    spent = joules_until(profile, work, span, elapsed)
    assert spent <= joules_of(profile, work) * (1 + 1e-12)
    assert spent <= joules_until(profile, work, span, elapsed + SECOND // 7) * (1 + 1e-12)
    assert joules_until(profile, work, span, 0) == 0
    assert math.isclose(joules_until(profile, work, span, 4 * SECOND), joules_of(profile, work))
    half = joules_until(profile, work, span, 2 * SECOND)
    assert math.isclose(half, 13_375_000 * profile.joules_per_byte_received + 2e11 * profile.joules_per_flop)


def test_a_synchronous_round_waits_for_the_slowest() -> None:
    found = select_round(conditions([3, 1, 2, 9]), ClockState(time=5 * SECOND), 1, 3, draw_first)
    assert [flight.client for flight in found.arrivals] == [0, 1, 2] and not found.missed
    assert seconds_of(found.after.time) == 8 and found.began == 5 * SECOND


def test_the_first_ones_are_taken_where_more_are_asked() -> None:
    found = select_round(conditions([3, 1, 2, 9], aggregation="deadline", over_selection=2.0), ClockState(), 1, 2, draw_first)
    assert [flight.client for flight in found.arrivals] == [1, 2] and seconds_of(found.after.time) == 2
    assert [(one.flight.client, one.why, seconds_of(one.until)) for one in found.missed] == [(0, LATE, 2), (3, LATE, 2)]


def test_a_deadline_ends_a_round() -> None:
    found = select_round(conditions([3, 1, 9, 9], aggregation="deadline", deadline_s=4.0), ClockState(), 1, 4, draw_first)
    assert [flight.client for flight in found.arrivals] == [0, 1] and found.after.time == 4 * SECOND
    assert [one.why for one in found.missed] == [LATE, LATE]
    early = select_round(conditions([3, 1], aggregation="deadline", deadline_s=4.0), ClockState(), 1, 2, draw_first)
    assert seconds_of(early.after.time) == 3 and not early.missed


def test_devices_that_go_off_are_lost_and_those_that_are_off_not_asked() -> None:
    day = Availability.of([[0, 10]], 100)
    later = Availability.of([[50, 60]], 100)
    found = select_round(conditions([3, 20, 3], [day, day, later]), ClockState(), 1, 3, draw_first)
    assert [flight.client for flight in found.arrivals] == [0]
    assert [(one.flight.client, one.why, one.until) for one in found.missed] == [(1, LOST, 10 * SECOND)]
    assert found.after.time == 10 * SECOND
    waiting = select_round(conditions([3, 20, 3], [day, day, later]), ClockState(time=20 * SECOND), 1, 3, draw_first)
    assert waiting.began == 50 * SECOND and [flight.client for flight in waiting.arrivals] == [2]


def test_a_plan_is_made_with_those_who_are_asked_and_says_how_long_they_work() -> None:
    """Twice the work and the device goes off in its middle; another client is taken, one whose device is off is not."""
    day, later = Availability.of([[0, 10]], 100), Availability.of([[50, 60]], 100)
    world = conditions([8, 3, 3, 5, 6], [day, None, None, later, None])
    asked: list[list[int]] = []

    def plan(clients: Sequence[int]) -> dict[int, Work]:
        asked.append(list(clients))
        return {0: Work(0.0, 0, 1000), 1: WORK, 3: WORK, 4: Work(0.0, 0, 250)}

    found = select_round(world, ClockState(), 1, 3, draw_first, plan)
    assert asked == [[0, 1, 2]] and [(f.client, seconds_of(f.ends)) for f in found.arrivals] == [(1, 3), (4, 3)]
    assert [(one.flight.client, one.why, seconds_of(one.until)) for one in found.missed] == [(0, LOST, 10)]
    # Ten of sixteen seconds of twice the bytes.
    assert math.isclose(world.wasted(found.missed[0]), 1e-6 * 1000 * 10 / 16)
    assert seconds_of(found.after.time) == 10


def test_a_plan_with_nobody_waits_for_nobody() -> None:
    found = select_round(conditions([3, 1]), ClockState(time=7), 1, 2, draw_first, lambda clients: {})
    assert found.arrivals == found.missed == () and found.after == ClockState(time=7)


def test_a_round_in_which_nobody_arrives_is_tried_again() -> None:
    """Its clients cost time and energy all the same."""
    day = Availability.of([[0, 10]], 100)
    first = select_round(conditions([20, 3], [day, None]), ClockState(), 1, 1, draw_first)
    assert [flight.client for flight in first.arrivals] == [1] and [one.flight.client for one in first.missed] == [0]
    with pytest.raises(UserError, match="round 1: nobody's update arrives, tried 100 times"):
        select_round(conditions([20], [day]), ClockState(), 1, 1, draw_first)


def test_dropouts_are_as_frequent_as_asked() -> None:
    world = conditions([3.0] * 1000, dropout=0.25)
    found = select_round(world, ClockState(), 1, 1000, draw_first)
    lost = [one for one in found.missed if one.why == LOST]
    assert len(lost) + len(found.arrivals) == 1000 and abs(len(lost) - 250) < 60
    assert every(0 <= one.until < 3 * SECOND + 3 for one in lost)
    assert abs(sum(one.until for one in lost) / len(lost) / SECOND - 1.5) < 0.25
    wasted = [world.wasted(one) for one in lost]
    assert every(0 <= joules < joules_of(world.fleet[0].profile, WORK) for joules in wasted)


def test_paces_are_log_normal() -> None:
    found = select_round(conditions([3.0] * 1000, spread=0.5), ClockState(), 1, 1000, draw_first)
    logs = [math.log(flight.pace) for flight in found.arrivals]
    assert abs(sum(logs) / 1000) < 0.08 and abs(math.sqrt(sum(log * log for log in logs) / 1000) - 0.5) < 0.05


def picker(count: int, seed: int = 0) -> Callable[[int], Callable[[], int]]:
    def pick(number: int) -> Callable[[], int]:
        random = generator(seed, "test", number)
        return lambda: int(random.integers(count))

    return pick


def simulated(lengths: list[int], rounds: int, seed: int, **keys: Any) -> list[Any]:
    """Steps one after the other, the state through JSON's hands each time."""
    world, state, found = (
        conditions([float(length) for length in lengths], seed=seed, aggregation="buffered", **keys),
        ClockState(),
        [],
    )
    for index in range(1, rounds + 1):
        step = select_step(world, state_of(saved_state(state)), index, picker(len(lengths), seed))
        assert step == select_step(world, state, index, picker(len(lengths), seed)), "a pure function of the state"
        found.append(step)
        state = step.after
    return found


def reference(lengths: list[int], rounds: int, seed: int, buffer: int, concurrency: int, most: int) -> list[Any]:
    """The same in one loop over events, without states: [(clients with versions of each step, its time, stale ones)]."""
    from itertools import count

    now, version, working, numbers = 0, 0, [], count()
    step: list[tuple[int, int]] = []
    stale: list[int] = []
    found: list[Any] = []
    pick = picker(len(lengths), seed)
    while True:
        blocked = {client for client, _ in step} | set(stale) | {client for _, client, _ in working}
        while len(working) < concurrency and len(blocked) < len(lengths):
            draw = pick(next(numbers))
            tries = [draw() for _ in range(64)]
            client = next((one for one in tries if one not in blocked), None)
            if client is None:
                free = [one for one in range(len(lengths)) if one not in blocked]
                client = free[draw() % len(free)]
            blocked.add(client)
            working.append((now + lengths[client], client, version))
        if not working:
            stale = []
            continue
        working.sort()
        now, client, begun = working.pop(0)
        if version - begun > most:
            stale.append(client)
        else:
            step.append((client, begun))
        if len(step) == buffer:
            found.append((sorted(step), now, sorted(stale)))
            if len(found) == rounds:
                return found
            version, step, stale = version + 1, [], []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=6, max_size=15),
    st.integers(1, 3),
    st.integers(1, 8),
    st.integers(0, 5),
    st.integers(0, 9),
)
def test_steps_are_those_of_a_plain_loop(lengths: list[int], buffer: int, concurrency: int, most: int, seed: int) -> None:
    mine = simulated(lengths, 8, seed, buffer=buffer, concurrency=concurrency, max_staleness=most)
    plain = reference(lengths, 8, seed, buffer, concurrency, most)
    for step, (clients, now, stale) in zip(mine, plain, strict=True):
        assert [(flight.client, flight.version) for flight in step.arrivals] == clients
        assert step.after.time == now * SECOND
        assert sorted(one.flight.client for one in step.missed) == stale and {one.why for one in step.missed} <= {STALE}


def test_delays_grow_with_the_clients_at_work() -> None:
    """By Little's law an update is about concurrency / buffer steps late."""
    for concurrency in (4, 40):
        steps = simulated([5, 6, 7, 8, 9] * 20, 60, 1, buffer=4, concurrency=concurrency, max_staleness=100)
        delays = [index - flight.version for index, step in enumerate(steps) if index > 30 for flight in step.arrivals]
        assert abs(sum(delays) / len(delays) - concurrency / 4 + 0.5) < 1.0, concurrency


def test_nobody_is_asked_twice_for_a_step() -> None:
    for step in simulated([1, 1, 1, 1, 9, 9], 30, 3, buffer=3, concurrency=3):
        clients = [flight.client for flight in step.arrivals]
        assert clients == sorted(set(clients)) and len(clients) == 3


def test_the_buffer_waits_for_devices_that_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    day, night = Availability.of([[0, 10]], 100), Availability.of([[50, 60]], 100)
    world = conditions([3, 3], [day, night], aggregation="buffered", buffer=2, concurrency=2)
    found = select_step(world, ClockState(), 1, picker(2))
    assert [flight.client for flight in found.arrivals] == [0, 1] and seconds_of(found.after.time) == 53
    never = conditions([30, 30], [day, night], aggregation="buffered", buffer=1, concurrency=2)
    monkeypatch.setattr(buffer, "MOST_MISSED", 100)
    with pytest.raises(UserError, match="round 1: more than 100 updates are not taken"):
        select_step(never, ClockState(), 1, picker(2))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 100), st.integers(0, 400), st.integers(0, 3))
def test_all_at_once_is_one_by_one(count: int, time: int, seed: int) -> None:
    """Few profiles with days of their own beginning, and as many profiles as devices."""
    random = np.random.default_rng(seed)
    days = [sorted(random.choice(100, 2 * int(random.integers(1, 4)), replace=False).tolist()) for _ in range(count)]
    on: list[Availability | None] = [
        Availability.of([day[i : i + 2] for i in range(0, len(day), 2)], 100 + int(random.integers(0, 9))) for day in days
    ]
    traced = conditions([1.0] * count, on).fleet
    mixed = make_fleet(DevicesConfig(mix={"phone-mid": 1.0, "laptop": 1.0, "edge-small": 1.0}), count, [], seed)
    assert mixed is not None
    for fleet, moment in ((traced, time * SECOND), (mixed, time * 211 * SECOND)):
        wait = fleet.wait_N(moment).tolist()
        assert [ticks == 0 for ticks in wait] == [device.until(moment) is not None for device in fleet]
        assert [moment + ticks for ticks in wait] == [device.next(moment) for device in fleet]


def test_a_mix_of_builtin_profiles_runs_for_days() -> None:
    """Nights of phones, working days of laptops: time goes on, nobody is at work who is off."""
    config = DevicesConfig(
        mix={"phone-entry": 1.0, "laptop": 1.0}, aggregation="buffered", buffer=5, concurrency=20, dropout=0.1
    )
    fleet = make_fleet(config, 200, [], 3)
    assert fleet is not None
    world = Conditions(config, fleet, 3, lambda client: Work(1e13, 10_000_000, 10_000_000))
    state = ClockState()
    for index in range(1, 60):
        step = select_step(world, state, index, picker(200))
        assert step.after.time >= state.time
        for flight in (*step.arrivals, *step.after.flights):
            until = fleet[flight.client].until(flight.began)
            assert until is not None and (until == -1 or flight.ends <= until)
        state = step.after
    assert state.time > 2000 * SECOND
