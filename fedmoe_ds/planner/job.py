"""Job: everything about a run that does not depend on the world: shapes, clients and the lengths of their data.

Nothing is loaded: the model is built on the meta device from its config.json. A folder with only that file is enough; clients
then are assumed, because without the model's tokenizer nobody can count their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmoe_ds import cache
from fedmoe_ds.adapters.attention import find_projections
from fedmoe_ds.adapters.bank import BlockSpec
from fedmoe_ds.adapters.layout import adapter_blocks
from fedmoe_ds.clients.client import Capacity, Client, Tier, make_clients, resolve_tiers
from fedmoe_ds.clients.pooled import pooled_batches, pooled_client
from fedmoe_ds.clients.schedule import CostModel, participants
from fedmoe_ds.clients.steps import local_batches
from fedmoe_ds.config import Config, TopologyConfig
from fedmoe_ds.data import FederatedData, ImageInput, Sequences, check_task, prepare
from fedmoe_ds.errors import UserError
from fedmoe_ds.experts.places import Places
from fedmoe_ds.fit import check_length, check_plan, check_widths, facts_of, find_places, positions, shares_passes
from fedmoe_ds.foundation import planned_task, resolve_foundation
from fedmoe_ds.foundation.dense import feed_forward_sites, image_input, type_task
from fedmoe_ds.foundation.foundation import cache_folder
from fedmoe_ds.foundation.loading import build_on_meta, host_model
from fedmoe_ds.foundation.own_code import running, told
from fedmoe_ds.foundation.rowwise import independent_rows
from fedmoe_ds.foundation.size import ModelSize, model_size
from fedmoe_ds.foundation.tokenizing import has_tokenizer, load_tokenizer
from fedmoe_ds.methods import Method, method_for, with_defaults
from fedmoe_ds.native import fault
from fedmoe_ds.report import Progress

Counts = NDArray[np.int64]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Lengths:
    """Token rows and targets of every sample of an owner, int64 [n]."""

    rows: Counts
    targets: Counts

    @classmethod
    def of(cls, data: Sequences, images: ImageInput | None) -> Lengths:
        if images is not None:
            return cls(np.full(len(data), images.positions), np.ones(len(data), dtype=np.int64))
        rows = np.array([len(ids) for ids in data.input_ids], dtype=np.int64)
        return cls(rows, np.array([int(mask.sum()) for mask in data.loss_mask], dtype=np.int64))

    @classmethod
    def full(cls, count: int, length: int) -> Lengths:
        return cls(np.full(count, length), np.full(count, length - 1))

    def head(self, count: int | None) -> Lengths:
        return Lengths(self.rows[:count], self.targets[:count])


@dataclass(frozen=True)
class Data:
    """Who has how much. `assumed` says what was taken for granted where nothing could be counted, `omissions` what samples
    are left out or cut; each is one line or None."""

    train: Callable[[int], Lengths]
    holdout: Callable[[int], Lengths]
    global_holdout: Lengths
    assumed: str | None = None
    omissions: str | None = None


@dataclass(frozen=True)
class Job:
    """One configuration, resolved.

    Attributes:
        places: of all experts, as one rank would hold them.
        heads: attention heads of a layer.
        projections: attention projections with LoRA, per layer.
        head: numbers of the output matrix; `body`: of everything dense but it, the input embedding and the norms' worth.
        clients: of the federation; `pooled` is the one that trains where the method pools their data.
    """

    config: Config
    method: Method
    size: ModelSize
    places: Places
    blocks: list[BlockSpec]
    clients: list[Client]
    tiers: list[Tier]
    cost: CostModel
    heads: int
    projections: float
    head: int
    body: int
    images: ImageInput | None
    data: Data
    model_type: str

    def shares_passes(self, kind: str) -> bool:
        """Whether the clients in flight on a rank go through the model together."""
        return shares_passes(self.bitwise(kind), self.model_type, self.config, kind)

    def row_bytes(self, kind: str) -> int:
        """Bytes of a number between the products of a pass."""
        return 4 if independent_rows(self.model_type, self.config.foundation.dtype, kind) else self.size.bytes_per_parameter

    def bitwise(self, kind: str) -> bool:
        """Whether the run promises equal bits on this kind of device (`cpu` or `cuda`)."""
        return is_bitwise(self.config, kind)

    @property
    def length(self) -> int:
        """Rows of the longest sequence, or of an image."""
        return self.config.data.sequence_length if self.images is None else self.images.positions

    def participants(self, round_index: int) -> list[Client]:
        """Who trains in a round: the clients that are drawn, or the one that has their data."""
        if self.method.pooled:
            return [pooled_client(self.clients, self.drawn(round_index), self.config.local, self.config.seed, round_index)]
        return self.drawn(round_index)

    def drawn(self, round_index: int) -> list[Client]:
        """Who is drawn in a round."""
        federation = self.config.federation
        return participants(self.clients, federation.participation, self.config.seed, round_index, federation.sampling)

    @cached_property
    def _steps(self) -> dict[tuple[int, int], Steps]:
        return {}

    def steps(self, client: Client, round_index: int) -> Steps:
        """What a client trains on in a round, step by step."""
        key = (client.index, round_index)
        if key not in self._steps:
            self._steps[key] = _steps_of(self, client, round_index)
        return self._steps[key]


@dataclass(frozen=True)
class Steps:
    """One client's local steps in a round, [n] each: samples, longest sample, token rows, targets."""

    samples: Counts
    longest: Counts
    rows: Counts
    targets: Counts

    def __len__(self) -> int:
        return len(self.samples)


