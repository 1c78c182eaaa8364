"""Omissions: samples that a run does not see, or not whole, counted for all rows and for every client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmoe_ds.terminal import visible

EMPTY = "empty"
NO_ROOM = "no_room"
REFUSED = "refused"
UNMARKED = "unmarked"
CUT = "cut"
NAMED = "special_names"
"""Left whole, but told as well: its text holds the name of a special token, which stays text."""

MEANING = {
    EMPTY: "with an empty text or answer",
    NO_ROOM: "whose prompt (or label) leaves no room in data.sequence_length",
    REFUSED: "that the chat template refuses",
    UNMARKED: "in which the chat template's text does not tell prompt and answer apart",
    CUT: "cut at data.sequence_length",
    NAMED: "with the name of a special token in the text, kept as plain text",
}
LEFT_OUT = (EMPTY, NO_ROOM, REFUSED, UNMARKED)
SHOWN = 3

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Omissions:
    """Counts of samples by kind; a kind or a client without any is absent.

    `rows` are all samples that were read, and `total` counts among them. `clients` counts those of one client, its hold-outs
    included. A sample that was left out before samples are dealt at random, or that the global hold-out has, is no client's.
    """

    rows: int = 0
    total: Counts = field(default_factory=dict)
    clients: Mapping[str, Counts] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: int, found: list[tuple[str, str | None]]) -> Omissions:
        """Count (kind, client or None) pairs."""
        clients: dict[str, Counter[str]] = {}
        for kind, client in found:
            if client is not None:
                clients.setdefault(client, Counter())[kind] += 1
        # Sorted below: the counts are stored and compared, whatever order the rows came in.
        total = Counter(kind for kind, _ in found)
        return cls(rows, dict(sorted(total.items())), {name: dict(sorted(clients[name].items())) for name in sorted(clients)})

    @property
    def left_out(self) -> int:
        """Samples that no client and no hold-out has."""
        return sum(self.total.get(kind, 0) for kind in LEFT_OUT)

    def as_dict(self) -> dict[str, Any]:
        """What metrics and the stored header hold."""
        return {"rows": self.rows, "total": dict(self.total), "clients": {name: dict(c) for name, c in self.clients.items()}}

    def line(self) -> str | None:
        """Return one line for the user, or None where every sample is there and whole."""
        return describe(self.as_dict())


def describe(counted: Mapping[str, Any]) -> str | None:
    """Return the line of `Omissions.as_dict`."""
    total: Counts = counted["total"]
    if not total:
        return None
    left_out = sum(total.get(kind, 0) for kind in LEFT_OUT)
    why = ", ".join(f"{total[kind]} {MEANING[kind]}" for kind in LEFT_OUT if kind in total)
    parts = [f"{left_out} of {counted['rows']} samples left out ({why})"] if left_out else []
    parts += [f"{total[kind]} of {counted['rows']} {MEANING[kind]}" for kind in (CUT, NAMED) if kind in total]
    sums = {name: sum(kinds.values()) for name, kinds in counted["clients"].items()}
    # By name among equals, so that the line is the same in every run.
    most = sorted(sums, key=lambda name: (-sums[name], name))[:SHOWN]
    if most:
        others = f" and {len(sums) - SHOWN} more clients" if len(sums) > SHOWN else ""
        parts.append("concerned: " + ", ".join(f"{visible(name)} ({sums[name]})" for name in most) + others)
    return "data: " + "; ".join(parts)
