"""Memory: what one rank will hold, estimated before anything is allocated.

Legend: L layers, E experts held by a rank, C clients, D model width, F expert width, R adapter rank, T token rows of a pass,
K top-k.

Everything but activations is exact arithmetic on shapes. Activations are counted tensor by tensor for one pass (what forward
keeps for backward) and leave out allocator slack and kernel scratch space.
"""

from __future__ import annotations

import math

from fedmoe_ds.adapters.bank import BlockSpec
from fedmoe_ds.config import Config
from fedmoe_ds.foundation.size import ModelSize

FP32 = 4


def parameters_per_client(blocks: list[BlockSpec], experts: int) -> tuple[int, int]:
    """(expert, dense) trainable numbers of one client on one rank that holds `experts` experts."""
    expert = sum(len(b.layers) * experts * math.prod(b.item) for b in blocks if b.expert)
    dense = sum(len(b.layers) * math.prod(b.item) for b in blocks if not b.expert)
    return expert, dense


def estimate(config: Config, model: ModelSize, blocks: list[BlockSpec], home_clients: int, bitwise: bool) -> dict[str, int]:
    """Bytes per rank by purpose. `home_clients` are the client slots of one rank; the wave has ep_size times as many."""
    ep_size = config.topology.ep_size
    expert, dense = parameters_per_client(blocks, model.experts // ep_size)
    moments = 2 if config.local.optimizer == "adamw" else int(config.local.momentum > 0)
    in_flight = home_clients * ep_size * expert + home_clients * dense
    sum_bytes = 16 if bitwise else 4
    return {
        "dense part": model.dense_parameters * model.bytes_per_parameter,
        "own experts": model.pool_parameters // ep_size * model.bytes_per_parameter,
        "global adapters": (expert + dense) * FP32,
        "adapters in flight": in_flight * FP32 * 2,
        "client optimizer": in_flight * FP32 * moments,
        "round sums": (expert + dense) * sum_bytes,
        "activations of a pass": activations(config, model, home_clients, bitwise),
    }


def activations(config: Config, model: ModelSize, home_clients: int, bitwise: bool) -> int:
    """Bytes kept for the backward pass at the largest cap, full sequences."""
    clients = 1 if bitwise else home_clients
    sequences = config.execution.micro_batch_size or config.local.batch_size
    tokens = clients * sequences * config.data.sequence_length
    dense = 12 * model.hidden + 4 * config.adapters.rank
    routed = model.top_k * (model.hidden + 2 * model.ffn + 2 * config.adapters.rank + 4) + 4 * model.experts
    per_layer = tokens * (dense + routed)
    kept_layers = 1 if config.execution.activation_checkpointing else model.layers
    checkpoints = tokens * model.hidden * model.layers if config.execution.activation_checkpointing else 0
    logits = 3 * tokens * model.vocabulary
    return (kept_layers * per_layer + checkpoints + logits) * max(model.bytes_per_parameter, 2)


def format_bytes(count: float) -> str:
    """A byte count in the largest fitting binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
