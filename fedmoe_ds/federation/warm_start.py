"""Warm start: the initial global adapters of a federation are those of a former run, or of an adapter trained elsewhere.

The model that the federation begins with is the old one:

- A smaller rank gets further rows: zeros in B, so that they count nothing, and freshly drawn ones in A, so that they can learn
  (with zeros in both, neither would ever get a gradient).
- Another scale alpha / rank is folded into B; by a power of two this is exact.
- Methods that move products into the frozen weights (FLoRA) do so with the product of the start, in float64, and begin with
  fresh pairs, as they do in every round.
- Blocks that the old adapters lack start as usual. Blocks that the new run does not train would be lost: they are refused.
- What clients keep for themselves starts as usual, from the global value where it has one.

Legend: R and Q adapter rank here and there, O and I output and input width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmoe_ds.checkpoint.digest import global_digest
from fedmoe_ds.config import AdapterConfig, MoEAdapterConfig
from fedmoe_ds.config.yaml12 import inline_yaml
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.identity import GONE, START, written_start
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.federation.start_source import Source, block_of, find_start, open_source
from fedmoe_ds.model.adapter_bank import HEAD, Bank, BlockSpec
from fedmoe_ds.model.adapter_moe_layer import INNER, OUTER
from fedmoe_ds.model.moe_layer import DOWN, GATE_UP, RESCALER, ROUTER
from fedmoe_ds.storage.files import expanded


@dataclass(frozen=True)
class WarmStart:
    """What a run has begun with: `digest` over its initial global adapters, `facts` for the record, lines for the user."""

    digest: str
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def locate(given: str | None, resumed: str | None) -> tuple[str | None, str | None]:
    """The folder of the start, or why it is not read; neither where there is no start.

    Rank 0 only.

    Args:
        resumed: the checkpoint that continues the run. It holds everything that the run has begun with, so its own start is
            not asked for again: that may have trained on, or be gone. Only another one could be other adapters.
    Raises:
        UserError: there is no such start, and no checkpoint either.
    """
    if given is None:
        return None, None
    before = None if resumed is None else written_start(Path(resumed))
    if before is not None and _place(before) == _place(given):
        return None, f"{START}: {given}: not read again, the checkpoint holds what the run began with"
    try:
        return str(find_start(given)), None
    except UserError as error:
        if resumed is None:
            raise
        return None, f"{error}; not compared: the checkpoint holds what the run began with"


def _place(given: str) -> str:
    return os.path.abspath(expanded(given, START))


def open_start(folder: Path, spec: RunSpec, fingerprint: str | None) -> Source:
    """The old adapters, once it is clear that the run can begin with all of them; `fingerprint` is None before weights exist.

    Raises:
        UserError: they belong to another model, or the run has no place for some of them.
    """
    source = open_source(folder)
    if fingerprint is not None and source.foundation not in (None, fingerprint):
        raise _refused(
            spec,
            f"{source.title} was trained on another model (fingerprint {str(source.foundation)[:12]}, this one has "
            f"{fingerprint[:12]}); use that run's foundation",
        )
    if not source.keys:
        raise _refused(
            spec,
            f"in {source.title} every client kept its own adapters, and there are no global ones to start from; export one "
            "client's model (--format peft --client NAME) and start from that",
        )
    if source.merged and not spec.method.absorbs:
        raise _refused(
            spec,
            f"{source.title} has moved its products into the model's own weights, and no adapter of method "
            f"{spec.config.method.name} holds them; export it (--format merged) as foundation.path, or go on with flora, "
            "florist or fedex-lora",
        )
    _check_places(source, spec)
    _check_rank(source, spec)
    return source


def _refused(spec: RunSpec, why: str) -> UserError:
    return UserError(f"{START}: {spec.config.adapters.start}: {why}")


def _check_places(source: Source, spec: RunSpec) -> None:
    """Every tensor of the source has a place in this run, and it is the same one."""
    here, there = spec.config.foundation.expand, source.expand
    # Layer 3 of two further ones and of six stand after other layers of the model: no key or shape tells.
    if here is not None and there not in (None, here.model_dump()):
        why = f"its further layers are at other places (foundation.expand: {inline_yaml(there)})"
        raise _refused(spec, f"{source.title}: {why}; use as many blocks")
    ours, places = {block.name for block in spec.blocks}, frozenset(_keys(spec.blocks, spec))
    lost = sorted({block_of(key) for key in source.keys} - ours)
    if lost:
        parts = ", ".join(sorted({_stem(name) for name in lost}))
        ways = ", ".join(_ways(lost, spec.config.adapters)) or "the keys of that run"
        raise _refused(spec, f"{source.title} has adapted {parts}, which this run does not train and would lose; set {ways}")
    elsewhere = sorted(source.keys - places)
    if elsewhere:
        raise _refused(
            spec,
            f"{source.title} has {elsewhere[0]}, and here is no such place ({spec.size.layers} layers, "
            f"{spec.expert_layout.num_experts} experts); use the foundation and adapters.moe that it was trained with",
        )


def _check_rank(source: Source, spec: RunSpec) -> None:
    rank = spec.config.adapters.rank
    # Products that move into the frozen weights have no rank to fit into.
    if source.rank > rank and not spec.method.absorbs and any(block.pair for block in _taken(source, spec)):
        raise UserError(
            f"adapters.rank: {rank}: {source.title}, from which the run starts, has LoRA rank {source.rank}, and fewer rows "
            f"cannot hold it; set adapters.rank={source.rank} or more"
        )


_FORMS = {"top_k": " at that budget", "linear": "", "router_input": ""}
"""Keys of `adapters.moe` that no shape tells."""


def _stem(name: str) -> str:
    return name.removesuffix(".lora_A").removesuffix(".lora_B").removesuffix(".weight")


def _ways(lost: list[str], adapters: AdapterConfig) -> Iterator[str]:
    """Keys that give the blocks a place."""
    for part, own in (("attention", adapters.attention), ("feed_forward", adapters.feed_forward)):
        found = {name.split(".")[1] for name in lost if name.startswith(f"{part}.")}
        if found:
            yield f"adapters.{part}=[{', '.join([*own, *sorted(found - {*own})])}]"
    if {INNER, OUTER} & {*lost}:
        yield "adapters.moe as it was there"
    if {GATE_UP, DOWN} & {*lost}:
        yield "adapters.expert_training=full"
    if any(name.startswith("experts.") and ".lora_" in name for name in lost):
        yield "adapters.expert_training=lora" if adapters.expert_training == "full" else "adapters.experts=true"
    if ROUTER in lost:
        yield "adapters.router=train"
    if HEAD in lost:
        yield "adapters.head=train"


def _keys(blocks: Iterable[BlockSpec], spec: RunSpec) -> Iterator[str]:
    """Canonical keys of blocks over all experts."""
    for block in blocks:
        for layer in block.layers:
            if block.expert:
                yield from (block.key(layer, expert) for expert in range(spec.expert_layout.num_experts))
            else:
                yield block.key(layer)


def _taken(source: Source, spec: RunSpec) -> list[BlockSpec]:
    there = {block_of(key) for key in source.keys}
    return [block for block in spec.blocks if block.name in there]


def begin_from(
    source: Source | None, spec: RunSpec, bank: Bank, base: Bank | None, runtime: Runtime, unread: str | None = None
) -> WarmStart | None:
    """Fill this rank's part of the initial adapters, and of the frozen weights that products move into. Collective.

    Args:
        source: None where there is no start, or it is not read.
        bank: the initial global adapters, as they are without a start.
        base: what `Server.initial_state` keeps of frozen weights; None for methods that merge nothing.
        unread: why a start is not read.
    Raises:
        UserError: a tensor has another shape.
    """
    if source is None:
        return None if unread is None else WarmStart(GONE, notes=[unread])
    runtime.run_on_all_ranks(lambda: _fill(source, spec, bank, base))
    first = spec.expert_layout.held.start
    tensors = (pair for one in (bank, base) if one is not None for pair in one.items(first, with_personal=True))
    digest = global_digest(((key, value) for key, _, value in tensors), runtime, spec.config.topology.ep_size)
    facts = {**source.facts, "sha256": digest, "fresh": _fresh(source, spec), "left": list(source.left)}
    return WarmStart(digest, facts, [_told(source, spec, merging=base is not None)])


@torch.no_grad()
def _fill(source: Source, spec: RunSpec, bank: Bank, base: Bank | None) -> None:
    first, ratio = spec.expert_layout.held.start, _ratio(source, spec)
    for key, block, value in bank.items(first, with_personal=True):
        if key in source.keys and not (base is not None and block.pair):
            value.copy_(_fitted(key, block, source.read(key), value, ratio))
    if base is not None:
        _merge(source, base, first)


def _ratio(source: Source, spec: RunSpec) -> float:
    """What B is multiplied by, so that alpha / rank of this run times B is what it was."""
    return source.scale / (spec.config.adapters.alpha / spec.config.adapters.rank)


def _fitted(key: str, block: BlockSpec, old: Tensor, fresh: Tensor, ratio: float) -> Tensor:
    """An old tensor in the shape of this run's: `fresh` is what it would start with."""
    axis = block.rank_axis
    same = list(old.shape) == [*fresh.shape]
    if axis is not None and old.dim() == 2:
        same = old.shape[1 - axis] == fresh.shape[1 - axis] and old.shape[axis] <= fresh.shape[axis]
    if not same:
        raise UserError(
            f"{START}: {key}: shape {tuple(old.shape)}, and this run needs {tuple(fresh.shape)}; use the foundation and "
            "adapters.moe that it was trained with"
        )
    if axis is None:
        return old.float()
    if axis == 0:
        return torch.cat([old.float(), fresh.cpu()[len(old) :]])
    b_OR = torch.zeros(fresh.shape)
    b_OR[:, : old.shape[1]] = old.double() * ratio
    return b_OR