def _steps_of(job: Job, client: Client, round_index: int) -> Steps:
    local, seed = job.config.local, job.config.seed
    if job.method.pooled:
        lengths, batches = _everything(job), pooled_batches(job.clients, job.drawn(round_index), local, seed, round_index)
    else:
        lengths, batches = job.data.train(client.index), local_batches(client, local, seed, round_index)
    columns = [
        [len(batch), int(lengths.rows[batch].max()), int(lengths.rows[batch].sum()), int(lengths.targets[batch].sum())]
        for batch in batches
    ]
    return Steps(*np.array(columns, dtype=np.int64).reshape(-1, 4).T)


def _everything(job: Job) -> Lengths:
    parts = [job.data.train(client.index) for client in job.clients]
    return Lengths(np.concatenate([part.rows for part in parts]), np.concatenate([part.targets for part in parts]))


def is_bitwise(config: Config, kind: str) -> bool:
    """Whether a run of this configuration promises equal bits on this kind of device."""
    mode = config.execution.reproducible
    return mode == "bitwise" or (mode == "auto" and kind == "cpu")


def resolve(config: Config, assume: bool = True, kind: str = "cpu") -> Job:
    """Resolve a configuration.

    Args:
        kind: of device that the run is for, `cpu` or `cuda`: what it would refuse depends on it.
        assume: take clients for granted where the model folder holds no tokenizer, instead of refusing it.
    Raises:
        UserError: what a real start would refuse on any number of ranks.
    """
    fault.guard("this plan")
    method = method_for(config)
    config = with_defaults(config, method)
    check_plan(config, is_bitwise(config, kind))
    folder = _untrained_foundation(config)
    model = build_on_meta(folder, _DTYPES[config.foundation.dtype])
    layers = host_model(model, 1, 0)
    size = model_size(model, layers)
    sites = [] if layers else feed_forward_sites(model)
    places = find_places(config.model_copy(update={"topology": TopologyConfig()}), layers, sites, 0)
    if is_bitwise(config, kind):
        check_widths(places)
    full = Capacity(places.top_k, config.adapters.rank, places.num_experts)
    method.facts = facts_of(config, places)
    method.check(method.facts)
    task = planned_task(config.foundation) or type_task(model.config.model_type)
    images = image_input(model.config) if task == "image_classification" else None
    check_task(task, config.data, images)
    check_length(config, model.config)
    tiers = resolve_tiers(config.federation, full, method.spends)
    clients, data = _clients(config, folder, size, tiers, images, assume)
    if (ignored := cache.line([cache.passed_over()])) is not None:
        with Progress() as progress:
            progress.note(ignored)
    blocks = method.blocks(adapter_blocks(model, places, config.adapters, method.rescaler))
    head = model.config.num_labels * size.hidden if images else size.vocabulary * size.hidden
    embedding = 0 if images or model.config.tie_word_embeddings else size.vocabulary * size.hidden
    return Job(
        config=config,
        method=method,
        size=size,
        places=places,
        blocks=blocks,
        clients=clients,
        tiers=tiers,
        cost=CostModel.of(size, places, blocks, positions(images)),
        heads=model.config.num_attention_heads,
        projections=len(find_projections(model, config.adapters.attention)) / size.layers,
        head=head,
        body=size.dense_parameters - head - embedding,
        images=images,
        data=data,
        model_type=model.config.model_type,
    )


