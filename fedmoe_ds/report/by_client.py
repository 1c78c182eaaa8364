"""By client: what a report says of every client, gathered round by round, so that it grows with the clients and not with the
rounds.

Rows come as lines of `metrics.jsonl` or as tables; both become columns of a round before they are added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.clients.tiers import tier_order
from fedmoe_ds.report.client_tables import HELD, Rows, numbers

Floats = NDArray[np.float64]
SHOWN_LOST = 20
TASK_METRICS = {"exact_match": "exact match", "ranked_choice": "ranked choice", "view_0": "view 0", "view_1": "view 1"}
"""Optional fields of `eval` that are shares of its `samples`, and what they are called."""
FIGURES = {"perplexity": "perplexity", "accuracy": "accuracy", **TASK_METRICS}
"""Of a client's own hold-out, and what they are called."""
OK = "ok"
_TRAINED = ("top_k", "steps", "tokens", "seconds", "flops", "loss_first", "loss_last", "rescaler", HELD)
_LATEST = ("loss_last", "rescaler", "top_k", HELD)


class RepeatedError(Exception):
    """A client's row of a round has come after one of the same or a later round: sums would count it twice."""


def tier_of(event: Mapping[str, Any]) -> str:
    """The label of the tier that an event is about; files of before have its top-k only, under either name."""
    # In the order in which `events` checks the names.
    return str(event.get("tier_label", event.get("tier", event.get("top_k"))))


@dataclass(frozen=True)
class _Round:
    """Rows of one round: names, tiers and statuses as text, figures as numbers, NaN where there is none.

    `known`: figures that at least one row has a field for.
    """

    index: int
    names: list[str]
    tiers: list[str]
    statuses: list[str]
    figures: dict[str, Floats]
    known: set[str]


