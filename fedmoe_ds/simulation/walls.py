"""Walls: what stops a simulated federation next, where it stands by the model, and what would move it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fedmoe_ds.distributed.gloo_control import FLAT
from fedmoe_ds.planner.memory import PASS, PERSONAL
from fedmoe_ds.planner.prediction import REPORT_BYTES
from fedmoe_ds.simulation.federation import Simulated
from fedmoe_ds.simulation.storage import COLUMNS, RECORD_S

OPEN_FILES = 65_536
"""What a host's hard limit on open files usually is, or what its administrator will raise it to."""
_IN_FLIGHT = ("adapters in flight", "client optimizer")
REPORTS = 2**32
"""Bytes that rank 0 may hold of the reports of one round."""
SHARE = 0.1
"""Of a round that something which every rank waits for may take."""


@dataclass(frozen=True)
class Wall:
    """Something that grows with x.

    Attributes:
        name: what it is.
        x: what it grows with: `ranks`, `hosts`, `clients` or `participants`; `at`: how many there are.
        used: of the limit; 1 is the wall itself.
        moves: what would move it.
        fixed: the part of `used` that does not grow; the rest grows with x to the `power`.
    """

    name: str
    x: str
    at: int
    used: float
    moves: str
    fixed: float = 0.0
    power: float = 1.0

    @property
    def stands(self) -> float:
        """x at the limit, where everything else stays as it is; 0 where what does not grow is beyond it."""
        growing = self.used - self.fixed
        if growing <= 0.0:
            return math.inf
        return float(self.at * (max(0.0, 1.0 - self.fixed) / growing) ** (1.0 / self.power))


def walls(simulated: Simulated) -> list[Wall]:
    """All of them, the nearest first."""
    return sorted(_all(simulated), key=lambda wall: -wall.used)


def _all(simulated: Simulated) -> Iterator[Wall]:
    world, clients, drawn = simulated.world, len(simulated.job.clients), simulated.drawn
    # What other ranks wait for is held against the shortest round that the model allows.
    allowed = SHARE * simulated.mean_round * simulated.hardware.spread[0]
    yield Wall("open files of rank 0", "ranks", world.ranks, simulated.open_files / OPEN_FILES,
               "a higher hard limit; a store and a watchdog of two levels, as the control plane has")  # fmt: skip
    control = simulated.first.traffic.get("control")
    if control is not None:
        yield Wall("control plane", "ranks", world.ranks, control.seconds / allowed,
                   "more work per round (participants, local steps); checkpoint.every",
                   power=1.0 if world.ranks <= FLAT else 0.5)  # fmt: skip
    yield Wall("reports at rank 0", "participants", drawn, drawn * REPORT_BYTES / REPORTS,
               "reports as columns, summed by block heads")  # fmt: skip
    yield Wall("drawing a round", "clients", clients, simulated.drawing_s / allowed, "longer rounds; sampling: uniform")
    yield Wall("scheduling a round", "participants", drawn, simulated.scheduling_s / allowed,
               "longer rounds; a schedule made while the round before trains")  # fmt: skip
    yield Wall("rank 0's record", "participants", drawn, simulated.record_s / allowed, "longer rounds; writing beside training",
               RECORD_S[0] / allowed)  # fmt: skip
    checkpointing, every = simulated.checkpointing(), simulated.job.config.checkpoint.every
    fitting = checkpointing.round_s * (1.0 if checkpointing.background else SHARE * every)
    # Rows of clients grow with the participants, and all of it with the adapters.
    what, at = (
        ("participants", drawn) if PERSONAL in _place(simulated) else ("adapters.rank", simulated.job.config.adapters.rank)
    )
    used, rows = simulated.write_s / fitting, simulated.storage.rows / simulated.storage.checkpoint
    fixed = used * (1.0 - rows) if what == "participants" else 0.0
    yield Wall("checkpoint bytes", what, at, used, "faster storage; a larger checkpoint.every; a smaller adapters.rank", fixed)
    yield from _memory(simulated)
    failing = (checkpointing.round_s * every + simulated.restart_s) / simulated.failures.between
    yield Wall("failures", "hosts", world.hosts, failing,
               "shorter rounds, faster restarts (weights on local disks), clusters that go on without a lost one")  # fmt: skip


def _place(simulated: Simulated) -> dict[str, int]:
    return simulated.host_memory or simulated.memory


def _memory(simulated: Simulated) -> Iterator[Wall]:
    world, place, clients = simulated.world, _place(simulated), len(simulated.job.clients)
    available = simulated.hardware.available(world.ranks_per_host)
    most = math.ceil(simulated.drawn / (world.ranks // simulated.job.config.topology.ep_size))
    in_flight = min(simulated.job.config.execution.clients_in_flight or most, most)
    lasting = sum(size for name, size in simulated.memory.items() if name not in (*_IN_FLIGHT, PASS))
    yield Wall("memory of a rank", "clients in flight", in_flight, simulated.device_bytes / available,
               "topology.ep_size, execution.clients_in_flight, micro_batch_size", lasting / available)  # fmt: skip
    whole = simulated.host_available
    if whole is None:
        return
    # What else lies there leaves less for what grows with the clients.
    growing = {name: place.get(name, 0) * world.ranks_per_host for name in (COLUMNS, PERSONAL)}
    left = whole - (simulated.host_bytes - sum(growing.values()))
    # Mapped files are as fast as memory only while they fit into it.
    growing[PERSONAL] += simulated.spilled * world.ranks_per_host
    moves = {
        COLUMNS: "one mapped table of clients for all ranks of a host",
        PERSONAL: "execution.client_state_gib; more clusters; a smaller adapters.rank",
    }
    for name, size in growing.items():
        if size:
            yield Wall(name, "clients", clients, size / left if left > 0 else math.inf, moves[name])
