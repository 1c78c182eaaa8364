"""Client state: what a rank keeps of single clients between their rounds, in its memory and in files beyond it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmoe_ds.checkpoint.client_rows import PIECE
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.methods.client_drift import client_variables
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.planner.activations import FP32
from fedmoe_ds.planner.parameters import parameters_per_client

_FP64 = 8
_OF_CLIENT, _OF_ARRAY = 256, 112
"""Bytes that Python takes for the dictionary of a client's numbers and its place among all, and numpy for an array."""
_DEVIATIONS = 3
"""By how much the cluster with most clients that were ever drawn is taken to exceed the mean."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one rank: in memory, and in mapped files below the cache, on a disk of its host."""

    memory: int = 0
    files: int = 0


def kept_blocks(spec: RunSpec) -> list[BlockSpec]:
    """The blocks of a client's row."""
    own = [block for block in spec.blocks if block.personal] + spec.method.client_state(spec.blocks)
    return own + client_variables(spec.config.local, spec.blocks)


def row_bytes(blocks: list[BlockSpec], experts: int) -> int:
    """Of a client's row of these blocks on a rank with so many experts."""
    return FP32 * sum(parameters_per_client(blocks, experts))


def memory_bytes(spec: RunSpec) -> int:
    """Of what the server knows of a client (`Method.memory`): few numbers, so that most of it is what holds them."""
    shapes = spec.method.memory().values()
    return _OF_CLIENT + sum(_OF_ARRAY + _FP64 * math.prod(shape) for shape in shapes) if shapes else 0


def client_state(spec: RunSpec, clients: int, drawn: int, clusters: int, trained_here: int | None = None) -> Kept:
    """What the fullest rank keeps of `clients`, of whom `drawn` train in a round, at most.

    Args:
        trained_here: clients of a round that one cluster trains; None: an even share.
    """
    row = row_bytes(kept_blocks(spec), spec.expert_layout.num_experts // spec.config.topology.ep_size)
    # Known of all that were ever trained, on every rank: as if there were one cluster.
    known = memory_bytes(spec) * rows_at_home(spec, clients, drawn, 1)
    if not row:
        return Kept(known)
    at_home = rows_at_home(spec, clients, drawn, clusters)
    guests = math.ceil(drawn / clusters) if trained_here is None else trained_here
    rows = (at_home + guests) * row
    memory = min(rows, int(spec.config.execution.client_state_gib * 2**30))
    # A file is written from rows end to end and from their blocks; rows that travel leave and arrive at the same time.
    pieces = 2 if clusters == 1 else 4
    return Kept(known + memory + row + pieces * max(row, min(PIECE, at_home * row)), rows - memory)


def rows_at_home(spec: RunSpec, clients: int, drawn: int, clusters: int) -> int:
    """Clients of the fullest cluster that are trained at all: nobody else has a row."""
    federation = spec.config.federation
    most = min(math.ceil(clients / clusters), drawn * federation.rounds)
    # Draws by size or budget may prefer the clients of one cluster, and a plan may name others than were drawn.
    if federation.sampling != "uniform" or spec.method.overrides("plan"):
        return most
    mean = clients / clusters * (1 - (1 - drawn / clients) ** federation.rounds)
    return min(most, math.ceil(mean + _DEVIATIONS * math.sqrt(mean)))
