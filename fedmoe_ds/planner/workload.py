"""Workload: everything about a run that does not depend on the world: shapes, clients and the lengths of their data.

Nothing is loaded: the model is built on the meta device from its config.json. A folder with only that file is enough; clients
then are assumed, because without the model's tokenizer nobody can count their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fedmoe_ds.clients.batches import Packing, batch_size, local_batches, pass_bounds, step_count
from fedmoe_ds.clients.client import Client, make_clients, tiers_of
from fedmoe_ds.clients.host_moments import check_moments_on
from fedmoe_ds.clients.pooled import pooled_batches
from fedmoe_ds.config import Config
from fedmoe_ds.data import FederatedData, ImageInput, prepare
from fedmoe_ds.data.sources import open_sources
from fedmoe_ds.data.templates.reading import reading_line
from fedmoe_ds.federation.run_spec import RunSpec, check_promise, check_start, resolve_spec
from fedmoe_ds.federation.sequence_checks import check_packed_samples
from fedmoe_ds.federation.start_source import find_start
from fedmoe_ds.federation.task_metrics import candidates_of
from fedmoe_ds.federation.warm_start import open_start
from fedmoe_ds.foundation import resolve_foundation
from fedmoe_ds.foundation.context_length import longest_sequence
from fedmoe_ds.foundation.foundation import cache_folder, planned_config
from fedmoe_ds.foundation.host_sharing import check_mapped
from fedmoe_ds.foundation.meta_model import build_on_meta, host_model
from fedmoe_ds.foundation.outline import outline
from fedmoe_ds.foundation.own_code import running, told
from fedmoe_ds.foundation.storage_type import storage_type
from fedmoe_ds.foundation.tokenizer import has_tokenizer, load_tokenizer
from fedmoe_ds.kernels import fault
from fedmoe_ds.model.lora_linear import find_projections
from fedmoe_ds.planner.assumed_clients import assumed_clients, uncounted_clients
from fedmoe_ds.planner.lengths import Counts, Data, Lengths
from fedmoe_ds.report import Progress
from fedmoe_ds.storage import cache


@dataclass(frozen=True)
class Job(RunSpec):
    """A resolved configuration, its clients and their data's lengths; its `expert_layout` is that of a rank with all experts.

    Attributes:
        projections: projections with LoRA, per layer.
        head: numbers of the output matrix; `body`: of everything dense but it, the input embedding and the norms' worth.
        clients: of the federation.
    """

    clients: Sequence[Client]
    projections: float
    head: int
    body: int
    data: Data

    @property
    def length(self) -> int:
        """Rows of the longest sequence, or of an image."""
        return self.config.data.sequence_length if self.images is None else self.images.positions

    def participants(self, round_index: int) -> list[Client]:
        """Who trains in a round: the clients that are drawn, or the one that has their data."""
        return self.participants_among(self.clients, round_index)

    @cached_property
    def by_tier(self) -> Mapping[str, Sequence[Client]]:
        """Clients of every budget tier."""
        return tiers_of(self.clients)

    @cached_property
    def _steps(self) -> dict[tuple[int, int], Steps]:
        return {}

    def steps(self, client: Client, round_index: int) -> Steps:
        """What a client trains on in a round, step by step."""
        # The same batches are asked for under every topology of a search.
        key = (client.index, round_index)
        if key not in self._steps:
            self._steps[key] = _steps_of(self, client, round_index).times(self.cost.models(client), self.method.fuses)
        return self._steps[key]


@dataclass(frozen=True)
class Steps:
    """One client's local steps in a round, [n] each: samples, longest sample, token rows, targets, passes."""

    samples: Counts
    longest: Counts
    rows: Counts
    targets: Counts
    passes: Counts

    def __len__(self) -> int:
        return len(self.samples)

    def times(self, models: int, fused: bool = False) -> Steps:
        """The same of so many models, each in passes of its own, or `fused` all in one."""
        names = ("samples", "rows", "targets") + ("passes",) * (not fused)
        more = {name: getattr(self, name) * models for name in names}
        return self if models == 1 else replace(self, **more)


def _steps_of(job: Job, client: Client, round_index: int) -> Steps:
    local, seed, execution = job.config.local, job.config.seed, job.config.execution
    if job.method.pooled:
        drawn = job.drawn_among(job.clients, round_index)
        # The pooled client's batches index into the data of all clients, in canonical order.
        lengths, batches = _everything(job), pooled_batches(job.clients, drawn, local, seed, round_index)
    else:
        lengths = job.data.train(client.index)
        if lengths.alike and not execution.packing:
            return _equal_steps(lengths, batch_size(client, local), step_count(client, local), execution.micro_batch_size)
        # Drawn as the clients draw them, so that padding and targets are those of the run.
        batches = local_batches(client, local, seed, round_index)
    samples = np.array([len(batch) for batch in batches], dtype=np.int64)
    if not len(samples):
        return Steps(samples, samples, samples, samples, samples)
    packing = Packing(job.length, lambda _: lengths.rows) if execution.packing else None
    passes = [len(pass_bounds(batch, execution.micro_batch_size, packing)) - 1 for batch in batches]
    order, starts = np.concatenate(batches), samples.cumsum() - samples
    rows, targets = lengths.rows[order], lengths.targets[order]
    longest, row_sums, target_sums = (
        np.maximum.reduceat(rows, starts),
        np.add.reduceat(rows, starts),
        np.add.reduceat(targets, starts),
    )
    return Steps(samples, longest, row_sums, target_sums, np.array(passes, dtype=np.int64))


