"""Trained run: what a run folder or a checkpoint holds, opened in one process, without process groups and without weights.

The base model is built without memory and the checkpoint's tensors are read one by one, so that this takes no more than the
largest of them, whatever topology wrote the checkpoint.

Legend: L layers, N clients, item the shape of one client's tensor in one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.checkpoint import memories
from fedmoe_ds.checkpoint.client_mean import ClientMean
from fedmoe_ds.checkpoint.personal_reader import PersonalReader
from fedmoe_ds.checkpoint.reader import Snapshot, TensorReader, client_names, read_snapshot
from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client, tiers_of
from fedmoe_ds.config import Config, load_config
from fedmoe_ds.errors import UserError, nearest
from fedmoe_ds.federation.run_spec import RunSpec, check_start, resolve_spec
from fedmoe_ds.foundation import file_sums, resolve_foundation
from fedmoe_ds.foundation.fingerprint import remembered_fingerprint
from fedmoe_ds.foundation.foundation import cache_folder
from fedmoe_ds.foundation.meta_model import build_on_meta, host_model
from fedmoe_ds.foundation.outline import Outline, outline
from fedmoe_ds.foundation.storage_type import of_type, storage_type
from fedmoe_ds.methods import RoundContext
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.report import Progress, Record
from fedmoe_ds.report.holdings import Holdings
from fedmoe_ds.results.run_checkpoint import check_whole, find_checkpoint
from fedmoe_ds.storage.files import expanded

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Selection:
    """One of a run's models: that of a tier, or the one that a client has.

    Attributes:
        tier: label of the tier.
        members: whose personal blocks it has, their mean where there are several: the tier's clients, or the client.
        client: of whom it is; None for the tier's.
        assignment: what the client is told in evaluation, or any of the tier of whom nothing is known: cap, LoRA rows, scale,
            fixed rescaler, experts.
    """

    tier: str
    members: tuple[Client, ...]
    client: Client | None
    assignment: Assignment


@dataclass(frozen=True)
class TrainedRun:
    """A run's state after a round.

    Attributes:
        folder: of the run; of a checkpoint that lies alone, its parent.
        spec: the run's configuration, resolved as if on one rank: method, tiers, blocks, expert layout.
        model: folder of the base model, in safetensors; `outline` is the same without weights.
        clients: all of the federation. Of a checkpoint without the run's record, which says who is of which tier: those that
            it names, without their numbers of samples, where there is one tier; else empty.
        events: of `metrics.jsonl`, tables unread (`report.Record`); empty where there is none.
    """

    folder: Path
    checkpoint: Path
    snapshot: Snapshot
    spec: RunSpec
    model: Path
    outline: Outline
    clients: list[Client]
    events: list[dict[str, Any]] = field(repr=False)

    @property
    def config(self) -> Config:
        """What the user configured, with the method's own defaults."""
        return self.spec.config

    @property
    def round(self) -> int:
        """Rounds completed."""
        return self.snapshot.round

    @cached_property
    def tiers(self) -> Mapping[str, Sequence[Client]]:
        """The clients of every tier by its label, the largest budget first."""
        return tiers_of(self.clients)

    def select(self, tier: str | None = None, client: str | None = None) -> Selection:
        """The model of a tier (its label, or its top-k where that names one; None: the largest) or of a client.

        Raises:
            UserError: there is no such tier or client, or both are named.
        """
        if client is None:
            label = self._label(tier)
            members = tuple(self.tiers[label])
            return Selection(label, members, None, self._assignment(members[0], own=False))
        if tier is not None:
            raise UserError(f"--tier: {tier}: with --client {client}: a client's model is that of its own tier; drop --tier")
        known = {member.name: member for member in self._known_clients("--client", client)}
        if client not in known:
            raise UserError(f"--client: {client}: no client of this run has this name{nearest(client, known)}")
        member = known[client]
        return Selection(member.tier, (member,), member, self._assignment(member, own=True))

    def _label(self, wanted: str | None) -> str:
        self._known_clients("--tier", wanted or "largest")
        if wanted is None:
            return next(iter(self.tiers))
        named = [label for label, (first, *_) in self.tiers.items() if wanted in (label, str(first.top_k))]
        if wanted in named:
            return wanted
        if len(named) != 1:
            what = "names several tiers" if named else "is no tier of this run"
            raise UserError(f"--tier: {wanted}: {what}; choose among {', '.join(map(repr, named or self.tiers))}")
        return named[0]

    def _known_clients(self, option: str, value: str) -> list[Client]:
        if not self.clients:
            whom = "the clients" if len(self.spec.tiers) == 1 else "the tiers of the clients"
            raise UserError(
                f"{option}: {value}: nobody knows {whom} of {self.checkpoint}: {self.folder / METRICS} is missing; give the "
                "run folder"
            )
        return self.clients

    def _assignment(self, member: Client, own: bool) -> Assignment:
        known = self._memories.get(member.index, {}) if self.spec.method.personal_models and own else {}
        return self.spec.method.assign(member, RoundContext(0, self._dense_state(member), memory=known))

    @cached_property
    def _memories(self) -> dict[int, dict[str, np.ndarray]]:
        return memories.read(self.checkpoint, self.snapshot.files, "known")

    def _dense_state(self, member: Client) -> dict[str, Tensor]:
        """One client's personal blocks [L, *item] but those of experts: what its method may ask about."""
        return {
            block.name: torch.stack([self._own(block.key(layer), block, member) for layer in block.layers])
            for block in self.client_blocks
            if not block.expert
        }

    @cached_property
    def client_blocks(self) -> list[BlockSpec]:
        """What a checkpoint keeps of every client: personal blocks, and what the method remembers; control variates are left
        out."""
        blocks, method = self.spec.blocks, self.spec.method
        return [block for block in blocks if block.personal] + method.client_state(blocks)

    def scale(self, selection: Selection) -> float:
        """What a LoRA product B A counts: alpha / rank, and the assignment's own factor."""
        adapters = self.config.adapters
        return adapters.alpha / adapters.rank * selection.assignment.scale

    def items(self) -> Iterator[tuple[str, BlockSpec]]:
        """(canonical key, block) of every tensor of a model, block by block; personal ones too."""
        experts = self.spec.expert_layout.num_experts
        for block in self.spec.blocks:
            for layer in block.layers:
                if not block.expert:
                    yield block.key(layer), block
                    continue
                for expert in range(experts):
                    yield block.key(layer, expert), block

    def value(self, key: str, block: BlockSpec, selection: Selection) -> Tensor:
        """One tensor [*item], float32, as the members of the selection receive it: LoRA rows that they do not hold are zero.

        Raises:
            UserError: the checkpoint has no such tensor, or one of another shape.
        """
        if not block.personal:
            value = self._adapters.read(key)
        elif selection.client is not None:
            value = self._own(key, block, selection.client)
        else:
            value = self._mean(key, block, selection.members)
        if value.shape != block.item:
            raise UserError(f"checkpoint: {key}: shape {tuple(value.shape)}, but this run needs {block.item}")
        mask = selection.assignment.mask(block, value.device)
        return value if mask is None else torch.where(mask, value, 0.0)

    def _own(self, key: str, block: BlockSpec, member: Client) -> Tensor:
        """[*item] that a client has; before it was trained, what it begins with."""
        value = self._personal.value(key, member.index)
        if value is not None:
            return value
        number, common = self.spec.method.initial(block, member), self._personal.beginning(key)
        assert common is not None, "only a checkpoint that has a beginning leaves clients out"
        return common if number is None else torch.full_like(common, number)

    def _mean(self, key: str, block: BlockSpec, members: Sequence[Client]) -> Tensor:
        """As `Personal.means` adds up: those that have what everybody begins with first."""
        common = self._personal.beginning(key)
        alike = [
            common is not None and self._personal.value(key, m.index) is None and self.spec.method.initial(block, m) is None
            for m in members
        ]
        mean = ClientMean(torch.zeros(block.item) if common is None else common, sum(alike))
        for member in (member for member, same in zip(members, alike, strict=True) if not same):
            mean.add(self._own(key, block, member))
        return mean.value.float()

    def base(self, key: str) -> Tensor | None:
        """A frozen weight that products have moved into (FLoRA), by the key of its pair and `.base`; None: the model's own."""
        return self._base.read(key) if key in self._base else None

    def release(self) -> None:
        """Close the checkpoint's files, which opens them again when they are read: what was read of a mapped file counts as
        this process's memory until then."""
        for name in ("_adapters", "_personal", "_base"):
            self.__dict__.pop(name, None)

    @cached_property
    def _adapters(self) -> TensorReader:
        return TensorReader(self.checkpoint, "adapters", self.snapshot.files)

    @cached_property
    def _personal(self) -> PersonalReader:
        return PersonalReader(self.checkpoint, self.snapshot.files)

    @cached_property
    def _base(self) -> TensorReader:
        return TensorReader(self.checkpoint, "server.base-", self.snapshot.files)


