"""FLOPs of the budget tiers: C(k) = C_dense + k C_expert, as in FLAME (arXiv 2506.16600); derivation in docs/planning.md."""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe_ds.clients.tiers import tier_order
from fedmoe_ds.planner.workload import Job


@dataclass(frozen=True)
class TierFlops:
    """One tier: FLOPs of the forward pass over one sequence, of it the dense part; both with adapters."""

    label: str
    cap: int
    rank: int
    dense: float
    total: float


def tier_flops(job: Job, tokens: int | None = None) -> list[TierFlops]:
    """Every tier of the job, largest first. `tokens` are the rows of a sequence (default: the configured length)."""
    rows, cost = job.length if tokens is None else tokens, job.cost
    found = []
    # By label: several tiers of one budget differ in their shares of clients only.
    for tier in sorted({tier.label: tier for tier in job.tiers}.values(), key=lambda tier: tier_order(tier.label)):
        # An ensemble's rows pass through all of its models.
        through = rows * (tier.experts if cost.ensembles else 1)
        dense = through * (cost.dense + tier.rank * cost.dense_row)
        found.append(TierFlops(tier.label, tier.cap, tier.rank, dense, through * cost.forward(tier.cap, tier.rank)))
    return found