def _equal_steps(lengths: Lengths, size: int, steps: int, micro: int | None) -> Steps:
    """Steps on samples of one length: whichever are drawn, they are the same."""
    row, target = int(lengths.rows[0]), int(lengths.targets[0])
    passes = -(-size // min(micro or size, size))
    return Steps(*(np.full(steps, value, dtype=np.int64) for value in (size, row, size * row, size * target, passes)))


def _everything(job: Job) -> Lengths:
    parts = [job.data.train(client.index) for client in job.clients]
    return Lengths(np.concatenate([part.rows for part in parts]), np.concatenate([part.targets for part in parts]))


Clients = Callable[[RunSpec], tuple[Sequence[Client], Data]]
"""Makes the clients of a run, where they are neither read nor assumed."""


def resolve(config: Config, assume: bool = True, kind: str = "cpu", counted: bool = True, made: Clients | None = None) -> Job:
    """Resolve a configuration.

    Args:
        kind: of device that the run is for, `cpu` or `cuda`: what it would refuse depends on it.
        assume: take clients for granted where the model folder holds no tokenizer, instead of refusing it.
        counted: read and encode the data; else clients are taken for granted, and what the rows show is not refused.
        made: the clients are these; no data, and no tokenizer.
    Raises:
        UserError: what a real start would refuse on any number of ranks.
    """
    fault.guard("this plan")
    check_promise(config, kind)
    check_moments_on(config.execution, kind)
    check_mapped(config.foundation, kind)
    config, method = check_start(config, kind)
    folder = _untrained_foundation(config)
    model = build_on_meta(folder, storage_type(config.foundation, kind, folder), config.foundation.expand)
    # As one rank with all experts (ep_size 1): the planner divides them itself, by every size that it tries.
    spec = resolve_spec(config, method, kind, outline(model, host_model(model, 1, 0), config.foundation.expand))
    if config.adapters.start is not None:  # names and shapes alone; whose model it is needs the weights
        open_start(find_start(config.adapters.start, whole=False), spec, None)
    clients, data = _clients(spec, folder, assume, counted) if made is None else made(spec)
    spec.know(clients)
    if (ignored := cache.line([cache.passed_over()])) is not None:
        with Progress() as progress:
            progress.note(ignored)
    size, images = spec.size, spec.images
    head = model.config.num_labels * size.hidden if images else size.vocabulary * size.hidden
    return Job(
        **vars(spec),
        clients=clients,
        projections=len(find_projections(model, config.adapters)) / size.depth,
        head=head,
        body=size.head_and_body - head,
        data=data,
    )


def _untrained_foundation(config: Config) -> Path:
    """The model folder; a built-in foundation is taken without its pre-training, which shapes and tokenizer do not need."""
    given = config.foundation
    least = {"pretrain": given.pretrain.model_copy(update={"steps": 0})}
    # Which channels are whose does not change a shape either.
    chosen = given.convert is not None and given.convert.kind == "read-me"
    less = {} if not chosen else {"convert": given.convert.model_copy(update={"batches": 1, "router_steps": 0})}
    untrained = given.model_copy(update={**least, **less})
    with Progress() as progress:
        return resolve_foundation(untrained, config.seed, progress.note)


def _clients(spec: RunSpec, folder: Path, assume: bool, counted: bool) -> tuple[Sequence[Client], Data]:
    config, images, trust = spec.config, spec.images, spec.config.foundation.trust_remote_code
    if assume and images is None and not has_tokenizer(folder, trust):
        return assumed_clients(config, folder, spec.tiers)
    if not counted and images is None:
        # A start would refuse these two at once, and they cost nothing.
        load_tokenizer(folder, spec.size.vocabulary, trust)
        open_sources(config.data, cache.root(config.foundation.cache))
        return uncounted_clients(config, spec.tiers)
    with Progress() as progress:
        if (line := told(folder, trust)) is not None:
            progress.note(line)
        # Prepared as a start does it, into the same cache: the start then finds it.
        tokenizer = load_tokenizer(folder, spec.size.vocabulary, trust) if images is None else None
        place, column, code = cache_folder(config.foundation, "data"), config.federation.tier_column, running(folder, trust)
        data = prepare(config.data, config.seed, tokenizer, place, code, progress.note, column)
    check_packed_samples(config, data.reading.get("template"))
    longest = longest_sequence(planned_config(config.foundation))
    candidates = len(candidates_of(config.evaluation, tokenizer, data, longest))
    return make_clients(data, config.federation, spec.tiers, config.seed), _counted(data, images, candidates)


def _counted(data: FederatedData, images: ImageInput | None, candidates: int) -> Data:
    found: dict[int, Lengths] = {}

    def train(client: int) -> Lengths:
        # Lengths of all clients are small; their sequences stay in the memory map.
        if client not in found:
            found[client] = Lengths.of(data.train(client), images)
        return found[client]

    return Data(
        train,
        lambda client: Lengths.of(data.holdout(client), images),
        Lengths.of(data.global_holdout(), images),
        omissions=data.omissions.line(),
        reading=reading_line(data.reading),
        candidates=candidates,
    )
