"""Storage: what a run writes in a round and reads at a start, by the planner's arithmetic on blocks; its columns of clients."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedmoe_ds.model.adapter_bank import shared_blocks
from fedmoe_ds.planner.activations import FP32
from fedmoe_ds.planner.client_state import kept_blocks, row_bytes
from fedmoe_ds.planner.memory import outlasting
from fedmoe_ds.planner.parameters import parameters_per_client
from fedmoe_ds.planner.prediction import Prediction
from fedmoe_ds.planner.workload import Job
from fedmoe_ds.planner.world import World

RECORD_BYTES, RECORD_S = 46, (0.02, 3.4e-6)
"""Bytes of a row of a round's table of clients; rank 0's seconds for any table, and for each row (docs/log.md, very many
clients)."""
COLUMN_BYTES = 5 * 8 + 8 + 64
"""Of one client in the memory of every rank: five columns, a place in the list of names, and a name."""
COLUMNS = "columns of all clients"


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
        rows = drawn * row_bytes(kept_blocks(whole), job.expert_layout.num_experts)
        checkpoint = adapters + rows + lasting.get("server state", 0)
        size, ep_size = job.size, job.config.topology.ep_size
        host = (
            size.dense_parameters + size.pool_parameters * min(1.0, world.ranks_per_host / ep_size)
        ) * size.bytes_per_parameter
        return cls(checkpoint, rows, RECORD_BYTES * drawn, world.hosts * host + checkpoint)


def with_columns(prediction: Prediction, clients: int) -> tuple[dict[str, int], dict[str, int]]:
    """Memory per rank and host memory per rank beside a device: the plan's, and the columns that every rank has of all clients,
    which are no small thing among millions."""
    memory, host = dict(prediction.memory), dict(prediction.host_memory)
    (host if host else memory)[COLUMNS] = COLUMN_BYTES * clients
    return memory, host
