"""Execution: the bank, the expert pool and the federated layers of a run, as one rank puts them into its foundation."""

from __future__ import annotations

from typing import Any

import torch

from fedmoe_ds.distributed.topology import Topology
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.foundation import Foundation
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.adapter_dropout import AdapterDropout
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.install import install
from fedmoe_ds.model.pass_context import Execution
from fedmoe_ds.model.per_client_attention import use_per_client_attention


def execution_of(spec: RunSpec, topology: Topology, in_flight: int, device: torch.device) -> Execution:
    """What the layers of a run share on one rank, with room for `in_flight` clients of its cluster."""
    config, experts, ep_size = spec.config, spec.expert_layout.num_experts, topology.layout.ep_size
    pool = Pool(
        topology.ep_group,
        ep_size,
        experts,
        in_flight,
        merge=spec.shares_passes,
        shard=topology.shard,
        in_halves=config.execution.expert_halves,
    )
    # Sized once for the largest wave: a buffer that grew later could fail in the middle of a run. Expert blocks have slots for
    # all clients of the wave, dense ones only for those at home on this rank.
    bank = Bank(spec.blocks, experts // ep_size, pool.slots.at_home[topology.shard], pool.wave_clients, device)
    return Execution(
        bank,
        pool,
        scale=config.adapters.alpha / config.adapters.rank,
        rescaler=spec.method.rescaler is not None,
        balance=config.local.balance_loss,
        z=config.local.z_loss,
        kernels=config.execution.adapter_kernels,
        dropout=AdapterDropout(config.adapters.dropout, config.seed) if config.adapters.dropout else None,
        layers=list(spec.expert_layout.layers),
        held_softmax=spec.method.held_softmax,
        candidates=spec.method.candidates,
    )


def adapted_model(spec: RunSpec, foundation: Foundation, execution: Execution) -> AdaptedModel:
    """Put the federated layers of a run into its foundation."""
    config = spec.config
    install(foundation, config.adapters, execution)
    # Only a shared pass mixes the lengths of clients, and only bitwise mode minds how attention is padded.
    if (spec.bitwise and spec.shares_passes) or config.execution.packing or spec.method.attends:
        use_per_client_attention(foundation.model, execution)
    return AdaptedModel(foundation, execution, config.execution.packing)


def enable_checkpointing(foundation: Foundation) -> None:
    """Recompute each decoder layer in the backward pass. Only the layers' own switch is set: nothing else enters train mode."""
    model: Any = foundation.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", None) is True:
            module.training = True
