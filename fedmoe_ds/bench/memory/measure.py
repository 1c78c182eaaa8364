"""Memory: bytes of a client in flight, of two hundred rounds, and of a foundation that two ranks of a host hold.

Every figure comes from real processes, seen from the system's side: resident, proportional (PSS: a page that n processes map
counts 1 / n in each) and private memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedmoe_ds.bench.harness.shapes import find_shape
from fedmoe_ds.bench.harness.system import HALF_MOMENTS
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.memory import clients as memory_clients
from fedmoe_ds.bench.memory import host as memory_host
from fedmoe_ds.bench.memory import rounds as memory_rounds
from fedmoe_ds.bench.wave.measure import system_names
from fedmoe_ds.errors import UserError, nearest

PARTS = (memory_clients.PART, memory_rounds.PART, memory_host.PART)

Note = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        parts: some of `PARTS`.
        shape: of the clients in flight; `mode` and `peers` as `launch/bench.py wave` has them.
        clients: how many are in flight, one process each.
        sequences, length: of a client's step.
        rounds: of the long run.
        host_shape: of the foundation that two ranks hold.
    """

    parts: Sequence[str]
    shape: str
    mode: str
    peers: Sequence[str]
    clients: Sequence[int]
    sequences: int
    length: int
    rounds: int
    host_shape: str
    seed: int

    def check(self) -> None:
        """Raises UserError for whatever the user can fix, before anything is started."""
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"--parts: {part}: unknown part{nearest(part, PARTS)}")
        for name in (self.shape, self.host_shape):
            find_shape(name)
        system_names(self.mode, list(self.peers))
        memory_clients.check(self.clients)
        memory_rounds.check(self.rounds)


def run_memory(asked: Asked, note: Note) -> list[Row]:
    """Rows of all parts that are asked for. Raises UserError."""
    asked.check()
    rows: list[Row] = []
    if memory_clients.PART in asked.parts:
        shape, counts = find_shape(asked.shape), sorted(set(asked.clients))
        ours = system_names(asked.mode, [])
        systems = [*ours, HALF_MOMENTS, *system_names(asked.mode, list(asked.peers))[len(ours) :]]
        rows += memory_clients.measure(shape, systems, counts, asked.sequences, asked.length, asked.seed, note)
    if memory_rounds.PART in asked.parts:
        rows += memory_rounds.measure(asked.rounds, asked.seed, note)
    if memory_host.PART in asked.parts:
        rows += memory_host.measure(find_shape(asked.host_shape), asked.seed, note)
    return rows