def _of_lines(events: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> _Round:
    figures = {name: np.array([_number(event.get(name)) for event in events], dtype=np.float64) for name in fields}
    known = {name for name in fields if any(name in event for event in events)}
    names, tiers = [event["client"] for event in events], [tier_of(event) for event in events]
    return _Round(events[0]["round"], names, tiers, [event.get("status", OK) for event in events], figures, known)


def _number(value: Any) -> Any:
    """A field as one number: a list, over layers, by its mean."""
    return np.mean(value) if isinstance(value, list) else value


def _of_table(rows: Rows, fields: Sequence[str]) -> _Round:
    table = rows.read()
    figures = {name: numbers(table, name) for name in fields}
    statuses = table["status"].to_pylist() if "status" in table.column_names else []
    names, tiers = table["client"].to_pylist(), table["tier_label"].to_pylist()
    return _Round(rows.round, names, tiers, statuses, figures, set(fields) & set(table.column_names))


class _ByClient(ABC):
    """Arrays with a place per client, in the order in which clients turn up; `fields` are what is read of their rows."""

    def __init__(self, fields: Sequence[str]) -> None:
        self.places: dict[str, int] = {}
        self.tiers: dict[str, int] = {}
        self._fields = fields
        self._waiting: list[Mapping[str, Any]] = []
        self._arrays: dict[str, tuple[NDArray[Any], float]] = {}

    def __len__(self) -> int:
        return len(self.places)

    def see(self, event: Mapping[str, Any]) -> None:
        """Take a line; lines of one round are added together."""
        if self._waiting and self._waiting[0]["round"] != event["round"]:
            self.close()
        self._waiting.append(event)

    def see_table(self, rows: Rows) -> None:
        """Take a table. Raises UserError where it is damaged."""
        self.close()
        self._add(_of_table(rows, self._fields))

    def close(self) -> None:
        """Add the lines that wait for others of their round."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._add(_of_lines(waiting, self._fields))

    @abstractmethod
    def _add(self, rows: _Round) -> None:
        """Add the rows of a round."""

    def _array(self, name: str, empty: float = np.nan) -> NDArray[Any]:
        """An array over all clients so far [clients] float64, `empty` where nothing has been said."""
        array, _ = self._arrays.setdefault(name, (np.full(max(64, len(self)), empty), empty))
        if len(array) < len(self):
            # Twice as long: clients that turn up one by one must not copy it every time.
            array = np.concatenate([array, np.full(max(len(array), len(self) - len(array)), empty)])
            self._arrays[name] = (array, empty)
        return array[: len(self)]

    def _places_of(self, rows: _Round) -> NDArray[np.int64]:
        places = self.places
        # `len` is taken before the name is in.
        return np.fromiter((places.setdefault(name, len(places)) for name in rows.names), np.int64, len(rows.names))

    def _tiers_of(self, rows: _Round) -> Floats:
        tiers = self.tiers
        return np.fromiter((tiers.setdefault(tier, len(tiers)) for tier in rows.tiers), np.float64, len(rows.tiers))


class Participation(_ByClient):
    """What every client has trained: sums over its rounds, its first and its latest losses.

    Attributes:
        lost: (round, client) of the first updates that were left out; `lost_count` is how many there were.
        flops: by tier: sum, rows, and rows that say it.
    """

    def __init__(self) -> None:
        super().__init__(_TRAINED)
        self.lost: list[tuple[int, str]] = []
        self.lost_count = 0
        self.flops: dict[str, tuple[float, int, int]] = {}

    def figure(self, name: str) -> Floats:
        """`rounds`, `steps`, `tokens`, `seconds`, `loss_first`, `loss_last`, `rescaler`, `change` (of the loss), `top_k` or
        `experts_held` (per layer) of every client [clients], NaN where it has none."""
        if name == "change":
            first, last = self._array("loss_first"), self._array("loss_last")
            with np.errstate(all="ignore"):
                return np.where(first != 0, last / first - 1, np.nan)
        return self._array(name, 0.0 if name in ("rounds", "steps", "tokens", "seconds") else np.nan)

    def tier(self, place: int) -> str:
        """The tier of a client's latest row."""
        return list(self.tiers)[int(self._array("tier")[place])]

    def _add(self, rows: _Round) -> None:
        places = self._places_of(rows)
        latest = self._array("round", -1.0)
        if len(np.unique(places)) < len(places) or (latest[places] >= rows.index).any():
            raise RepeatedError
        latest[places] = rows.index
        first = self.figure("rounds")[places] == 0
        self.figure("rounds")[places] += 1
        with np.errstate(over="ignore"):  # a sum beyond all numbers is shown as missing
            for name in ("steps", "tokens", "seconds"):
                self.figure(name)[places] += np.nan_to_num(rows.figures[name])
        self.figure("loss_first")[places[first]] = rows.figures["loss_first"][first]
        for name in _LATEST:
            self.figure(name)[places] = rows.figures[name]
        tiers = self._tiers_of(rows)
        self._array("tier")[places] = tiers
        self._add_lost(rows)
        self._add_flops(rows, tiers)

    def _add_lost(self, rows: _Round) -> None:
        lost = sorted(name for name, status in zip(rows.names, rows.statuses, strict=True) if status != OK)
        self.lost_count += len(lost)
        self.lost += [(rows.index, name) for name in lost[: SHOWN_LOST - len(self.lost)]]

    def _add_flops(self, rows: _Round, tiers: Floats) -> None:
        for tier, code in self.tiers.items():
            spent = rows.figures["flops"][tiers == code]
            total, count, known = self.flops.get(tier, (0.0, 0, 0))
            told = spent[~np.isnan(spent)]
            with np.errstate(over="ignore"):
                # One after the other, as Python's `sum` adds.
                total = float(np.cumsum([total, *told])[-1]) if len(told) else total
            self.flops[tier] = (total, count + len(spent), known + len(told))


class OwnScores(_ByClient):
    """How every client's own hold-out was scored at first and at last, by the model of each tier that scored it.

    Attributes:
        known: figures that the record has.
    """

    def __init__(self) -> None:
        super().__init__(tuple(FIGURES))
        self.known: set[str] = set()

    def last_round(self, tier: str) -> int:
        """The last round in which the tier's model was evaluated."""
        return int(self._rounds(tier, last=True).max(initial=0))

    def values(self, tier: str, round_index: int | None, name: str) -> list[float]:
        """A figure of all clients by a tier's model in the first or last round, where it is finite; of another round none."""
        if round_index is None or tier not in self.tiers:
            return []
        found = np.full(len(self), np.nan)
        # The last one counts where a client has one evaluation, and where a round was evaluated twice.
        for last in (False, True):
            found = np.where(self._rounds(tier, last) == round_index, self._figure(tier, name, last), found)
        kept: list[float] = found[~np.isnan(found)].tolist()
        return kept

    def ends(self, name: str, own: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """A figure of every client at first and at last, both by one model [clients], NaN where there is none.

        Args:
            own: by whose model: a code of `tiers` for every client [clients]; where nobody knows, -1, by the largest that has
                scored the client.
        """
        ends, models = (np.full(len(self), np.nan), np.full(len(self), np.nan)), own.copy()
        # Smaller ones first, so that the largest is what stays.
        for tier in sorted(self.tiers, key=tier_order, reverse=True):
            models[(own < 0) & (self._rounds(tier, last=True) >= 0)] = self.tiers[tier]
        for tier, code in self.tiers.items():
            for found, last in zip(ends, (False, True), strict=True):
                found[models == code] = self._figure(tier, name, last)[models == code]
        return ends

    def tier_codes(self, names: Iterable[str], tiers: Iterable[str]) -> NDArray[np.int64]:
        """The tiers of these clients as `ends` takes them."""
        codes = np.full(len(self), -1, dtype=np.int64)
        for name, tier in zip(names, tiers, strict=True):
            if (place := self.places.get(name)) is not None:
                codes[place] = self.tiers.get(tier, -1)
        return codes

    def _rounds(self, tier: str, last: bool) -> Floats:
        return self._array(f"{tier}: {last}", -1.0 if last else np.inf)

    def _figure(self, tier: str, name: str, last: bool) -> Floats:
        return self._array(f"{tier}: {last} {name}")

    def _add(self, rows: _Round) -> None:
        places, codes = self._places_of(rows), self._tiers_of(rows)
        self.known |= rows.known
        for tier, code in self.tiers.items():
            chosen = codes == code
            here = places[chosen]
            for last in (False, True):
                rounds = self._rounds(tier, last)
                # Of a round that was evaluated twice the later record counts, at both ends.
                newer = rows.index >= rounds[here] if last else rows.index <= rounds[here]
                rounds[here[newer]] = rows.index
                for name in FIGURES:
                    self._figure(tier, name, last)[here[newer]] = rows.figures[name][chosen][newer]


def latest(events: Iterator[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The same events with every client's training once per round, its later record, in the order of rounds; all in memory."""
    rows: dict[tuple[int, str], Mapping[str, Any]] = {}
    others = []
    for event in events:
        if event["event"] == "client":
            rows[event["round"], event["client"]] = event
        else:
            others.append(event)
    return [*others, *(rows[key] for key in sorted(rows))]
