"""Round messages: what ranks tell each other about a round over the control plane, in as few messages as there can be.

Among many ranks a message costs its way, not its length, so what is known at the same time travels together: one gather when
training ends, one sum after the sums of aggregation, one question at the round's end. With the sums of an evaluation these are
all messages of a round that reach every rank; personal state and checkpoints have their own. A method that chooses the rank of
its products adds one within clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fedmoe_ds.checkpoint.memories import decoded, encoded
from fedmoe_ds.federation.traffic import Products

if TYPE_CHECKING:
    from fedmoe_ds.aggregation.round_sums import RoundSums
    from fedmoe_ds.checkpoint.state import PartialRound
    from fedmoe_ds.clients.client import Client
    from fedmoe_ds.federation.build import Parts
    from fedmoe_ds.federation.journal import Journal


def meet(parts: Parts, partial: PartialRound) -> bool:
    """Wait for all ranks; their reports, and their findings about memory, are then known everywhere.

    Returns:
        Whether any of them was asked to stop.
    """
    # What an earlier start has left is on every rank: told again, it would travel as often as there are ranks.
    mine = {str(index): report for index, report in partial.done.items() if index not in partial.known}
    learnt = {str(i): encoded(memory) for i, memory in partial.memories.items() if i not in partial.known}
    told = parts.runtime.gather([parts.stop.requested, parts.skipped.news, mine, *([learnt] if learnt else [])])
    partial.done |= {int(index): report for _, _, done, *_ in told for index, report in done.items()}
    partial.known = frozenset(partial.done)
    shapes = parts.spec.method.memory()
    for _, findings, _, *learnt_there in told:
        parts.skipped.learn(findings)
        for theirs in learnt_there:
            partial.memories |= {int(index): decoded(memory, shapes) for index, memory in theirs.items()}
    return any(stopped for stopped, *_ in told)


def share_counts(parts: Parts, partial: PartialRound, sums: RoundSums) -> dict[str, int]:
    """Add up what ranks have counted: the activation of each tier, and the weights of the reduced `sums`.

    Returns:
        By block, in how many tensors of all ranks the weights do not sum to zero.
    """
    tiers, weighted = list(parts.evaluator.tiers), sums.weighted()
    active = torch.zeros(len(tiers), *parts.counts_shape, dtype=torch.int64)
    for i, tier in enumerate(tiers):
        if tier in partial.activation:
            active[i] += torch.from_numpy(partial.activation[tier])
    total = torch.cat([active.flatten(), torch.tensor(list(weighted.values()), dtype=torch.int64)])
    parts.runtime.control.sum(total)
    active = total[: active.numel()].view_as(active)
    partial.activation = {tier: active[i].numpy() for i, tier in enumerate(tiers)}
    return dict(zip(weighted, total[active.numel() :].tolist(), strict=True))


def unweighted(parts: Parts, chosen: Sequence[Client], round_index: int, weighted: dict[str, int]) -> list[str]:
    """Blocks that some of these clients were told to train, and of which no tensor has any weight (`share_counts`).

    Collective where there are such blocks and what a client is told may follow from what it keeps elsewhere.
    """
    resting = parts.spec.method.resting(round_index)
    without = [spec for spec in parts.spec.blocks if weighted.get(spec.name, 1) == 0 and spec.name not in resting]
    if not without:
        return []
    personal = parts.state.personal
    apart = bool(personal) and personal.homes.clusters > 1
    # The round has brought home what clients keep: each cluster speaks for those that are at home in it.
    mine = [client for client in chosen if not apart or personal.homes.is_here(client.index)]
    told = [parts.trainer.hooks.assign(client, round_index) for client in mine]
    trained = [any((own := one.trains(spec)) is None or bool(own.any()) for one in told) for spec in without]
    if apart:
        trained = parts.runtime.any(*trained)
    return [spec.name for spec, some in zip(without, trained, strict=True) if some]


def share_products(parts: Parts) -> dict[str, int]:
    """Add up what the ranks of a cluster have moved into frozen weights; all clusters have moved the same.

    Returns:
        Fields of the `round` event, and none of a method that does not choose how much it moves.
    """
    if not parts.spec.method.chooses_rank:
        return {}
    total = torch.tensor([parts.server.moved.rows, parts.server.moved.numbers], dtype=torch.int64)
    parts.topology.control.sum(total)
    moved = Products(*total.tolist())
    # Clients of the round that has ended have received the products of the one before.
    parts.send_down(moved.numbers)
    return {"product_rows": moved.rows, "product_bytes": moved.bytes}


def stop_requested_here(parts: Parts) -> bool:
    """Whether any rank of this cluster was asked to stop; all of its ranks agree."""
    mine = torch.tensor([parts.stop.requested], dtype=torch.int64)
    return bool(parts.topology.control.largest(mine))


def stop_agreed(parts: Parts, journal: Journal) -> bool:
    """Whether any rank was asked to stop. Raises UserError, on all of them, where rank 0 could not write the record."""
    stopped, failed = parts.runtime.any(parts.stop.requested, journal.failed)
    if failed:
        journal.settle()
    return stopped
