"""Advice: what in a configuration would lower the memory of a rank, found by planning it again with each change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fedmoe_ds.clients.optimizer import moment_bytes
from fedmoe_ds.federation.shortage import may_cut_steps
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.legality import legal_sizes
from fedmoe_ds.planner.rank_memory import rank_memory
from fedmoe_ds.planner.workload import Job
from fedmoe_ds.planner.world import World

LEAST = 0.02
"""Share of the memory that a change must save to be named."""
SHOWN = 4


def advice(job: Job, ep_size: int, in_flight: int | None, world: World, hardware: Hardware, drawn: int) -> str:
    """The changes that lower a rank's memory most, each by itself, as the end of a message."""
    needed = sum(rank_memory(job, ep_size, in_flight, hardware, drawn).values())
    saved = {}
    for words, changed, size, flight in _changes(job, ep_size, in_flight, world, drawn):
        less = needed - sum(rank_memory(changed, size, flight, hardware, drawn).values())
        if less >= LEAST * needed:
            saved[words] = less
    best = sorted(saved, key=lambda words: -saved[words])[:SHOWN]
    if not best:
        return "nothing in its configuration makes it much smaller: use ranks with more memory"
    return "use " + ", ".join(f"{words} ({saved[words] / 2**30:.1f} GiB less)" for words in best)


def _changes(
    job: Job, ep_size: int, in_flight: int | None, world: World, drawn: int
) -> Iterator[tuple[str, Job, int, int | None]]:
    """(words, job, ep_size, clients in flight) of every single change."""
    execution, local, rank = job.config.execution, job.config.local, job.config.adapters.rank
    sizes = [size for size in legal_sizes(world.ranks, job.expert_layout.num_experts) if size > ep_size]
    if sizes:
        yield f"topology.ep_size={sizes[-1]}", job, sizes[-1], in_flight
    if (in_flight or drawn) > ep_size:
        yield f"execution.clients_in_flight={ep_size}", job, ep_size, ep_size
    step = execution.micro_batch_size or local.batch_size
    if step > 1 and may_cut_steps(job.config):
        yield "execution.micro_batch_size=1", _with(job, execution={"micro_batch_size": 1}), ep_size, in_flight
    if not execution.activation_checkpointing:
        changed = _with(job, execution={"activation_checkpointing": True})
        yield "execution.activation_checkpointing=true", changed, ep_size, in_flight
    if moment_bytes(local) and local.moments == "float32":
        yield "local.moments=bfloat16", _with(job, local={"moments": "bfloat16"}), ep_size, in_flight
    if rank > 1 and any(block.pair for block in job.blocks):
        smaller = replace(_with(job, adapters={"rank": rank // 2}), blocks=[_narrower(block, rank) for block in job.blocks])
        yield f"adapters.rank={rank // 2}", smaller, ep_size, in_flight


def _with(job: Job, **sections: dict[str, Any]) -> Job:
    changed = {name: getattr(job.config, name).model_copy(update=values) for name, values in sections.items()}
    return replace(job, config=job.config.model_copy(update=changed))


def _narrower(block: BlockSpec, rank: int) -> BlockSpec:
    """A block of half the LoRA rank."""
    axis = block.rank_axis
    if axis is None or block.item[axis] != rank:
        return block
    return replace(block, item=tuple(rank // 2 if i == axis else size for i, size in enumerate(block.item)))