def open_run(path: Path, round_index: int | str | None = None, model: Path | None = None) -> TrainedRun:
    """Open a run folder, or one of its checkpoints.

    Args:
        round_index: rounds completed in the checkpoint that is wanted; `best`: the one that the run keeps as its best; None:
            the newest intact one, of two of the same round the one that is not within the next.
        model: folder of the base model, where it is no longer where the configuration says.
    Raises:
        UserError: there is no run, no such checkpoint, the checkpoint is damaged or mixes two rounds, or the base model is
            another one.
    """
    checkpoint = find_checkpoint(path, round_index)
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    snapshot, config = read_snapshot(checkpoint), load_config(checkpoint / "config.yaml")
    if model is not None:
        found = expanded(str(model), "--model")
        section = config.foundation.model_copy(update={"path": str(found), "preset": None})
        config = config.model_copy(update={"foundation": section})
    # A run writes down what `auto` meant; one without the key is older than it, and was what its identity says.
    written = snapshot.identity.get("foundation.dtype")
    kept = of_type(config.foundation, torch.bfloat16 if written == "bfloat16" else torch.float32)
    config = config.model_copy(update={"foundation": kept})
    # As on the device of the run: what a configuration means depends on its kind.
    device = snapshot.identity.get("topology", {}).get("device", "cpu")
    config, method = check_start(config, device)
    with Progress() as progress:
        base = resolve_foundation(config.foundation, config.seed, progress.note)
    _check_same(base, snapshot, checkpoint, cache_folder(config.foundation, file_sums.KIND))
    meta = build_on_meta(base, storage_type(config.foundation, device, base), config.foundation.expand)
    known = outline(meta, host_model(meta, 1, 0), config.foundation.expand)
    spec = resolve_spec(config, method, device, known)
    events = list(Record(folder / METRICS)) if (folder / METRICS).is_file() else []
    clients = _clients(events, spec) if events else _named_clients(checkpoint, snapshot, spec)
    spec.know(clients)
    run = TrainedRun(folder, checkpoint, snapshot, spec, base, known, clients, events)
    if run.client_blocks:
        check_whole(checkpoint, snapshot)
    return run


