"""Run spec: one resolution of a configuration to method, sizes, expert layout, tiers, blocks and cost, without a weight.

A start (`build`) and the planner go the same way, in the order in which mistakes can be told: `check_start` knows the
configuration alone, `resolve_spec` the outline of the model, too. What the one refuses the other does, in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedmoe_ds.clients.client import Client, counts_of
from fedmoe_ds.clients.optimizer import moment_bytes
from fedmoe_ds.clients.pooled import pooled_client
from fedmoe_ds.clients.tiers import Capacity, Tier, resolve_tiers
from fedmoe_ds.config import Config
from fedmoe_ds.data import ImageInput, check_task
from fedmoe_ds.data.forms import has_scores
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.channel_group_checks import check_choice, check_groups, check_planned_groups
from fedmoe_ds.federation.cost import CostModel
from fedmoe_ds.federation.device_check import check_devices
from fedmoe_ds.federation.expert_forms import check_router_input
from fedmoe_ds.federation.no_experts import as_meant, named
from fedmoe_ds.federation.pre_gate_check import check_pre_gate
from fedmoe_ds.federation.sampling import buffered, draw, participant_count, participants
from fedmoe_ds.federation.sequence_checks import check_length, check_packing, check_rotations
from fedmoe_ds.federation.task_metrics import check_task_metrics
from fedmoe_ds.foundation import planned_sparse, planned_task
from fedmoe_ds.foundation.expansion import expand
from fedmoe_ds.foundation.foundation import planned_config
from fedmoe_ds.foundation.outline import Outline
from fedmoe_ds.foundation.size import ModelSize, model_size
from fedmoe_ds.foundation.storage_type import of_type, resolved
from fedmoe_ds.kernels.frozen_layers import is_batch_invariant
from fedmoe_ds.methods import Method, ModelFacts, method_for, with_defaults
from fedmoe_ds.methods.private import drawn_by
from fedmoe_ds.methods.requirements import check_needs, refuse_zero_experts
from fedmoe_ds.model.adapter_bank import ROUTER_BIAS, BlockSpec
from fedmoe_ds.model.expert_layout import ExpertLayout, adapter_layout, check_shards, empty_layout, hosted_layout
from fedmoe_ds.model.install import adapter_blocks

ROW = 4
"""Rows of whole 16-byte units: a kernel's path may depend on the alignment of a row."""


@dataclass(frozen=True)
class RunSpec:
    """One configuration on one kind of device, resolved.

    Attributes:
        config: with the method's own defaults filled in, and resolved for a model without experts.
        method: it knows the model's facts.
        device: kind of device, `cpu` or `cuda`.
        model_type: transformers' name of the model's family.
        size: of the model.
        expert_layout: where the experts are; `held` are those of one shard.
        images: of an image classifier, else None.
        tiers: budget tiers of the federation.
        blocks: adapter tensors, of one client.
        cost: predicted FLOPs.
    """

    config: Config
    method: Method
    device: str
    model_type: str
    size: ModelSize
    expert_layout: ExpertLayout
    images: ImageInput | None
    tiers: list[Tier]
    blocks: list[BlockSpec]
    cost: CostModel

    def know(self, clients: Sequence[Client]) -> None:
        """Tell the method what it may ask about the data."""
        most = int(counts_of(clients, "sequences").max(initial=1))
        drawn = participant_count(len(clients), self.config.federation.participation)
        self.method.facts = replace(self.method.facts, sequences=most, clients=len(clients), participants=drawn)

    @property
    def bitwise(self) -> bool:
        """Whether this run promises equal bits on any topology."""
        return is_bitwise(self.config, self.device)

    @property
    def shares_passes(self) -> bool:
        """Whether all clients in flight on a rank go through the model together."""
        return shares_passes(self.config, self.model_type, self.device)

    @property
    def row_bytes(self) -> int:
        """Bytes of a number between the products of a pass."""
        apart = is_batch_invariant(self.model_type, self.config.foundation.dtype, self.device)
        return 4 if apart else self.size.bytes_per_parameter

    def drawn_among(self, clients: Sequence[Client], round_index: int) -> list[Client]:
        """The clients that are drawn for a round, in canonical order."""
        federation, seed = self.config.federation, self.config.seed
        if (buffer := buffered(self.config, len(clients))) is not None:
            # As many as arrive; who they are the virtual clock knows.
            return [clients[place] for place in draw(clients, buffer, seed, (round_index,), federation.sampling)]
        # An account of sampled clients holds against those alone who cannot know who was drawn.
        hidden = drawn_by(self.method)
        return participants(clients, federation.participation, seed, round_index, federation.sampling, hidden)

    def participants_among(self, clients: Sequence[Client], round_index: int) -> list[Client]:
        """Who trains in a round: the clients that are drawn, or the one that has the data of all."""
        members = self.drawn_among(clients, round_index)
        if self.method.pooled:
            return [pooled_client(clients, members, self.config.local, self.config.seed, round_index)]
        return members


