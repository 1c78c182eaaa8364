"""Best round: which round's checkpoint is kept beside the newest ones, by `checkpoint.best`.

It is a function of the evaluation rows alone: the round after 1 or more that has the best figure, the first of equals. So it is
the same on every topology, and after a kill and a resume; metrics.jsonl, cut to what its checkpoint has seen, is all that is
remembered of it. Where the key was set late, or a disk has lost or damaged a checkpoint, it is the best of the rounds that are
still kept and intact, as they are found at a start.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedmoe_ds import terminal
from fedmoe_ds.checkpoint.reader import candidates, find_damage, folder_name, progress_of
from fedmoe_ds.clients.tiers import tier_order
from fedmoe_ds.config import CheckpointConfig, load_config
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.evaluation import Score
from fedmoe_ds.report import Record
from fedmoe_ds.report.history import tier_of

_SMALLER = ("perplexity",)
"""Metrics of which less is better."""
Row = tuple[int, str, str, float | None]
"""Round, split, label of the tier, figure."""


class BestRound:
    """The best round so far.

    Args:
        saving: the run's `checkpoint` section; `best` must be set.

    Attributes:
        round, value: None before the first round that counts.
        notes: lines about better rounds whose checkpoints are damaged.
    """

    def __init__(self, saving: CheckpointConfig) -> None:
        assert saving.best is not None
        self.metric, self.split, self.tier = saving.best, saving.best_split, saving.best_tier
        self.round: int | None = None
        self.value: float | None = None
        self.notes: list[str] = []

    def see(self, rows: Iterable[Row]) -> bool:
        """Take the rows of one round; whether it is the best now."""
        fitting = [row for row in rows if row[1] == self.split and self.tier in (None, row[2])]
        if not fitting:
            return False
        round_index, _, _, value = min(fitting, key=lambda row: tier_order(row[2]))
        # The foundation has no adapters to keep; a figure that is not finite is nobody's best.
        if round_index == 0 or value is None or not math.isfinite(value):
            return False
        if self.value is not None and not (value < self.value if self.metric in _SMALLER else value > self.value):
            return False
        self.round, self.value = round_index, value
        return True

    def see_scores(self, round_index: int, scores: Iterable[Score]) -> bool:
        """The same of rows that have just been evaluated."""
        return self.see((round_index, score.split, score.label, _figure(score, self.metric)) for score in scores)

    def see_record(self, events: Iterable[Mapping[str, Any]], kept: set[int]) -> None:
        """Take the `eval` events of a record, as far as they are of rounds that are `kept`."""
        by_round: dict[int, list[Row]] = {}
        for event in events:
            if event["event"] == "eval" and event["round"] in kept:
                row = (event["round"], event["split"], tier_of(event), event.get(self.metric))
                by_round.setdefault(event["round"], []).append(row)
        for round_index in sorted(by_round):
            self.see(by_round[round_index])

    def told(self) -> str | None:
        """For people: the round and its figure."""
        if self.round is None or self.value is None:
            return None
        tier = "the largest tier" if self.tier is None else f"tier {self.tier}"
        return f"best round so far: {self.round} ({self.metric} {self.value:.6g}, {tier}, {self.split} hold-out)"


def check_best_tier(saving: CheckpointConfig, labels: Iterable[str]) -> None:
    """Raise UserError where the run has no tier of the name that is asked for."""
    known = list(labels)
    if saving.best is not None and saving.best_tier not in (None, *known):
        raise UserError(f"checkpoint.best_tier: {saving.best_tier}: the run's tiers are {', '.join(known)}; name one of them")


def best_so_far(folder: Path, saving: CheckpointConfig, rounds: int | None = None) -> BestRound | None:
    """That of a run folder, of its first so many rounds; None where `checkpoint.best` is not set.

    Raises:
        UserError: metrics.jsonl is missing or damaged, or the checkpoint is another user's.
    """
    if saving.best is None:
        return None
    root, notes = folder / "checkpoints", list[str]()
    # Pooled figures decide; those of single clients are not held.
    events = [event for event in Record(folder / "metrics.jsonl") if event["event"] == "eval" and event["split"] != "client"]
    found = [progress_of(path) for path in candidates(root)]
    # A round that was interrupted afterwards has a checkpoint of another name.
    kept = {progress[0] for progress in found if progress is not None and not progress[1]}
    kept = {r for r in kept if rounds is None or r <= rounds}
    while True:
        best = BestRound(saving)
        best.see_record(events, kept)
        best.notes = notes
        if best.round is None:
            return best
        # Of the best alone: it costs reading all of a checkpoint.
        place = root / folder_name(best.round, False)
        if (damage := find_damage(place)) is None:
            return best
        notes.append(f"checkpoint {place.name}, the best round, is damaged ({damage}); taking the best of the others")
        kept.remove(best.round)


def restored_best(saving: CheckpointConfig, folder: Path, runtime: Runtime, rounds: int) -> BestRound | None:
    """The best round of those that a start continues, the same on every rank.

    Args:
        rounds: completed ones; what came after them has been cut from the record.
    """
    if saving.best is None:
        return None
    best = BestRound(saving)

    def recorded() -> list[Any]:
        found = best_so_far(folder, saving, rounds)
        assert found is not None
        return [found.round, found.value, found.notes]

    best.round, best.value, best.notes = runtime.run_on_rank0(recorded)
    return best


def best_round(folder: Path) -> int | None:
    """The best round of a run folder whose checkpoint is kept (`checkpoints/round-NNNNN`), by the saved configuration.

    None where its `checkpoint.best` is null, or no round has been evaluated. Better rounds whose checkpoints are damaged are
    named on standard error.

    Raises:
        UserError: config.yaml or metrics.jsonl is missing or damaged.
    """
    saving = load_config(folder / "config.yaml").checkpoint
    best = best_so_far(folder, saving)
    for line in best.notes if best is not None else ():
        terminal.note(line)
    return None if best is None else best.round


def _figure(score: Score, metric: str) -> float | None:
    value = getattr(score, metric) if metric in ("perplexity", "accuracy") else score.metrics.get(metric)
    return None if value is None else float(value)
