"""Installation: which blocks a run trains, their initial values, and the layers that read them.

Initial values follow PEFT: A is uniform in +-1/sqrt(fan_in), B is zero, so that the first forward pass is the foundation's.
Every tensor is drawn from its own address (seed, canonical key), so neither expert-parallel size nor layer order matters.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fedmoe_ds.config import AdapterConfig, MoEAdapterConfig
from fedmoe_ds.foundation import Foundation
from fedmoe_ds.foundation.channel_groups import GroupedLayer
from fedmoe_ds.foundation.expansion import Expansion
from fedmoe_ds.foundation.pre_gate import pre_gate_of
from fedmoe_ds.kernels.frozen_layers import replace_frozen
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.adapter_moe_layer import INNER, OUTER, ROUTER_SCORE, SHARED_INNER, SHARED_OUTER, AdapterMoELayer
from fedmoe_ds.model.channel_group_layer import ChannelGroupLayer
from fedmoe_ds.model.client_head import head_blocks, head_values
from fedmoe_ds.model.client_layers import first_values, owned_blocks, put_client_layers
from fedmoe_ds.model.expert_layout import ExpertLayout
from fedmoe_ds.model.lora_linear import ClientLoRALinear, Projection, find_projections
from fedmoe_ds.model.moe_layer import DOWN, DOWN_A, DOWN_B, GATE_UP, GATE_UP_A, GATE_UP_B, RESCALER, ROUTER, FederatedMoELayer
from fedmoe_ds.model.pass_context import Execution
from fedmoe_ds.model.pre_gated import initial_router, pre_gate_blocks
from fedmoe_ds.randomness import torch_generator


def adapter_blocks(
    model: nn.Module,
    expert_layout: ExpertLayout,
    config: AdapterConfig,
    rescaler: str | None,
    scored: bool = False,
    expansion: Expansion | None = None,
) -> list[BlockSpec]:
    """The blocks of a run.

    Args:
        rescaler: None, `client` (one scalar per client) or `layer` (one per client and layer).
        scored: whether every sample has a score, which a router may see.
        expansion: where the model has further layers, whose weights are blocks.
    """
    layers, rank, width, ffn = tuple(expert_layout.layers), config.rank, expert_layout.width, expert_layout.ffn
    blocks: list[BlockSpec] = []
    # Two matrices: adapter experts, or groups of the channels of a block without a gate; both are trained whole.
    if config.moe is not None or (config.experts and layers and expert_layout.matrices == 2):
        blocks += [BlockSpec(INNER, layers, (ffn, width), expert=True), BlockSpec(OUTER, layers, (width, ffn), expert=True)]
    elif config.experts:
        if config.expert_training == "full":
            shapes = {GATE_UP: (2 * ffn, width), DOWN: (width, ffn)}
        else:
            shapes = {GATE_UP_A: (rank, width), GATE_UP_B: (2 * ffn, rank), DOWN_A: (rank, ffn), DOWN_B: (width, rank)}
        blocks += [BlockSpec(name, layers, item, expert=True) for name, item in shapes.items()]
    # The order of blocks is part of a run: gradient norms are summed, and sums laid out, in it.
    blocks += _projection_blocks(find_projections(model, config), rank)
    gate = pre_gate_of(model)
    if config.moe is not None:
        blocks += _beside_experts(layers, width, config.moe, scored)
    elif config.router == "train" and gate is not None:
        blocks += pre_gate_blocks(gate)
    elif config.router == "train":
        blocks.append(BlockSpec(ROUTER, layers, (expert_layout.num_experts, width)))
    blocks += [] if expansion is None else owned_blocks(model, expansion)
    if config.head == "train":
        blocks += head_blocks(model)
    # Without experts there is no output for it to scale.
    if rescaler is not None and layers:
        where = layers if rescaler == "layer" else (-1,)
        blocks.append(BlockSpec(RESCALER, where, (1,), personal=True, decay=False))
    return blocks


def _beside_experts(layers: tuple[int, ...], width: int, moe: MoEAdapterConfig, scored: bool) -> list[BlockSpec]:
    """Router and shared experts, which are on a client's home rank alone."""
    routed, shared = moe.experts + moe.zero, moe.shared * moe.width
    blocks = [BlockSpec(ROUTER, layers, (routed, width))]
    if scored and moe.router_input == "sample":
        blocks.append(BlockSpec(ROUTER_SCORE, layers, (routed, 1)))
    if shared:
        blocks += [BlockSpec(SHARED_INNER, layers, (shared, width)), BlockSpec(SHARED_OUTER, layers, (width, shared))]
    return blocks


