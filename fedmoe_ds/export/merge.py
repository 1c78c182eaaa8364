"""Merge: what becomes of the base's weights when what was learnt moves into them.

Legend: E experts, O and I output and input width of a matrix, R adapter rank, F expert width.

    LoRA pair              W <- W + scale B A
    whole weights          W <- V                        a trained router or head, fully trained experts, FLoRA's products
    FLAME's rescaler s     W2 <- s W2 of every routed expert: what experts put out is linear in W2, and shared experts have none

in float64, rounded once to the type of the base's file. Every matrix is changed by itself, in blocks of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.autoep import HostedLayer
from fedmoe_ds.foundation.channel_groups import GroupedLayer
from fedmoe_ds.foundation.loading import source_name
from fedmoe_ds.foundation.weight_files import BYTES_PER_OPEN, WeightFiles
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.model.client_head import head_path
from fedmoe_ds.model.lora_linear import find_projections
from fedmoe_ds.model.moe_layer import RESCALER
from fedmoe_ds.results import Selection, TrainedRun

EXPERT_STEMS = ("experts.gate_up", "experts.down")
ROUTER_STEM, HEAD_STEM = "router", "head"
"""Names of blocks less their last word: `lora_A`, `lora_B` or `weight`."""


class Learnt:
    """What one model of a run has learnt: that of a tier, or a client's own, tensor by tensor."""

    def __init__(self, run: TrainedRun, selection: Selection) -> None:
        self.run, self.selection = run, selection
        self.blocks = {block.name: block for block in run.spec.blocks}
        self.scale = run.scale(selection)
        self._read = 0

    def pair(self, stem: str, layer: int, expert: int | None) -> tuple[Tensor, Tensor] | None:
        """A [R, I] and B [O, R] of a LoRA pair; None where there is none, or B is zero."""
        a_RI, b_OR = (self._value(f"{stem}.lora_{half}", layer, expert) for half in "AB")
        return None if a_RI is None or b_OR is None or not b_OR.any() else (a_RI, b_OR)

    def whole(self, stem: str, layer: int, expert: int | None, leaf: str = "weight") -> Tensor | None:
        """Weights [O, I], or a bias [O], in the place of the base's; None where the base's own stay."""
        value = self._value(f"{stem}.{leaf}", layer, expert)
        if value is None:
            value = self.run.base(BlockSpec(f"{stem}.base", (layer,), ()).key(layer, expert))
            return None if value is None else self._counted(value)
        return value

    def rescaler(self, layer: int) -> float:
        """The factor on what the routed experts of a layer put out."""
        fixed, own = self.selection.assignment.rescale, self._value(RESCALER, layer, None)
        return (1.0 if fixed is None else fixed) * (1.0 if own is None else float(own))

    @property
    def rescales(self) -> bool:
        """Whether there may be such a factor."""
        return RESCALER in self.blocks or self.selection.assignment.rescale is not None

    def tensor(self, key: str, block: BlockSpec) -> Tensor:
        """One tensor by its canonical key, as `TrainedRun.value` has it."""
        return self._counted(self.run.value(key, block, self.selection))

    def _value(self, name: str, layer: int, expert: int | None) -> Tensor | None:
        block = self.blocks.get(name)
        if block is None:
            return None
        # One copy that serves all layers is kept under the layer -1.
        return self.tensor(block.key(layer if layer in block.layers else -1, expert), block)

    def _counted(self, value: Tensor) -> Tensor:
        self._read += value.nbytes
        if self._read >= BYTES_PER_OPEN:
            self.run.release()
            self._read = 0
        return value


@dataclass
class Rounding:
    """How much of what was learnt the base's type has room for: squares of what was added, and of what rounding has changed."""

    added: float = 0.0
    lost: float = 0.0

    def add(self, old_OI: Tensor, new_OI: Tensor, rounded_OI: Tensor) -> None:
        """Count a block. In float32: two digits are told, and float64 would take most of an export's time."""
        exact_OI = new_OI.float()
        for before_OI, name in ((old_OI, "added"), (rounded_OI, "lost")):
            flat = (exact_OI - before_OI.float()).flatten()
            setattr(self, name, getattr(self, name) + float(flat @ flat))

    @property
    def share(self) -> float:
        """Norm of the rounding over the norm of what was added; 0 where nothing was."""
        return math.sqrt(self.lost / self.added) if self.added else 0.0


