"""Merge: what becomes of the base's weights when what was learnt moves into them.

Legend: L layers, E experts, O and I output and input width of a matrix, R adapter rank, F expert width, D model width.

    LoRA pair              W <- W + scale B A
    whole weights          W <- V                        a trained router, fully trained experts, products that FLoRA has merged
    FLAME's rescaler s     W2 <- s W2 of every routed expert: what experts put out is linear in W2, and shared experts have none

in float64, rounded once to the type of the base's file. Every matrix is changed by itself, in blocks of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.foundation.autoep import HostedLayer
from fedmoe_ds.foundation.weight_files import WeightFiles
from fedmoe_ds.model.adapter_bank import BlockSpec, lora_pairs
from fedmoe_ds.model.lora_linear import Projection
from fedmoe_ds.model.moe_layer import DOWN, GATE_UP, RESCALER, ROUTER

Find = Callable[[str], Tensor | None]
"""A tensor of what was learnt, by its canonical key; None where there is none."""


@dataclass(frozen=True)
class Learnt:
    """What one model of a run has learnt: that of a tier, or a client's own.

    Attributes:
        find: adapters and whole weights.
        merged: weights of the base into which products have moved; they stand in its place.
        scale: of LoRA products, alpha / rank times the tier's factor.
        rows_R: the LoRA rows that the tier receives; None for all.
        rescale: a fixed factor on what routed experts put out.
    """

    find: Find
    merged: Find
    scale: float
    rows_R: np.ndarray | None = None
    rescale: float = 1.0

    def pair(self, key: str) -> tuple[Tensor, Tensor] | None:
        """A [R, I] and B [O, R] of a pair as the tier receives them; None where there is none, or B A is zero."""
        a_RI, b_OR = self.find(f"{key}.lora_A"), self.find(f"{key}.lora_B")
        if a_RI is None or b_OR is None:
            return None
        if self.rows_R is not None:
            kept_R = torch.from_numpy(self.rows_R)
            a_RI, b_OR = a_RI[kept_R], b_OR[:, kept_R]
        return (a_RI, b_OR) if b_OR.any() else None

    def factor(self, layer: int) -> float:
        """On what the routed experts of a layer put out."""
        own = self.find(f"layers.{layer}.{RESCALER}")
        own = self.find(f"model.{RESCALER}") if own is None else own
        return self.rescale * (1.0 if own is None else float(own))


@dataclass
class Rounding:
    """How much of what was learnt the base's type has room for: squares of what was added, and of what rounding changed."""

    added: float = 0.0
    lost: float = 0.0

    @property
    def share(self) -> float:
        """Norm of the rounding over the norm of what was added; 0 where nothing was."""
        return math.sqrt(self.lost / self.added) if self.added else 0.0


@dataclass(frozen=True)
class Change:
    """What becomes of one matrix of the base.

    Attributes:
        key: of the pair, and of the weights that stand in the base's place.
        whole: the canonical key of weights that replace the base's; None where only a pair can.
        first: the engine's row at which this matrix begins (of gate and up, which the engine has as one, up begins at F).
        layer: whose rescaler it takes; None for all but down projections of routed experts.
    """

    key: str
    whole: str | None = None
    first: int = 0
    layer: int | None = None

    def blocks(self, learnt: Learnt, base: Callable[[slice], Tensor], rows: Iterator[slice], told: Rounding) -> Iterator[Tensor]:
        """The new matrix, block by block of its rows; `base` reads the old one."""
        pair = learnt.pair(self.key)
        stead = learnt.merged(f"{self.key}.base") if self.whole is None else learnt.find(self.whole)
        factor = 1.0 if self.layer is None else learnt.factor(self.layer)
        for part in rows:
            old_OI = base(part)
            # Untouched: the very bits of the base, not what adding zero makes of them.
            if pair is None and stead is None and factor == 1.0:
                yield old_OI
                continue
            place = slice(self.first + part.start, self.first + part.stop)
            new_OI = (old_OI if stead is None else stead[place]).to(torch.float64, copy=True)
            if pair is not None:
                a_RI, b_OR = pair
                new_OI.addmm_(b_OR[place].double(), a_RI.double(), alpha=learnt.scale)
            new_OI.mul_(factor)
            rounded_OI = new_OI.to(old_OI.dtype)
            if old_OI.itemsize < 4:
                told.added += float(torch.linalg.vector_norm(new_OI - old_OI) ** 2)
                told.lost += float(torch.linalg.vector_norm(new_OI.sub_(rounded_OI)) ** 2)
            yield rounded_OI


@dataclass
class Plan:
    """The changes of a model by the present name of the tensor: one for a matrix, one per expert for fused experts.

    Attributes:
        changes: by tensor.
        carried: names of the blocks that they carry.
    """

    changes: dict[str, list[Change]] = field(default_factory=dict)
    carried: set[str] = field(default_factory=set)


def plan_changes(
    blocks: list[BlockSpec], layers: list[HostedLayer], projections: list[Projection], files: WeightFiles, rescale: float
) -> Plan:
    """Which tensors of the base change. What of `blocks` is not in `carried` afterwards, the base has no tensor for."""
    plan, names = Plan(), {spec.name for spec in blocks}
    pairs = {a.pair for a, _ in lora_pairs(blocks)}
    experts = {"experts.gate_up", "experts.down"} & pairs or {GATE_UP, DOWN} & names
    if experts or RESCALER in names or rescale != 1.0:
        for layer in layers:
            _add_experts(plan, layer, files, whole=GATE_UP in names)
        plan.carried |= {GATE_UP, DOWN, RESCALER} | _halves({"experts.gate_up", "experts.down"})
    if ROUTER in names:
        for layer in layers:
            source = layer.source_names[f"{layer.name}.router.gate."]
            key = f"layers.{layer.index}.{ROUTER}"
            plan.changes[f"{source}weight"] = [Change(key, whole=key)]
        plan.carried.add(ROUTER)
    for projection in projections:
        key = projection.block_a.removesuffix(".lora_A")
        plan.changes[f"{projection.path}.weight"] = [Change(f"layers.{projection.layer}.{key}")]
        plan.carried |= _halves({key})
    return plan


def _halves(pairs: set[str]) -> set[str]:
    return {f"{pair}.lora_{half}" for pair in pairs for half in "AB"}


def _add_experts(plan: Plan, layer: HostedLayer, files: WeightFiles, whole: bool) -> None:
    """The experts of a layer, in the layout of the base's files: fused, or single projections."""
    source, ffn = layer.source_names[f"{layer.name}.experts."], layer.ffn_hidden_size
    fused = f"{source}gate_up_proj" in files
    for expert in range(layer.num_experts):
        place = f"layers.{layer.index}.experts.{expert}"
        own = {leaf: f"{place}.{leaf}.weight" if whole else None for leaf in ("gate_up", "down")}
        gate = Change(f"{place}.gate_up", own["gate_up"])
        up = Change(f"{place}.gate_up", own["gate_up"], first=ffn)
        down = Change(f"{place}.down", own["down"], layer=layer.index)
        if fused:
            plan.changes.setdefault(f"{source}gate_up_proj", []).append(gate)
            plan.changes.setdefault(f"{source}down_proj", []).append(down)
        else:
            for leaf, change in (("gate", gate), ("up", up), ("down", down)):
                plan.changes[f"{source}{expert}.{leaf}_proj.weight"] = [change]
