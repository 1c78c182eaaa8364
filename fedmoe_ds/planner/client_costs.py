"""Client costs: what every client of a round costs wherever it trains, computed once for all topologies of a search.

Legend: C clients of a round, M their local steps, one client's after another's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.clients.client import Client
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.work import PassWork, Rows
from fedmoe_ds.planner.workload import Job

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ClientCosts:
    """The clients that a round has drawn, on one kind of machine.

    Attributes:
        chosen: in canonical order.
        row: of a client by its index: its place among the chosen ones.
        starts_C: where each client's steps begin; one more entry is their number.
        home_M, routed_M, passes_M: per step: seconds of a client's rows outside the experts, rows that leave for experts in a
            layer, passes.
        tokens: rows of all of them.
    """

    chosen: list[Client]
    row: dict[int, int]
    starts_C: NDArray[np.int64]
    home_M: Floats
    routed_M: Floats
    passes_M: Floats
    tokens: int

    @classmethod
    def of(cls, job: Job, hardware: Hardware, ranks_per_host: int, round_index: int) -> ClientCosts:
        """Draw the round's clients and their batches."""
        chosen = job.participants(round_index)
        steps = [job.steps(client, round_index) for client in chosen]
        counts_C = np.array([len(one) for one in steps], dtype=np.int64)
        samples, longest, rows, targets, passes = (
            np.concatenate([getattr(one, name) for one in steps])
            for name in ("samples", "longest", "rows", "targets", "passes")
        )
        work = PassWork(job, training=True)
        packed = rows if job.config.execution.packing else None
        home = work.seconds(work.home(Rows(samples, longest, targets, packed)), hardware.crowded(ranks_per_host))
        # Every row goes to `cap` experts, but for those that add nothing: caps are kept by the router, not by chance.
        caps = np.repeat([client.cap * job.expert_layout.real_share for client in chosen], counts_C)
        return cls(
            chosen,
            {client.index: place for place, client in enumerate(chosen)},
            np.concatenate([[0], counts_C.cumsum()]),
            np.asarray(home, dtype=np.float64),
            (rows * caps).astype(np.float64),
            passes.astype(np.float64),
            int(rows.sum()),
        )

    @property
    def steps_C(self) -> NDArray[np.int64]:
        """Local steps of every client."""
        return np.diff(self.starts_C)

    def padded(self, rows: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
        """`home`, `routed` and `passes` of some clients, [len(rows), N]; zero beyond a client's own steps."""
        steps = self.steps_C[rows]
        place_N = np.arange(int(steps.max(initial=0)))
        own = place_N < steps[:, None]
        at = np.where(own, self.starts_C[rows][:, None] + place_N, 0)
        home, routed, passes = (np.where(own, values[at], 0.0) for values in (self.home_M, self.routed_M, self.passes_M))
        return home, routed, passes