@dataclass(frozen=True)
class Change:
    """What becomes of one matrix of the base, or of a bias.

    Attributes:
        stem, layer, expert: which of the engine's weights it is, or is a part of.
        first: the engine's row at which it begins; of gate and up, which are one matrix there, up begins at F.
        routed: whether its product is what a routed expert puts out, so that the rescaler is folded into it.
        leaf: the last word of the block's name, where it is whole.
    """

    stem: str
    layer: int
    expert: int | None = None
    first: int = 0
    routed: bool = False
    leaf: str = "weight"

    def blocks(
        self, learnt: Learnt, read: Callable[[slice], Tensor], rows: Iterable[slice], told: Rounding
    ) -> Iterator[Tensor]:
        """The new matrix, block by block of its rows; `read` gives the old one, and `told` is kept up to date."""
        place = self.stem, self.layer, self.expert
        pair, whole = learnt.pair(*place), learnt.whole(*place, self.leaf)
        factor = learnt.rescaler(self.layer) if self.routed else 1.0
        for part in rows:
            old_OI = read(part)
            # The very bits of the base, and not what adding zero makes of them.
            if pair is None and whole is None and factor == 1.0:
                yield old_OI
                continue
            inner = slice(self.first + part.start, self.first + part.stop)
            new_OI = (old_OI if whole is None else whole[inner]).to(torch.float64, copy=True)
            if pair is not None:
                a_RI, b_OR = pair
                new_OI.addmm_(b_OR[inner].double(), a_RI.double(), alpha=learnt.scale)
            new_OI.mul_(factor)
            rounded_OI = new_OI.to(old_OI.dtype)
            # Of float32 nobody misses what is rounded away.
            if old_OI.itemsize < 4:
                told.add(old_OI, new_OI, rounded_OI)
            yield rounded_OI


class MatrixChange(Protocol):
    """A `Change`, or what else makes a new matrix of an old one."""

    def blocks(
        self, learnt: Learnt, read: Callable[[slice], Tensor], rows: Iterable[slice], told: Rounding
    ) -> Iterator[Tensor]: ...


Changes = dict[str, list[MatrixChange]]
"""By the present name of a tensor of the base: one for a matrix, one per expert for fused experts."""


def plan_changes(run: TrainedRun, learnt: Learnt, files: WeightFiles) -> tuple[Changes, set[str]]:
    """Which tensors of the base change, and the names of the blocks that move into them; groups of channels apart
    (`channel_groups.py`)."""
    names, layers = learnt.blocks, [layer for layer in run.outline.layers if not isinstance(layer, GroupedLayer)]
    changes: Changes = {}
    stems = {name.rpartition(".")[0] for name in names}
    if stems.intersection(EXPERT_STEMS) or learnt.rescales:
        for layer in layers:
            _add_experts(changes, layer, files)
    if ROUTER_STEM in stems:
        for layer in layers:
            changes[source_name(f"{layer.name}.router.gate.weight", layers)] = [Change(ROUTER_STEM, layer.index)]
    _add_head(changes, run)
    projections = find_projections(run.outline.model, run.config.adapters)
    for one in projections:
        changes[f"{one.path}.weight"] = [Change(f"{one.part}.{one.name}", one.layer)]
    experts = EXPERT_STEMS if layers else ()
    taken = {*experts, ROUTER_STEM, HEAD_STEM, *(f"{one.part}.{one.name}" for one in projections)}
    return changes, {name for name in names if name == RESCALER or name.rpartition(".")[0] in taken}


def _add_head(changes: Changes, run: TrainedRun) -> None:
    """A trained head. Raises UserError where the base keeps input embedding and output matrix as one."""
    heads = [block for block in run.spec.blocks if block.after_layers]
    if heads and run.spec.size.tied:
        raise UserError(
            "--format: merged: the head was trained, and the base's output matrix is its input embedding as well "
            "(tie_word_embeddings), which it must not change; untie the base's and train on that"
        )
    path = head_path(run.outline.model) if heads else ""
    for block in heads:
        leaf = block.name.rpartition(".")[2]
        changes[f"{path}.{leaf}"] = [Change(HEAD_STEM, block.layers[0], leaf=leaf)]


def _add_experts(changes: Changes, layer: HostedLayer, files: WeightFiles) -> None:
    """The experts of a layer, in the layout of the base's files: fused, or every projection by itself."""
    source, (gate_up, down) = layer.source_names[f"{layer.name}.experts."], EXPERT_STEMS
    fused = f"{source}gate_up_proj" in files
    for expert in range(layer.num_experts):
        gate = Change(gate_up, layer.index, expert)
        up = Change(gate_up, layer.index, expert, first=layer.ffn_hidden_size)
        out = Change(down, layer.index, expert, routed=True)
        if fused:
            # One change takes gate and up together, as the engine has them.
            changes.setdefault(f"{source}gate_up_proj", []).append(gate)
            changes.setdefault(f"{source}down_proj", []).append(out)
            continue
        for leaf, change in (("gate", gate), ("up", up), ("down", out)):
            changes[f"{source}{expert}.{leaf}_proj.weight"] = [change]