def _merge(source: Source, base: Bank, first_expert: int) -> None:
    """W <- W + (alpha / rank) B A, in float64 and rounded once; where the source has merged weights, these are W."""
    for key, _, weight_OI in base.items(first_expert):
        a, b = (f"{key.removesuffix('.base')}.{half}" for half in ("lora_A", "lora_B"))
        before = weight_OI.clone()
        if key in source.merged:
            weight_OI.copy_(_sized(key, source.read_merged(key), weight_OI))
        b_OR = source.read(b) if a in source.keys and b in source.keys else None
        if b_OR is not None and bool(b_OR.any()):
            product_OI = _sized(key, b_OR.double() @ source.read(a).double(), weight_OI)
            weight_OI.copy_(weight_OI.double() + source.scale * product_OI.to(weight_OI.device))
        base.note_change(key, before, weight_OI)


def _sized(key: str, found: Tensor, place: Tensor) -> Tensor:
    if found.shape != place.shape:
        raise UserError(
            f"{START}: {key}: shape {tuple(found.shape)}, and the model has {tuple(place.shape)}; use the foundation that "
            "it was trained on"
        )
    return found


def _told(source: Source, spec: RunSpec, merging: bool) -> str:
    """One line: what the run begins with, and what of it is not as it was."""
    said, ratio = [f"starts from {source.title}"], _ratio(source, spec)
    pairs = any(block.pair for block in _taken(source, spec))
    if pairs and merging:
        said.append("its products move into the frozen weights, and every pair is drawn anew")
    elif pairs and source.rank < spec.config.adapters.rank:
        said.append(f"its rank {source.rank} gets {spec.config.adapters.rank - source.rank} further rows")
    if pairs and not merging and not _is_power_of_two(ratio):
        said.append(f"its scale {source.scale:g} is {source.scale / ratio:g} here, so B is rounded once")
    said += _other_forms(source, spec.config.adapters.moe)
    if fresh := _fresh(source, spec):
        said.append(f"without adapters of {', '.join(fresh)}, which start as usual")
    if source.left:
        said.append(f"{', '.join(source.left)} stays with its clients, and starts as usual")
    if source.closed:
        said.append("what its clients keep for themselves cannot be read here, and stays with them")
    if source.foundation is None:
        said.append(f"its file names {source.facts.get('base_model')} as its model, and nothing can be compared but shapes")
    elif source.dtype not in (None, spec.config.foundation.dtype):
        said.append(f"it was trained on weights in {source.dtype}, here they are {spec.config.foundation.dtype}")
    return f"{START}: {'; '.join(said)}"


