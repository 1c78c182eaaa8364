"""Advice: what in a configuration would lower the memory of a rank, found by planning it again with each change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.optimizer import moment_bytes
from fedmoe_ds.federation.schedule import schedule
from fedmoe_ds.federation.shortage import may_cut_steps
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.legality import HEADROOM, host_shortage, legal_sizes
from fedmoe_ds.planner.rank_memory import RankMemory, rank_memory
from fedmoe_ds.planner.workload import Job
from fedmoe_ds.planner.world import World

LEAST = 0.02
"""Share of the memory that a change must save to be named."""
SHOWN = 4


def advice(job: Job, ep_size: int, in_flight: int | None, world: World, hardware: Hardware) -> str:
    """The changes that lower a rank's memory most, each by itself, as the end of a message."""
    asked = _Asked(world, hardware, job.participants(1))
    needed, saved = asked.bytes(job, ep_size, in_flight), {}
    for words, changed, size, flight in _changes(asked, job, ep_size, in_flight):
        less = needed - asked.bytes(changed, size, flight)
        if less >= LEAST * needed:
            saved[words] = less
    best = sorted(saved, key=lambda words: -saved[words])[:SHOWN]
    if not best:
        return "nothing in its configuration makes it much smaller: use ranks with more memory"
    return "use " + ", ".join(f"{words} ({saved[words] / 2**30:.1f} GiB less)" for words in best)


@dataclass(frozen=True)
class _Asked:
    """The world that is asked about, and the clients of a round."""

    world: World
    hardware: Hardware
    chosen: list[Client]

    def bytes(self, job: Job, ep_size: int, in_flight: int | None) -> int:
        """Of a rank, as a plan says it."""
        return sum(self._held(job, ep_size, in_flight).device.values())

    def fits(self, job: Job, ep_size: int, in_flight: int | None) -> bool:
        """Into so much of a rank's memory as a recommendation may take."""
        return self.bytes(job, ep_size, in_flight) <= HEADROOM * self.hardware.available(self.world.ranks_per_host)

    def host_has_room(self, job: Job, ep_size: int, in_flight: int | None) -> bool:
        """For all ranks of a host, where its memory is known."""
        held = sum(self._held(job, ep_size, in_flight).host.values())
        return host_shortage(held, self.world.ranks_per_host, self.hardware.host_memory_bytes) is None

    def _held(self, job: Job, ep_size: int, in_flight: int | None) -> RankMemory:
        plan = schedule(self.chosen, job.cost, job.config.local, self.world.ranks // ep_size, ep_size, in_flight)
        return rank_memory(job, ep_size, in_flight, self.hardware, len(self.chosen), plan)


def _changes(asked: _Asked, job: Job, ep_size: int, in_flight: int | None) -> Iterator[tuple[str, Job, int, int | None]]:
    """(words, job, ep_size, clients in flight) of every single change."""
    execution, local, rank = job.config.execution, job.config.local, job.config.adapters.rank
    sizes = [size for size in legal_sizes(asked.world.ranks, job.expert_layout.num_experts) if size > ep_size]
    if sizes:
        yield f"topology.ep_size={sizes[-1]}", job, sizes[-1], in_flight
    if fewer := _fewer(asked, job, ep_size, in_flight or len(asked.chosen)):
        yield f"execution.clients_in_flight={fewer}", job, ep_size, fewer
    step = execution.micro_batch_size or local.batch_size
    if step > 1 and may_cut_steps(job.config):
        yield "execution.micro_batch_size=1", _with(job, execution={"micro_batch_size": 1}), ep_size, in_flight
    if not execution.activation_checkpointing:
        changed = _with(job, execution={"activation_checkpointing": True})
        yield "execution.activation_checkpointing=true", changed, ep_size, in_flight
    if moment_bytes(local) and local.moments == "float32":
        yield "local.moments=bfloat16", _with(job, local={"moments": "bfloat16"}), ep_size, in_flight
    if moment_bytes(local) and asked.hardware.kind != "cpu" and execution.moments_on == "device":
        changed = _with(job, execution={"moments_on": "host"})
        # Named only where it is no other shortage.
        if asked.host_has_room(changed, ep_size, in_flight):
            yield "execution.moments_on=host", changed, ep_size, in_flight
    if execution.client_state_gib:
        # Files take as much of a disk instead.
        yield "execution.client_state_gib=0", _with(job, execution={"client_state_gib": 0.0}), ep_size, in_flight
    if rank > 1 and any(block.pair for block in job.blocks):
        smaller = replace(_with(job, adapters={"rank": rank // 2}), blocks=[_narrower(block, rank) for block in job.blocks])
        yield f"adapters.rank={rank // 2}", smaller, ep_size, in_flight


def _fewer(asked: _Asked, job: Job, ep_size: int, flight: int) -> int | None:
    """Half the clients in flight, or a quarter, and so on: the first that fits by itself, else one; None where one it is."""
    fewer = flight
    while fewer > 1:
        fewer //= 2
        if asked.fits(job, ep_size, fewer):
            break
    return fewer if fewer < flight else None


def _with(job: Job, **sections: dict[str, Any]) -> Job:
    changed = {name: getattr(job.config, name).model_copy(update=values) for name, values in sections.items()}
    return replace(job, config=job.config.model_copy(update=changed))


def _narrower(block: BlockSpec, rank: int) -> BlockSpec:
    """A block of half the LoRA rank."""
    axis = block.rank_axis
    if axis is None or block.item[axis] != rank:
        return block
    return replace(block, item=tuple(rank // 2 if i == axis else size for i, size in enumerate(block.item)))
