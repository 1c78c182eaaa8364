"""Planned spending: time and energy of a round whose method plans them, in the words of the virtual clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedmoe_ds.devices import ticks
from fedmoe_ds.devices.flight import ClockState
from fedmoe_ds.federation.virtual_clock import Report, Settled, spent_fields
from fedmoe_ds.methods import Spending


def settle_planned(state: ClockState, spending: Mapping[int, Spending], reports: Mapping[int, Report]) -> Settled:
    """End a round in which clients spend what was planned. It lasts as long as the slowest of them.

    Args:
        state: that of the clock when the round begins.
        spending: by client.
        reports: by client, at least of those that spend.
    """
    order = sorted(spending)
    rows = [reports[client] | _fields(spending[client]) for client in order]
    seconds, joules = max((row["virtual_s"] for row in rows), default=0.0), math.fsum(row["joules"] for row in rows)
    after = replace(state, time=state.time + ticks(seconds), joules=state.joules + joules)
    return Settled(after, rows, {"virtual_s": seconds, **spent_fields(after), "joules": joules})


def _fields(spent: Spending) -> dict[str, Any]:
    parts = {"compute_s": spent.compute_s, "up_s": spent.up_s, "joules": spent.joules}
    return {"virtual_s": spent.compute_s + spent.up_s, **parts}