def _other_forms(source: Source, moe: MoEAdapterConfig | None) -> Iterator[str]:
    """What makes the experts' sum another one, though no tensor has another shape by it."""
    if moe is None or not source.moe:
        return
    for key, words in _FORMS.items():
        old, new = source.moe.get(key, type(moe).model_fields[key].default), getattr(moe, key)
        if old != new:
            was, now = inline_yaml(old), inline_yaml(new)
            yield f"adapters.moe.{key} was {was} there and is {now} here, so it is another model{words}"


def _fresh(source: Source, spec: RunSpec) -> list[str]:
    """Blocks, or a number of their places, that the source does not have."""
    found: dict[str, list[int]] = {}
    for block in spec.blocks:
        # What a client keeps for itself is told apart, and a rescaler is always that.
        if block.name in (RESCALER, *source.left):
            continue
        counts = found.setdefault(_stem(block.name), [0, 0])
        for key in _keys([block], spec):
            counts[0] += key not in source.keys
            counts[1] += 1
    some = {stem: pair for stem, pair in found.items() if pair[0]}
    return [stem if lacking == total else f"{stem} ({lacking} of {total})" for stem, (lacking, total) in some.items()]


def _is_power_of_two(ratio: float) -> bool:
    return math.frexp(ratio)[0] == 0.5
