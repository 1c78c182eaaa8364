"""Virtual clock: who takes part in a round, when it ends and what it costs, on the devices that a run simulates.

Every rank computes the same from the same state and the same reports; the state is in every checkpoint. Who arrives is decided
on predicted work (`CostModel.client`), before anybody trains, so nobody trains in vain. A client's own time and energy are
those of what it was counted to have done. So is the end of a synchronous round; that of others is as predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedmoe_ds.clients.client import Client
from fedmoe_ds.config import TARGETS
from fedmoe_ds.devices import SECOND, DeviceProfile, Fleet, Sources
from fedmoe_ds.devices.buffer import select_step
from fedmoe_ds.devices.flight import LATE, LOST, STALE, ClockState, Conditions, Flight, Missed, Selection
from fedmoe_ds.devices.rounds import Plan, select_round
from fedmoe_ds.devices.work import Span, Work, joules_of, span_of
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import client_record
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.federation.sampling import draw, masses, participant_count
from fedmoe_ds.federation.schedule import participants_per_round
from fedmoe_ds.federation.traffic import Traffic
from fedmoe_ds.randomness import generator

Report = dict[str, Any]


@dataclass(frozen=True)
class Settled:
    """A round when it has ended: the clock's state, a row for every client that was asked, and fields of its `round` event."""

    state: ClockState
    rows: list[Report]
    fields: dict[str, Any]


Planned = Callable[[int, list[Client]], Sequence[Client]]
"""(round, clients that are asked) -> whom the method plans with, as it plans with them."""