def _projection_blocks(projections: list[Projection], rank: int) -> list[BlockSpec]:
    # A block stacks one projection over the layers that have it, so that the optimizer takes them in one step.
    by_name: dict[str, list[Projection]] = {}
    for projection in projections:
        by_name.setdefault(projection.block_a, []).append(projection)
    blocks = []
    for group in by_name.values():
        assert len({(p.width_in, p.width_out) for p in group}) == 1, "one shape per projection name"
        layers = tuple(p.layer for p in group)
        blocks.append(BlockSpec(group[0].block_a, layers, (rank, group[0].width_in)))
        blocks.append(BlockSpec(group[0].block_b, layers, (group[0].width_out, rank)))
    return blocks


def initial_bank(
    foundation: Foundation,
    blocks: list[BlockSpec],
    seed: int,
    held: range,
    device: torch.device | None = None,
    zero_head: bool = False,
) -> Bank:
    """The global adapters before the first round: a bank with one client slot and no gradients.

    A trained head begins as the foundation's, or with `zero_head` as nothing.

    Personal blocks hold what every client starts from; later, evaluation fills them with a client's or with a tier's mean.
    """
    bank = Bank(blocks, len(held), clients=1, device=device, with_grad=False)
    copied = _copied_values(foundation, held.start) | first_values(foundation, blocks)
    copied |= {} if zero_head else head_values(foundation.model)
    # Each tensor by its own key: a rank fills in only the experts it holds, and their bits do not depend on which these are.
    for key, spec, value in bank.items(held.start, with_personal=True):
        if key in copied:
            value.copy_(copied[key])
        # What is not named here stays zero: B, V, what further layers put out, and rescalers before a method sets them.
        elif spec.name.endswith("lora_A") or spec.name in (INNER, SHARED_INNER, ROUTER):
            value.copy_(drawn_a(seed, key, value.shape))
    return bank


def drawn_a(seed: int, key: str, shape: torch.Size, *address: int) -> torch.Tensor:
    """A fresh matrix, uniform in +-1 / sqrt(input width); drawn on the CPU, so that every device starts from the same bits."""
    bound = 1.0 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=torch_generator(seed, "adapter-init", key, *address))


def _copied_values(foundation: Foundation, first_expert: int) -> dict[str, torch.Tensor]:
    """What starts as a copy of the foundation's own weights, by canonical key."""
    gate = pre_gate_of(foundation.model)
    found = {} if gate is None else initial_router(gate)
    for hosted in foundation.layers:
        if not isinstance(hosted, GroupedLayer):
            found[f"layers.{hosted.index}.{ROUTER}"] = hosted.module.router.gate.weight
        names = ("gate_up.weight", "down.weight") if hosted.gated else ("inner.weight", "outer.weight")
        for e in range(len(hosted.experts)):
            place = f"layers.{hosted.index}.experts.{first_expert + e}"
            found |= {f"{place}.{name}": weight[e] for name, weight in zip(names, (hosted.w13, hosted.w2), strict=True)}
    return found


def base_weights(foundation: Foundation, first_expert: int) -> dict[str, torch.Tensor]:
    """The frozen weights that LoRA pairs stand on, by `<key of the pair>.base`: views of what the model computes with."""
    found = {}
    for hosted in foundation.layers:
        for e in range(len(hosted.experts)):
            place = f"layers.{hosted.index}.experts.{first_expert + e}"
            found[f"{place}.gate_up.base"], found[f"{place}.down.base"] = hosted.w13[e], hosted.w2[e]
    for module in foundation.model.modules():
        if isinstance(module, ClientLoRALinear):
            found[module.projection.weight_key] = module.base.weight
    return found


def install(foundation: Foundation, config: AdapterConfig, execution: Execution) -> None:
    """Put the federated layers and the adapters of projections into the model. They read `execution` while a pass runs."""
    model = foundation.model
    replace_frozen(model)
    if foundation.expansion is not None:
        put_client_layers(model, foundation.expansion, execution)
    gate = pre_gate_of(model)
    for hosted in foundation.layers:
        if isinstance(hosted, GroupedLayer):
            _replace(model, hosted.name, ChannelGroupLayer(hosted, execution))
        else:
            _replace(model, hosted.name, FederatedMoELayer(hosted, execution, gate))
    for projection in find_projections(model, config):
        base = model.get_submodule(projection.path)
        assert isinstance(base, nn.Linear)
        # The projection stays inside the adapter as `base`, where `base_weights` finds the weight that FLoRA merges into.
        _replace(model, projection.path, ClientLoRALinear(base, projection, execution))
    # After the projections: a feed-forward block is wrapped with the adapters that it may have by now.
    if config.moe is None:
        return
    for site in foundation.sites:
        site.replace(model, AdapterMoELayer(site.module(model), site.index, config.moe, execution))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
