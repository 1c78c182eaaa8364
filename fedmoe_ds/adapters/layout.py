"""Layout: which blocks a run trains, their initial values, and the layers that read them.

Initial values follow PEFT: A is uniform in +-1/sqrt(fan_in), B is zero, so that the first forward pass is the foundation's.
Every tensor is drawn from its own address (seed, canonical key), so neither expert-parallel size nor layer order matters.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fedmoe_ds.adapters.attention import ClientLoRALinear, Projection, find_projections
from fedmoe_ds.adapters.bank import Bank, BlockSpec
from fedmoe_ds.config import AdapterConfig
from fedmoe_ds.experts.execution import Execution
from fedmoe_ds.experts.layer import DOWN_A, DOWN_B, GATE_UP_A, GATE_UP_B, RESCALER, ROUTER, FederatedMoELayer
from fedmoe_ds.foundation import Foundation, HostedLayer
from fedmoe_ds.randomness import torch_generator


def adapter_blocks(model: nn.Module, hosted: list[HostedLayer], config: AdapterConfig, rescaler: str | None) -> list[BlockSpec]:
    """The blocks of a run. `rescaler` is None, `client` (one scalar per client) or `layer` (one per client and layer)."""
    layers, first = tuple(layer.index for layer in hosted), hosted[0]
    rank, width, ffn = config.rank, first.hidden_size, first.ffn_hidden_size
    blocks: list[BlockSpec] = []
    if config.experts:
        shapes = {GATE_UP_A: (rank, width), GATE_UP_B: (2 * ffn, rank), DOWN_A: (rank, ffn), DOWN_B: (width, rank)}
        blocks += [BlockSpec(name, layers, item, expert=True) for name, item in shapes.items()]
    blocks += _attention_blocks(find_projections(model, config.attention), rank)
    if config.router == "train":
        blocks.append(BlockSpec(ROUTER, layers, (first.num_experts, width)))
    if rescaler is not None:
        places = layers if rescaler == "layer" else (-1,)
        blocks.append(BlockSpec(RESCALER, places, (1,), personal=True, decay=False))
    return blocks


def _attention_blocks(projections: list[Projection], rank: int) -> list[BlockSpec]:
    by_name: dict[str, list[Projection]] = {}
    for projection in projections:
        by_name.setdefault(projection.name, []).append(projection)
    blocks = []
    for group in by_name.values():
        assert len({(p.width_in, p.width_out) for p in group}) == 1, "one shape per projection name"
        layers = tuple(p.layer for p in group)
        blocks.append(BlockSpec(group[0].block_a, layers, (rank, group[0].width_in)))
        blocks.append(BlockSpec(group[0].block_b, layers, (group[0].width_out, rank)))
    return blocks


def initial_bank(
    foundation: Foundation, blocks: list[BlockSpec], seed: int, first_expert: int, device: torch.device | None = None
) -> Bank:
    """The global adapters before the first round: a bank with one client slot and no gradients.

    Personal blocks are present but mean nothing here; evaluation of a tier fills them with the tier's mean.
    """
    bank = Bank(blocks, len(foundation.layers[0].experts), clients=1, device=device, with_grad=False)
    routers = {hosted.index: hosted.module.router.gate.weight for hosted in foundation.layers}
    for key, spec, value in bank.items(first_expert):
        if spec.name == ROUTER:
            value.copy_(routers[int(key.split(".")[1])])
        elif spec.name.endswith("lora_A"):
            bound = 1.0 / math.sqrt(value.shape[-1])
            drawn = torch.empty(value.shape).uniform_(-bound, bound, generator=torch_generator(seed, "adapter-init", key))
            value.copy_(drawn)  # drawn on the CPU, so that every device starts from the same bits
    return bank


def install(foundation: Foundation, config: AdapterConfig, execution: Execution) -> None:
    """Put the federated layers and the attention adapters into the model. They read `execution` while a pass runs."""
    model = foundation.model
    for hosted in foundation.layers:
        _replace(model, hosted.name, FederatedMoELayer(hosted, execution))
    for projection in find_projections(model, config.attention):
        base = model.get_submodule(projection.path)
        assert isinstance(base, nn.Linear)
        _replace(model, projection.path, ClientLoRALinear(base, projection, execution))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