def is_bitwise(config: Config, device: str) -> bool:
    """Whether a run on this kind of device (`cpu` or `cuda`) promises equal bits on any topology."""
    return config.execution.reproducible != "fast" and device == "cpu"


def check_promise(config: Config, device: str) -> None:
    """Refuse a start on this kind of device that asks for bits which nobody can promise there; a run that is only opened may
    have asked for them. Raises UserError."""
    # cuBLAS and torch's grouped products choose their kernel, and with it the order of a row's summands, by the number of rows
    # and of experts beside it, which the topology decides. A client in a pass of its own does not change that.
    if config.execution.reproducible == "bitwise" and device != "cpu":
        raise UserError(
            f"execution.reproducible: bitwise: on {device} torch and cuBLAS sum a row in an order that depends on what "
            "else a rank holds, so equal bits on any topology cannot be promised; use auto or fast, or topology.device=cpu"
        )


def shares_passes(config: Config, model_type: str, device: str) -> bool:
    """Whether all clients in flight go through the model together. In bitwise mode that takes kernels which keep rows apart;
    adapter experts beside a dense model have none."""
    apart = config.adapters.moe is None and is_batch_invariant(model_type, config.foundation.dtype, device)
    return not is_bitwise(config, device) or apart


def check_start(config: Config, device: str) -> tuple[Config, Method]:
    """The configuration with the method's defaults, and the method; checked as far as that goes before anything is loaded.

    Raises:
        UserError: method, mode, foundation, data and adapters do not go together.
    """
    config = of_known_type(config, device)
    config = as_meant(config, planned_sparse(config.foundation))
    method = method_for(config)
    config = with_defaults(config, method)
    # After the method's own defaults: what is checked is what will run.
    check_plan(config, is_bitwise(config, device))
    if (planned := planned_config(config.foundation)) is not None:
        check_pre_gate(config, method, planned)
    check_devices(config, method)
    return config, method


def resolve_spec(config: Config, method: Method, device: str, model: Outline, ep_size: int = 1, shard: int = 0) -> RunSpec:
    """Resolve what `check_start` returned against a model. `ep_size` and `shard` decide which experts are held.

    Raises:
        UserError: model, data, adapters, tiers and mode do not go together.
    """
    unknown, config = config.foundation.dtype == "auto", of_loaded_type(config, model)
    if unknown:
        method.check_config(config)
    check_model(config, model, device)
    # Once more: of a hub id nobody knew before whether it has experts.
    config = as_meant(config, bool(model.layers))
    check_needs(method, config.method.name, config)
    check_packing(config, model.model.config)
    expert_layout = resolve_expert_layout(config, model, ep_size, shard)
    if is_bitwise(config, device):
        check_widths(expert_layout, beside=config.adapters.moe is not None)
    # Before check and blocks: both are answered from these facts.
    size = model_size(model.model, model.layers, model.expansion)
    method.facts = facts_of(config, expert_layout, size, model)
    method.check(method.facts)
    check_pre_gate(config, method, model.model.config)
    further, scored = len(method.facts.expanded), has_scores(config.data.form)
    full = Capacity(expert_layout.top_k, config.adapters.rank, expert_layout.num_experts, size.depth, further)
    tiers = resolve_tiers(config.federation, full, method.spends)
    every = adapter_blocks(model.model, expert_layout, config.adapters, method.rescaler, scored, model.expansion)
    blocks = method.blocks(every)
    check_owned(config, blocks)
    check_choice(config, method, model)
    if any(block.name == ROUTER_BIAS for block in blocks):
        refuse_zero_experts(config)
    return RunSpec(
        config=config,
        method=method,
        device=device,
        model_type=model.model.config.model_type,
        size=size,
        expert_layout=expert_layout,
        images=model.images,
        tiers=tiers,
        blocks=blocks,
        cost=CostModel.of(size, expert_layout, blocks, positions(model.images), method.ensembles),
    )


def of_known_type(config: Config, device: str) -> Config:
    """With the type of the frozen weights in place of `auto`, unless the model is a hub id on CUDA, which nobody knows yet."""
    # On a CPU no model need be known.
    planned = planned_config(config.foundation) if device != "cpu" and config.foundation.dtype == "auto" else None
    return config.model_copy(update={"foundation": resolved(config.foundation, device, planned)})


