"""Storage: what a run writes in a round, reads at a start, and keeps of its clients, by the planner's arithmetic on blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedmoe_ds.model.adapter_bank import shared_blocks
from fedmoe_ds.planner.activations import FP32
from fedmoe_ds.planner.memory import COPY, PERSONAL, outlasting, parameters_per_client
from fedmoe_ds.planner.prediction import Prediction
from fedmoe_ds.planner.workload import Job
from fedmoe_ds.planner.world import World

RECORD_BYTES, RECORD_S = 46, (0.02, 3.4e-6)
"""Bytes of a row of a round's table of clients; rank 0's seconds for any table, and for each row (docs/log.md, very many
clients)."""
COLUMN_BYTES = 5 * 8 + 8 + 64
"""Of one client in the memory of every rank: five columns, a place in the list of names, and a name."""
SPILLED, COLUMNS = "personal state in mapped files", "columns of all clients"


@dataclass(frozen=True)
class Storage:
    """Bytes on the shared file system, of the whole job.

    Attributes:
        checkpoint: of one checkpoint: global adapters, the server's state, rows of the round's clients; `rows`: of these alone.
        record: of a round's figures.
        start: read by a start: every host its ranks' weights once, and a checkpoint.
    """

    checkpoint: float
    rows: float
    record: float
    start: float

    @classmethod
    def of(cls, job: Job, world: World, drawn: int) -> Storage:
        topology = job.config.topology.model_copy(update={"ep_size": 1, "clusters": None})
        # As one rank with all experts: a checkpoint holds every expert's adapters once.
        whole = replace(job, config=job.config.model_copy(update={"topology": topology}))
        lasting = outlasting(whole, drawn, drawn)
        adapters = FP32 * sum(parameters_per_client(shared_blocks(job.blocks), job.expert_layout.num_experts))
        rows = lasting.get(PERSONAL, 0)
        checkpoint = adapters + rows + lasting.get("server state", 0)
        size, ep_size = job.size, job.config.topology.ep_size
        host = (
            size.dense_parameters + size.pool_parameters * min(1.0, world.ranks_per_host / ep_size)
        ) * size.bytes_per_parameter
        return cls(checkpoint, rows, RECORD_BYTES * drawn, world.hosts * host + checkpoint)


def kept(job: Job, prediction: Prediction, world: World, drawn: int) -> tuple[dict[str, int], dict[str, int], int]:
    """Memory per rank, host memory per rank beside a device, and bytes per rank in mapped files.

    The planner books the personal state of all clients on every rank. A rank keeps that of its cluster's clients and of those
    that it trains, in memory up to `execution.client_state_gib`; a checkpoint copies the rows that a round has changed.
    """
    memory, host = dict(prediction.memory), dict(prediction.host_memory)
    clusters = world.ranks // job.config.topology.ep_size
    trained = math.ceil(drawn / clusters)
    place = host if host else memory
    place[COLUMNS] = COLUMN_BYTES * len(job.clients)
    spilled = 0
    if PERSONAL in place:
        home = outlasting(job, math.ceil(len(job.clients) / clusters) + trained, drawn)[PERSONAL]
        place[PERSONAL] = min(home, int(job.config.execution.client_state_gib * 2**30))
        spilled = home - place[PERSONAL]
    if COPY in place:
        place[COPY] = outlasting(job, trained, drawn)[COPY]
    return memory, host, spilled