class VirtualClock:
    """That of one run; it keeps no state but the selection that it made last.

    Attributes:
        planned: whom a method takes that plans its rounds; None: those who are asked.
    """

    def __init__(self, spec: RunSpec, clients: Sequence[Client], fleet: Fleet, drawn: int) -> None:
        self.spec, self.clients, self.fleet = spec, clients, fleet
        self.config = spec.config.devices
        self.traffic = Traffic(spec, clients, drawn)
        self.conditions = Conditions(self.config, fleet, spec.config.seed, self._predicted)
        self.planned: Planned | None = None
        self._selected: tuple[int, ClockState, Selection] | None = None
        self._shares: Any = None
        self._check()

    @property
    def buffered(self) -> bool:
        return self.config.aggregation == "buffered"

    def _check(self) -> None:
        """Refuse devices with which no round could end."""
        config, count = self.config, len(self.clients)
        if self.buffered and config.buffer > count:
            raise UserError(f"devices.buffer: {config.buffer}: there are {count} clients; use at most these")
        limit = config.deadline_s if config.aggregation == "deadline" else None
        # A method that plans may ask for less than the configuration does.
        if limit is None or self.spec.method.overrides("plan"):
            return
        # The first client that is fast enough ends the search.
        spans = (span_of(self.fleet[i].profile, self._predicted(i)).total for i in range(count))
        if not any(span <= limit * SECOND for span in spans):
            least = min(span_of(self.fleet[i].profile, self._predicted(i)).total for i in range(count)) / SECOND
            raise UserError(
                f"devices.deadline_s: {limit:g}: no device trains a round in less than {least:.3g} virtual seconds; use more"
            )

    def _predicted(self, index: int) -> Work:
        return self.work(self.clients[index])

    def work(self, client: Client) -> Work:
        """What a client is predicted to do in a round, as it is planned with."""
        return Work(self.spec.cost.client(client, self.spec.config.local), *self.traffic.of(client.rank))

    def facts(self) -> dict[str, Any]:
        """What the `run` event says of it."""
        told = {"aggregation": self.config.aggregation, "profiles": self.fleet.counts(), "trace": self.fleet.digest}
        return told | {key: getattr(self.config, key) for key in TARGETS}

    def participants(self, state: ClockState, round_index: int) -> list[Client]:
        """The clients whose updates a round takes, in canonical order."""
        return [self.clients[flight.client] for flight in self.select(state, round_index).arrivals]

    def select(self, state: ClockState, round_index: int) -> Selection:
        """Who arrives in a round that begins with this state. Raises UserError where nobody ever does."""
        if self._selected is None or self._selected[:2] != (round_index, state):
            self._selected = (round_index, state, self._select(state, round_index))
        return self._selected[2]

    def _select(self, state: ClockState, round_index: int) -> Selection:
        config, seed = self.spec.config.federation, self.spec.config.seed
        if self.buffered:
            return select_step(self.conditions, state, round_index, self._pick)
        wanted = participant_count(len(self.clients), config.participation)

        def drawn(among: Sequence[int] | None, size: int, attempt: int) -> list[int]:
            # As without devices, where all are on and the first attempt succeeds.
            address = (round_index, attempt) if attempt else (round_index,)
            return draw(self.clients, size, seed, address, config.sampling, among)

        return select_round(self.conditions, state, round_index, wanted, drawn, self._plan(round_index))

    def _plan(self, round_index: int) -> Plan | None:
        if (planned := self.planned) is None:
            return None

        def works(asked: Sequence[int]) -> dict[int, Work]:
            return {one.index: self.work(one) for one in planned(round_index, [self.clients[index] for index in asked])}

        return works

    def _pick(self, number: int) -> Callable[[], int]:
        """Draws of the client that is asked as the run's `number`-th one."""
        if self._shares is None:
            mass = np.cumsum(masses(self.clients, self.spec.config.federation.sampling))
            self._shares = mass / mass[-1]
        random = generator(self.spec.config.seed, "device-asked", number)
        return lambda: int(np.searchsorted(self._shares, random.random(), side="right"))

    def delay(self, state: ClockState, round_index: int, client: int) -> int | None:
        """By how many rounds a client of a round is late; None: it begins with the round."""
        if not self.buffered:
            return None
        found = next(flight for flight in self.select(state, round_index).arrivals if flight.client == client)
        return (round_index - 1 - found.version) or None

    def settle(self, state: ClockState, round_index: int, reports: Mapping[int, Report]) -> Settled:
        """End a round whose clients have reported.

        Args:
            state: that of its beginning.
            reports: by client, with `flops`, `down_bytes` and `up_bytes`.
        """
        selection = self.select(state, round_index)
        rows, end, spent = list[Report](), selection.after.time, list[float]()
        counted = list[int]()
        for flight in selection.arrivals:
            profile, work = self.fleet[flight.client].profile, self._counted(flight, reports[flight.client])
            span, joules = span_of(profile, work, flight.pace), joules_of(profile, work)
            counted.append(flight.began + span.total)
            spent.append(joules)
            late = {"delay": round_index - 1 - flight.version} if self.buffered else {}
            rows.append({**reports[flight.client], **_device_fields(profile, work, span, joules), **late})
        if self.config.aggregation == "synchronous":
            # Those that were lost in a round are waited for until they are; earlier attempts ended before it began.
            end = max([*counted, *(one.until for one in selection.missed)], default=end)
        spent += [self.conditions.wasted(one) for one in selection.missed]
        after = replace(selection.after, time=end, joules=state.joules + math.fsum(spent))
        rows += self._missed_rows(selection)
        return Settled(after, rows, self._fields(state, after, selection, rows, math.fsum(spent)))

    def _counted(self, flight: Flight, report: Report) -> Work:
        # A client that the host had no memory for is counted as predicted: its device has tried.
        if report["status"] == client_record.OUT_OF_MEMORY:
            return flight.work or self._predicted(flight.client)
        return Work(report["flops"], report["down_bytes"], report["up_bytes"])

    def _missed_rows(self, selection: Selection) -> list[Report]:
        """A row for everybody who worked in vain and does not arrive after all; who was asked twice has one."""
        arrived = {flight.client for flight in selection.arrivals}
        last = {one.flight.client: one for one in selection.missed if one.flight.client not in arrived}
        return [self._missed_row(last[index]) for index in sorted(last)]

    def _missed_row(self, missed: Missed) -> Report:
        flight, profile = missed.flight, self.fleet[missed.flight.client].profile
        seconds = (missed.until - flight.began) / SECOND
        fields = {"device": profile.name, "virtual_s": seconds, "joules": self.conditions.wasted(missed)}
        return client_record.absent(self.clients[flight.client], missed.why) | fields

    def _fields(
        self, before: ClockState, after: ClockState, selection: Selection, rows: Sequence[Report], joules: float
    ) -> dict[str, Any]:
        whys = [one.why for one in selection.missed]
        fields: dict[str, Any] = {
            "virtual_s": (after.time - before.time) / SECOND,
            **spent_fields(after),
            "joules": joules,
            **{why: whys.count(why) for why in (LATE, LOST, STALE)},
            "down_bytes": sum(row.get("down_bytes", 0) for row in rows),
            "up_bytes": sum(row.get("up_bytes", 0) for row in rows),
        }
        if self.buffered:
            delays = [row["delay"] for row in rows if "delay" in row]
            fields |= {"mean_delay": sum(delays) / len(delays), "largest_delay": max(delays)}
        return fields


def virtual_clock(spec: RunSpec, clients: Sequence[Client], sources: Sources | None) -> VirtualClock | None:
    """The clock of a run; None where no devices are simulated. Raises UserError where its rounds could never end."""
    if sources is None:
        return None
    names = [client.name for client in clients] if sources.names_clients else ()
    return VirtualClock(
        spec, clients, sources.fleet(len(clients), names, spec.config.seed), participants_per_round(spec, len(clients))
    )


def spent_fields(state: ClockState) -> dict[str, float]:
    """Virtual time and energy since the run began."""
    return {"virtual_time": state.time / SECOND, "joules_total": state.joules}


def _device_fields(profile: DeviceProfile, work: Work, span: Span, joules: float) -> dict[str, Any]:
    parts = {"down_s": span.down / SECOND, "compute_s": span.compute / SECOND, "up_s": span.up / SECOND}
    sizes = {"down_bytes": work.down_bytes, "up_bytes": work.up_bytes}
    return {"device": profile.name, "virtual_s": span.total / SECOND, **parts, **sizes, "joules": joules}