def _untrained_foundation(config: Config) -> Path:
    """The model folder; a built-in foundation is taken without its pre-training, which shapes and tokenizer do not need."""
    untrained = config.foundation.model_copy(update={"pretrain": config.foundation.pretrain.model_copy(update={"steps": 0})})
    with Progress() as progress:
        return resolve_foundation(untrained, config.seed, progress.note)


def _clients(
    config: Config, folder: Path, size: ModelSize, tiers: list[Tier], images: ImageInput | None, assume: bool
) -> tuple[list[Client], Data]:
    trust = config.foundation.trust_remote_code
    if assume and images is None and not has_tokenizer(folder, trust):
        return _assumed_clients(config, folder, tiers)
    if (line := told(folder, trust)) is not None:
        with Progress() as progress:
            progress.note(line)
    tokenizer, code = load_tokenizer(folder, size.vocabulary, trust) if images is None else None, running(folder, trust)
    data = prepare(config.data, config.seed, tokenizer, cache_folder(config.foundation, "data"), code)
    return make_clients(data, config.federation, tiers, config.seed), _counted(data, images)


def _counted(data: FederatedData, images: ImageInput | None) -> Data:
    found: dict[int, Lengths] = {}

    def train(client: int) -> Lengths:
        if client not in found:
            found[client] = Lengths.of(data.train(client), images)
        return found[client]

    return Data(
        train,
        lambda client: Lengths.of(data.holdout(client), images),
        Lengths.of(data.global_holdout(), images),
        omissions=data.omissions.line(),
    )


@dataclass(frozen=True)
class _AssumedFederation:
    """Stands in for prepared data: equal clients."""

    names: list[str]
    samples: Counts
    train_sequences: Counts
    train_tokens: Counts


def _assumed_clients(config: Config, folder: Path, tiers: list[Tier]) -> tuple[list[Client], Data]:
    """Equal clients with full sequences. Raises UserError where the configuration leaves their number or size open."""
    count, local = config.data.partition.clients, config.local
    steps = local.steps or local.max_steps
    sequences = config.data.max_samples or (None if steps is None else steps * local.batch_size)
    for key, value in (("data.partition.clients", count), ("local.steps", sequences)):
        if value is None:
            raise UserError(
                f"{key}: not set: {folder} holds no tokenizer, so no tokens can be counted and clients must be assumed; set "
                "data.partition.clients, and local.steps or data.max_samples"
            )
    assert count is not None and sequences is not None
    length = config.data.sequence_length
    each = np.full(count, sequences)
    federation: Any = _AssumedFederation([f"client-{i}" for i in range(count)], each, each, each * length)
    everyone = Lengths.full(sequences, length)
    held_out = max(1, round(count * sequences * config.data.global_holdout))
    note = f"assumed: every client has {sequences} sequences of {length} tokens (no tokenizer in {folder})"
    own = Lengths.full(config.evaluation.client_sequences, length)
    data = Data(lambda _: everyone, lambda _: own, Lengths.full(held_out, length), note)
    return make_clients(federation, config.federation, tiers, config.seed), data