def _check_same(model: Path, snapshot: Snapshot, checkpoint: Path, sums: Path) -> None:
    """Adapters mean nothing on another model. Raises UserError."""
    theirs, ours = snapshot.identity.get("foundation"), remembered_fingerprint(model, sums)
    if theirs != ours:
        raise UserError(
            f"foundation: {model}: it is not the model of {checkpoint} (fingerprint {ours[:12]}, the run's was "
            f"{str(theirs)[:12]}); give its folder with --model"
        )


def _clients(events: list[dict[str, Any]], spec: RunSpec) -> list[Client]:
    """The clients as the `data` event names them: in the order of everything that a checkpoint keeps of clients."""
    event = next((event for event in events if event["event"] == "data"), None)
    by_label = {tier.label: tier for tier in spec.tiers}
    found = []
    for index, row in enumerate(Holdings(event or {})):
        # Records of older versions have no label: there the top-k is it.
        label = str(row.get("tier_label", row["top_k"]))
        if label not in by_label:
            raise UserError(
                f"{METRICS}: client {row['name']}: tier {label} is none of the configuration's ({', '.join(by_label)}); the "
                "record belongs to another run"
            )
        tier, targets = by_label[label], row.get("targets", row.get("tokens", 0))
        found.append(
            Client(index, row["name"], tier.top_k, row["samples"], row["sequences"], targets, tier.cap, tier.rank, tier.experts,
                   tier=tier.label, layers=tier.layers, blocks=tier.blocks)
        )  # fmt: skip
    return found


def _named_clients(checkpoint: Path, snapshot: Snapshot, spec: RunSpec) -> list[Client]:
    """The clients that a checkpoint itself names, where nothing else has to be known of them: all are of the one tier."""
    names = client_names(checkpoint, snapshot.files) if len(spec.tiers) == 1 else None
    (tier, *_) = spec.tiers
    return [
        Client(index, name, tier.top_k, 0, 0, 0, tier.cap, tier.rank, tier.experts, tier=tier.label, layers=tier.layers,
               blocks=tier.blocks)
        for index, name in enumerate(names or [])
    ]  # fmt: skip
