"""Budget tiers: what a client's budget buys, and what outputs call it.

A tier is called by its top-k, `4`. Where tiers of one top-k buy unequal LoRA ranks, experts, layers or blocks, these are said:
`4 r2` trains two LoRA rows, `4 e8` eight experts per batch or layer, `4 l2` the last two layers, `1 b2` two further layers.

Clients come to their tiers in one of three ways: by the tiers' shares, dealt in random order; by name (`clients` of a tier);
or by a column of the data that holds the label of their tier.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from fedmoe_ds.config import FederationConfig, TierConfig
from fedmoe_ds.data.groups import group_name
from fedmoe_ds.errors import UserError

BudgetKind = Literal["top_k", "rank", "experts", "layers", "blocks"]
"""What a method spends a budget on: active experts per token, LoRA rank, experts trained per batch or held, layers trained, the
last ones, or of further layers (`foundation.expand`) some."""


@dataclass(frozen=True)
class Capacity:
    """The largest of what a budget can buy: the model's top-k, the adapters' rank, the experts of a layer, the layers, and
    further ones."""

    top_k: int
    rank: int
    experts: int
    layers: int
    blocks: int = 0


@dataclass(frozen=True)
class Tier:
    """A budget tier with everything decided, see `Client`; `label` is what outputs call it, `clients` who is named for it."""

    top_k: int
    share: float
    cap: int
    rank: int
    experts: int
    label: str = ""
    clients: tuple[str, ...] = ()
    layers: int | None = None
    blocks: int | None = None

    @property
    def budget(self) -> Budget:
        return self.top_k, self.rank, self.experts, self.layers or 0, self.blocks or 0


def default_tiers(top_k: int) -> list[TierConfig]:
    """K, K/2, ..., 1 with equal shares (FLAME's tiers for K = 8); without experts K is 1, and there is one tier."""
    caps = []
    while top_k >= 1:
        caps.append(top_k)
        top_k //= 2
    return [TierConfig(top_k=cap, share=1.0) for cap in caps]


def resolve_tiers(config: FederationConfig, full: Capacity, spends: BudgetKind) -> list[Tier]:
    """The run's tiers, checked against the model.

    Args:
        spends: what the method spends a budget on; `federation.budget` overrides it.
    Raises:
        UserError: no tier, a number beyond the model's, or clients that are given to tiers in no way, or in two.
    """
    given = config.tiers if config.tiers is not None else default_tiers(full.top_k)
    if not given:
        raise UserError("federation.tiers: []: at least one tier is needed; drop the key for the default tiers")
    for i, tier in enumerate(given):
        # Refused and not cut: the run would otherwise report a budget that no client had.
        limits = (("top_k", full.top_k, "activates", "experts per token"), ("rank", full.rank, "has", "LoRA rows"),
                  ("experts", full.experts, "has", "experts per layer"), ("layers", full.layers, "has", "layers"),
                  ("blocks", full.blocks, "has", "further layers"))  # fmt: skip
        for key, most, verb, unit in limits:
            value = getattr(tier, key)
            if value is not None and value > most:
                raise UserError(f"federation.tiers.{i}.{key}: {value}: the model {verb} {most} {unit}; use 1 to {most}")
    _check_dealing(config)
    bought = spends if config.budget == "method" else config.budget
    tiers = [_decide(tier, full, bought) for tier in given]
    labels = tier_labels(tier.budget for tier in tiers)
    return [replace(tier, label=labels[tier.budget]) for tier in tiers]


def _decide(tier: TierConfig, full: Capacity, spends: str) -> Tier:
    top_k = tier.top_k or full.top_k
    share = top_k / full.top_k
    # Rounded down, a budget is an upper bound, but at least 1: a client without a row or an expert would train nothing.
    rank = tier.rank or max(1, int(full.rank * share))
    experts = tier.experts or max(1, int(full.experts * share))
    return Tier(
        top_k,
        tier.share or 1.0,
        cap=top_k if spends in ("top_k", "both") else full.top_k,
        rank=rank if spends in ("rank", "both") else full.rank,
        experts=experts if spends == "experts" else full.experts,
        clients=tuple(group_name(name) or name for name in tier.clients or ()),
        layers=(tier.layers or max(1, int(full.layers * share))) if spends == "layers" else None,
        blocks=(tier.blocks or max(1, int(full.blocks * share))) if spends == "blocks" else None,
    )


def _check_dealing(config: FederationConfig) -> None:
    """Shares, names or a column: one of them says which clients a tier has."""
    tiers, column = config.tiers or [], config.tier_column
    named = any(tier.clients for tier in tiers)
    if named and column is not None:
        raise UserError(f"federation.tier_column: {column}: federation.tiers.N.clients names the clients; drop one of the two")
    why = "names its clients" if named else f"has its clients by federation.tier_column={column}"
    given = named or column is not None
    for i, tier in enumerate(tiers):
        if given and tier.share is not None:
            raise UserError(f"federation.tiers.{i}.share: {tier.share}: a tier of this run {why}; drop the share")
        if named and not tier.clients:
            raise UserError(f"federation.tiers.{i}.clients: missing: other tiers name theirs; name them here, too")
        if not given and tier.share is None:
            raise UserError(f"federation.tiers.{i}.share: missing; give it as number > 0, or name the tier's clients")
    if given and config.assignment != "shuffled":
        raise UserError(f"federation.assignment: {config.assignment}: nobody is dealt, every tier {why}; drop the key")
    seen: dict[str, int] = {}
    for i, tier in enumerate(tiers):
        for name in tier.clients or ():
            # Under the name that the data would have: two spellings of a name are one client.
            if (other := seen.setdefault(group_name(name) or name, i)) != i:
                raise UserError(f"federation.tiers.{i}.clients: {name}: tier {other} names it, too; leave it in one of them")


Budget = tuple[int, int, int, int, int]
"""(top-k, LoRA rank, experts, layers, blocks): what tells tiers apart. A larger budget compares as larger.

Layers and blocks are 0 where no budget buys them."""


_LETTERS = "relb"
"""What a label says of LoRA rows, experts, layers and blocks; in the order of a budget."""


def tier_labels(budgets: Iterable[Budget]) -> dict[Budget, str]:
    """Every different budget, the largest first, with its label; no two labels are equal."""
    # Only what tells tiers of one top-k apart is said, so labels of ordinary runs stay plain numbers.
    ordered = sorted(set(budgets), reverse=True)
    return {budget: _label(budget, [other for other in ordered if other[0] == budget[0]]) for budget in ordered}


def _label(budget: Budget, peers: list[Budget]) -> str:
    """`peers` are the budgets of the same top-k, this one included."""
    told = [f"{letter}{budget[i]}" for i, letter in enumerate(_LETTERS, 1) if len({peer[i] for peer in peers}) > 1]
    return " ".join([str(budget[0]), *told])


def tier_top_k(label: str) -> int:
    """The top-k that a label begins with."""
    return int(label.split()[0])


def tier_order(label: str) -> tuple[int, ...]:
    """A key that sorts labels of one run: the largest budget first."""
    return tuple(-int(part.lstrip(_LETTERS)) for part in label.split())
