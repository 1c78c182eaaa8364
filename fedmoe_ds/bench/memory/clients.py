"""Memory of clients: peak and resident memory with one, two, four, eight clients in flight, and what one more adds.

All clients have the largest cap, so that each adds the same. Beside the measured slope stands what a client's tensors add up to
by count (`fedmoe_ds.planner.memory`): adapters, gradients, moments of AdamW, and activations where a pass holds all clients.
Ours is measured with moments in bfloat16 as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedmoe_ds.bench.harness.checks import check_least
from fedmoe_ds.bench.harness.command import Note
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.ranks import run_on_ranks
from fedmoe_ds.bench.harness.repeats import make_row
from fedmoe_ds.bench.harness.shapes import Shape, write_model
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.errors import UserError

PART = "clients"
STEPS = 2


def check(clients: Sequence[int]) -> None:
    """Raises UserError for numbers of clients that give no slope."""
    check_least("--clients", clients)
    if len(set(clients)) < 2:
        raise UserError(f"--clients: {clients[0]}: one number gives no slope; name two or more")


def measure_clients(
    shape: Shape, systems: list[str], clients: list[int], sequences: int, length: int, seed: int, note: Note
) -> list[Row]:
    """One row per system of ours and number of clients, one per peer; rows of a system share slope and count."""
    rows = []
    with scratch_folder() as folder:
        write_model(shape, seed, folder)
        for system in systems:
            found = {}
            # A peer trains one client after the other: it never has more than one in flight.
            for count in clients if system.startswith(OURS) else [1]:
                note(f"{shape.name}: {system}: {count} in flight")
                workload = Workload(shape, STEPS, sequences, length, seed, caps=(shape.top_k,) * count)
                request = {"system": system, "folder": str(folder), "workload": workload.to_json()}
                (found[count],) = run_on_ranks("fedmoe_ds.bench.memory.one_system", request)
            rows += [_row(shape, system, count, found, sequences, length) for count in found]
    return rows


def slope(found: dict[int, float]) -> float | None:
    """What one more of something adds to a figure, by least squares; None where nothing can be fitted."""
    return float(np.polyfit(list(found), list(found.values()), 1)[0]) if len(found) > 1 else None


def _row(shape: Shape, system: str, count: int, found: dict[int, dict[str, Any]], sequences: int, length: int) -> Row:
    here = found[count]
    facts = {
        "part": PART,
        "clients": count,
        "loaded_mib": here["loaded_mib"],
        "resident_mib": here["resident_mib"],
        "slope_mib": slope({clients: answer["peak_mib"] for clients, answer in found.items()}),
        "counted_mib": here["counted_mib"],
        "sequences": sequences,
        "length": length,
    }
    return make_row(shape.name, system, here["peak_mib"], **facts, **shape.facts())
