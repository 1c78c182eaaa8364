"""Tiers: how outputs call budget tiers.

A tier is called by its top-k, `4`. Where tiers of one top-k buy unequal LoRA ranks or numbers of experts, these are said too:
`4 r2` trains two LoRA rows, `4 e8` eight experts per batch.
"""

from __future__ import annotations

from collections.abc import Iterable

Budget = tuple[int, int, int]
"""(top-k, LoRA rank, experts per batch): what tells tiers apart. A larger budget compares as larger."""


def tier_labels(budgets: Iterable[Budget]) -> dict[Budget, str]:
    """Every different budget, the largest first, with its label; no two labels are equal."""
    ordered = sorted(set(budgets), reverse=True)
    return {budget: _label(budget, [other for other in ordered if other[0] == budget[0]]) for budget in ordered}


def _label(budget: Budget, peers: list[Budget]) -> str:
    """`peers` are the budgets of the same top-k, this one included."""
    told = [f"{letter}{budget[i]}" for i, letter in ((1, "r"), (2, "e")) if len({peer[i] for peer in peers}) > 1]
    return " ".join([str(budget[0]), *told])


def tier_top_k(label: str) -> int:
    """The top-k that a label begins with."""
    return int(label.split()[0])


def tier_order(label: str) -> tuple[int, ...]:
    """A key that sorts labels of one run: the largest budget first."""
    return tuple(-int(part.lstrip("re")) for part in label.split())
