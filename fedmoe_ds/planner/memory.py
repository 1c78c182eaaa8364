"""Memory: what one rank will hold, estimated before anything is allocated.

Everything but activations is exact arithmetic on shapes; those are counted tensor by tensor in `activations.py`.
"""

from __future__ import annotations

import math

from fedmoe_ds.aggregation.server_optimizer import server_moments
from fedmoe_ds.clients.optimizer import moment_bytes
from fedmoe_ds.federation.most_delay import most_delay
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.methods.client_drift import keeps_variables
from fedmoe_ds.model.adapter_bank import BlockSpec, base_block, lora_pairs, shared_blocks
from fedmoe_ds.planner.activations import FP32, activations
from fedmoe_ds.planner.client_state import client_state
from fedmoe_ds.planner.parameters import parameters_per_client

PASS = "activations of a pass"  # noqa: S105  (not a password)
COPY, PERSONAL, HOST_MOMENTS = "checkpoint's copy", "personal state", "moments on the host"


def estimate(
    spec: RunSpec, home: int, length: int, together: int, active: float | None = None, in_flight: int | None = None
) -> dict[str, int]:
    """Bytes per rank by purpose.

    Args:
        home: clients at home on the rank that has most.
        length: rows of a sequence or an image.
        together: clients of a rank that go through the model together.
        active: their mean number of active experts; None for the largest.
        in_flight: clients of the cluster's largest wave; None: as many as are configured and have a home.
    """
    config, model, ep_size = spec.config, spec.size, spec.config.topology.ep_size
    if in_flight is None:
        in_flight = min(config.execution.clients_in_flight or home * ep_size, home * ep_size)
    expert, dense = parameters_per_client(spec.blocks, spec.expert_layout.num_experts // ep_size)
    # Experts are sharded, so a rank holds its part for every client of the wave; dense adapters only for its own.
    numbers = in_flight * expert + home * dense
    # Where rows are narrower, products read copies of the adapters in the rows' type, made once per step.
    whole = spec.expert_layout.matrices == 2
    narrow = [b for b in spec.blocks if b.pair is not None or (b.expert and whole) or _matrix(b)]
    copied_expert, copied_dense = parameters_per_client(narrow, spec.expert_layout.num_experts // ep_size)
    copies = (in_flight * copied_expert + home * copied_dense) * (spec.row_bytes if spec.row_bytes < FP32 else 0)
    # Bitwise sums keep two int64 digits of every number.
    sum_bytes, weighing = 16 if spec.bitwise else 4, spec.method.weighing
    keyed = sum(map(math.prod, spec.method.statistics().values()))
    return {
        "dense part": (model.dense_parameters - model.owned) * model.bytes_per_parameter + model.pre_gate_bytes,
        "own experts": model.pool_parameters // ep_size * model.bytes_per_parameter,
        "global adapters": (expert + dense) * FP32,
        # Values and gradients.
        "adapters in flight": numbers * FP32 * 2 + copies,
        "client optimizer": _on_device(spec, in_flight, home),
        "round sums": ((expert + dense) * len(weighing.shares) * weighing.full + keyed) * sum_bytes,
        PASS: activations(spec, together, length, active),
    }


def _matrix(block: BlockSpec) -> bool:
    """Whether it is a matrix of further layers: products read a copy of it, norms do not."""
    return block.owned and len(block.item) > 1


def _moments(spec: RunSpec, in_flight: int, home: int) -> dict[str, int]:
    """Bytes of optimizer state of what is trained, by block."""
    held = spec.expert_layout.num_experts // spec.config.topology.ep_size
    each, found = moment_bytes(spec.config.local), {}
    for block in (block for block in spec.blocks if block.trained):
        clients = in_flight * held if block.expert else home
        found[block.name] = clients * len(block.layers) * math.prod(block.item) * each
    return found


def _on_device(spec: RunSpec, in_flight: int, home: int) -> int:
    """Bytes of optimizer state where steps are taken: all of it, or one layer of a block at a time where the host has it."""
    found = _moments(spec, in_flight, home)
    if spec.config.execution.moments_on == "device":
        return sum(found.values())
    layers = {block.name: len(block.layers) for block in spec.blocks}
    return max((size // layers[name] for name, size in found.items() if size), default=0)


def outlasting(
    spec: RunSpec,
    clients: int,
    drawn: int,
    clusters: int = 1,
    trained_here: int | None = None,
    in_flight: int | None = None,
) -> dict[str, int]:
    """Bytes per rank of what a method keeps of `clients`, of the `drawn` ones of a round, and for the server.

    And of moments on the host, and of the copy that a checkpoint is written from while the next round trains.

    Args:
        clusters: over which the clients are at home; on one cluster a rank keeps most.
        trained_here: clients of a round that one cluster trains; None: an even share.
        in_flight: clients of the cluster's largest wave; None: as many as are configured.
    """
    config, method, blocks = spec.config, spec.method, spec.blocks
    held = spec.expert_layout.num_experts // config.topology.ep_size
    # The server's own control or dual variables besides its moments, and the adapters of past rounds.
    server = len(server_moments(config.server)) + keeps_variables(config.local) + most_delay(spec)
    halves = [half for pair in lora_pairs(blocks) for half in pair] if method.collects else []
    merged = [base_block(a, b) for a, b in lora_pairs(blocks)] if method.absorbs else []
    shared = sum(parameters_per_client(shared_blocks(blocks), held))
    # Statistics, and which of their keys are known.
    shapes = method.statistics().values()
    keyed = sum(math.prod(shape) + shape[0] for shape in shapes)
    found = {
        "collected factors": drawn * sum(parameters_per_client(halves, held)),
        "server state": server * shared + sum(parameters_per_client(merged, held)) + keyed,
    }
    # What a device has is copied to its host, whether or not the run waits for the writer.
    if config.checkpoint.background or spec.device != "cpu":
        # Frozen weights are in no checkpoint, and clients' rows stand still while they are written from where they lie.
        adapters = sum(parameters_per_client([block for block in blocks if not block.personal], held))
        found[COPY] = adapters + found["server state"]
    kept = client_state(spec, clients, drawn, clusters, trained_here).memory
    lasting = {name: size for name, size in {PERSONAL: kept, **{n: c * FP32 for n, c in found.items()}}.items() if size}
    if config.execution.moments_on == "host":
        flight = min(config.execution.clients_in_flight or drawn, drawn) if in_flight is None else in_flight
        lasting[HOST_MOMENTS] = sum(_moments(spec, flight, math.ceil(flight / config.topology.ep_size)).values())
    return lasting


def format_bytes(count: float) -> str:
    """A byte count in the largest fitting binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
