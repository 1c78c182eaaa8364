"""Pass limits: how the rows of a local step are cut into passes, where whole ones have not fitted into memory.

Two numbers, both counted in sequences (packed: in full ones). How many clients of a rank go through the model together changes
no bit where clients are kept apart at all. How a client's own step is cut changes the order in which its gradient is added up,
so that limit belongs to a client and a round (`fedmoe_ds.checkpoint.skipped_clients`).

Legend: P ranks of the cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedmoe_ds.clients.batches import Packing, pass_bounds, pass_sizes
from fedmoe_ds.clients.client_work import ClientWork
from fedmoe_ds.clients.out_of_memory import OutOfMemory


@dataclass(frozen=True)
class PassLimits:
    """Those of one round; None: none.

    Attributes:
        together: sequences that clients of a rank may bring into one pass together; one that has more comes alone.
        each: sequences of any client in one pass.
        own: the same for single clients, by their index, where that is less.
    """

    together: int | None = None
    each: int | None = None
    own: Mapping[int, int] = field(default_factory=dict)

    def of(self, client: int, configured: int | None) -> int | None:
        """Sequences of a client in one pass, at most as many as configured."""
        found = [limit for limit in (configured, self.each, self.own.get(client)) if limit is not None]
        return min(found, default=None)

    def cut(
        self, client: int, batches: list[np.ndarray], configured: int | None, packing: Packing | None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Where the passes of each step of a client begin in it, and their sizes in sequences."""
        size = self.of(client, configured)
        bounds = [pass_bounds(batch, size, packing, client) for batch in batches]
        return bounds, [pass_sizes(*each, packing, client) for each in zip(batches, bounds, strict=True)]

    def groups(self, step: int, works: list[list[ClientWork]]) -> list[list[int]]:
        """Home slots that share the passes of one local step; the same on every rank of the cluster.

        Args:
            works: of the cluster's clients, by home rank and slot.
        """
        found: list[list[int]] = []
        used_P: list[int] = []
        for slot in range(max(map(len, works), default=0)):
            size_P = [home[slot].largest_pass(step) if slot < len(home) else 0 for home in works]
            more_P = [used + size for used, size in zip(used_P, size_P, strict=True)] if found else []
            if not found or (self.together is not None and max(more_P) > self.together):
                found.append([])
                more_P = size_P
            found[-1].append(slot)
            used_P = more_P
        return found


def shortage(everyone: list[ClientWork], step: int, micro: int) -> OutOfMemory:
    """What did not fit of a pass; `everyone` are the clients in it on all ranks of the cluster, any of which says the same.

    A pass is shared where a rank has more than one client in it: clients that are alone on their ranks are in no smaller number
    to be had, whatever their slots, so of them only a step of their own can be cut.
    """
    # By what each has in this very pass; of equals the first by index, whom every rank and every start finds.
    largest = max(everyone, key=lambda work: (work.size(step, micro), -work.client.index))
    homes = [work.home for work in everyone]
    shared = [sum(work.size(step, micro) for work in everyone if work.home == home) for home in homes if homes.count(home) > 1]
    return OutOfMemory(largest.client, largest.size(step, micro), max(shared, default=None))