def of_loaded_type(config: Config, model: Outline) -> Config:
    """With the type that the model was built in, in place of `auto`."""
    return config.model_copy(update={"foundation": of_type(config.foundation, next(model.model.parameters()).dtype)})


def check_model(config: Config, model: Outline, device: str) -> None:
    """Data, task metrics and lengths go together with the model, whatever is trained. Raises UserError."""
    check_task(model.task, config.data, model.images)
    check_router_input(config, model.task)
    check_task_metrics(config, model.task)
    check_length(config, model.model.config)
    check_rotations(config, model.model.config, is_bitwise(config, device))


def facts_of(config: Config, expert_layout: ExpertLayout, size: ModelSize, model: Outline) -> ModelFacts:
    """What methods may ask about the model."""
    images, expansion = model.images, model.expansion
    return ModelFacts(
        expert_layout.top_k,
        expert_layout.num_experts,
        config.adapters.rank,
        config.seed,
        expert_layout.renormalised,
        tuple(expert_layout.layers),
        config.local,
        size.depth,
        size.vocabulary if images is None else images.classes,
        size.hidden,
        labelled=config.data.labels == "shown",
        expanded=() if expansion is None else expansion.layers,
    )


def check_owned(config: Config, blocks: list[BlockSpec]) -> None:
    """What a client holds of whole layers: values, gradients and moments, within `execution.owned_gib`. Raises UserError."""
    numbers, most = sum(len(spec.layers) * math.prod(spec.item) for spec in blocks if spec.owned), config.execution.owned_gib
    size = numbers * (2 * 4 + moment_bytes(config.local))
    if size > most * 2**30:
        raise UserError(
            f"execution.owned_gib: {most:g}: whole layers take {size / 2**30:.3g} GiB of each client in flight; use fewer "
            "foundation.expand.blocks, or a larger bound (fedmoe plan says what fits)"
        )


def check_plan(config: Config, bitwise: bool) -> None:
    """Whether mode, foundation, data and adapters go together, as far as that is known before anything is loaded."""
    if bitwise and config.execution.threads > 1:
        raise UserError(
            f"execution.threads: {config.execution.threads}: bitwise mode needs 1: threads cut a kernel's work in the middle "
            "of a row; use threads=1, or reproducible=fast"
        )
    task = planned_task(config.foundation)
    # None: a hub id that is not downloaded yet; resolve_spec checks it again with the model at hand.
    if task is not None:
        check_task(task, config.data)
        check_router_input(config, task)
        check_task_metrics(config, task)
    planned = planned_config(config.foundation)
    check_length(config, planned)
    check_rotations(config, planned, bitwise)
    check_packing(config, planned)
    check_planned_groups(config)
    if planned is not None and config.foundation.expand is not None:
        expand(planned, config.foundation.expand, named(config))
    sparse = planned_sparse(config.foundation)
    if sparse is not None:
        check_adapters(config, sparse)
    if config.adapters.moe is not None:
        check_shards(config.adapters.moe, config.topology.ep_size)


def check_adapters(config: Config, sparse: bool) -> None:
    """Adapter experts, and LoRA on feed-forward projections, stand beside dense models and nowhere else. Raises UserError."""
    if sparse and config.adapters.moe is not None:
        raise UserError(
            f"adapters.moe: {named(config)} has experts of its own; drop the section, or use a dense foundation (tiny-llama)"
        )
    if sparse and config.adapters.feed_forward:
        raise UserError(
            f"adapters.feed_forward: {config.adapters.feed_forward[0]}: {named(config)} has experts in place of a feed-forward "
            "block; drop the key: adapters.experts trains them"
        )


def resolve_expert_layout(config: Config, model: Outline, ep_size: int, shard: int) -> ExpertLayout:
    """Where the experts of a run are. Raises UserError when the model and `adapters.moe` do not go together."""
    check_adapters(config, bool(model.layers))
    check_groups(config, model)
    if model.layers:
        return hosted_layout(model.layers)
    if config.adapters.moe is None:
        return empty_layout(model.sites)
    return adapter_layout(model.sites, config.adapters.moe, ep_size, shard)


def positions(images: ImageInput | None) -> int:
    """Token rows that the blocks see per target of one epoch, which is how data count: 1 for text."""
    return 1 if images is None else images.positions


def check_widths(expert_layout: ExpertLayout, beside: bool) -> None:
    """Bitwise mode needs rows that start on 16 bytes; those of adapter experts (`beside`) are widened. Raises UserError."""
    if expert_layout.width % ROW or (expert_layout.ffn % ROW and not beside):
        raise UserError(
            f"execution.reproducible: bitwise: the model's widths {expert_layout.width} and {expert_layout.ffn} must be "
            f"multiples of {ROW} (rows must start on 16 bytes); use fast"
        )
