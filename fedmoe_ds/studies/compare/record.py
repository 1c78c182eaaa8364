"""Record: the figures of one finished run, per budget tier, and the check that the runs of one seed can be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedmoe_ds.clients.tiers import tier_top_k
from fedmoe_ds.errors import UserError
from fedmoe_ds.report.device_time import on_global, scored
from fedmoe_ds.report.formats import targets_of
from fedmoe_ds.report.history import SPLITS, TASK_METRICS, Event, History, tier_results
from fedmoe_ds.report.tasks import across_clients
from fedmoe_ds.studies.run import Run

# Infinite is worse than anything; a share that is not finite is nothing.
_BROKEN = {"perplexity": math.inf, "accuracy": math.nan} | dict.fromkeys(TASK_METRICS, math.nan)
_WORST = tuple(f"worst_{name}" for name in TASK_METRICS)
FAIRNESS = ("mean_accuracy", "worst_accuracy", "accuracy_spread")
"""Of accuracy over clients, each of which counts once: the mean, that of the worst tenth, the standard deviation."""
FIGURES = (*_BROKEN, *(f"clients_{name}" for name in _BROKEN), *_WORST, *FAIRNESS, "flops")
Figures = dict[str, float]
"""A figure that was not recorded is absent; one that was recorded as not finite is infinity (perplexity) or NaN."""


@dataclass(frozen=True)
class Record:
    """What a finished run says.

    `before` and `after` hold per tier the figures of the foundation and of the last round: those of the global hold-out, with
    `clients_` those of all clients' hold-outs pooled, with `worst_` the mean over the worst tenth of the clients, and those of
    `FAIRNESS` where clients were scored one by one. `flops` are
    forward and backward floating-point operations of one client in one round, averaged over the rounds and the clients of the
    tier that trained. `experts`: whether there are any; plain LoRA on a dense foundation has none. `courses`: by tier, the
    evaluations of the global hold-out with the virtual time and energy until then, of a run on simulated devices; `targets`:
    perplexity and accuracy that it looks for. `evaluations`: by tier, those of the global hold-out of any run.
    """

    label: str
    seed: int
    name: str
    digest: str
    before: Mapping[str, Figures]
    after: Mapping[str, Figures]
    ground: Mapping[str, Any]
    versions: Mapping[str, str]
    experts: bool = True
    courses: Mapping[str, Sequence[Event]] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)
    evaluations: Mapping[str, Sequence[Event]] = field(default_factory=dict)


def read_record(run: Run) -> Record:
    """The record of a finished run."""
    history = run.history()
    assert history.end is not None, f"{run.name} is not finished"
    before: dict[str, Figures] = {}
    after: dict[str, Figures] = {}
    for result in tier_results(history.evaluations.values()):
        prefix = "" if result.split == "global" else "clients_"
        before.setdefault(result.tier, {}).update(_scores(result.before, prefix))
        after.setdefault(result.tier, {}).update(_scores(result.after, prefix))
        if result.split == "clients":
            for figures, event in ((before[result.tier], result.before), (after[result.tier], result.after)):
                figures.update(_worst(history, result.tier, event.get("round")))
                figures.update(_fairness(history, result.tier, event.get("round")))
    for tier, figures in after.items():
        figures.update(_flops(history, tier))
    versions = {str(key): str(value) for key, value in (history.run.get("versions") or {}).items()}
    digest = str(history.end.get("digest"))
    experts = history.run.get("num_experts") != 0
    courses = {tier: rows for tier in after if (rows := scored(history, tier))}
    named = history.run.get("devices") or {}
    targets = {metric: float(value) for metric in _BROKEN if (value := named.get(f"target_{metric}")) is not None}
    ground, evaluations = _ground(history), {tier: rows for tier in after if (rows := on_global(history, tier))}
    return Record(
        run.label, run.seed, run.name, digest, before, after, ground, versions, experts, courses, targets, evaluations
    )


def aligned(records: Sequence[Record]) -> list[Record]:
    """The same with runs without experts beside those that have some, where each has a single tier.

    Plain LoRA has top-k 1 by name only: its clients compute with all that they train, as those of the largest tier do.
    """
    tiers = {tier for record in records if record.experts for tier in record.after}
    if len(tiers) != 1:
        return list(records)
    (tier,) = tiers
    return [record if record.experts or len(record.after) != 1 else _at(record, tier) for record in records]


def _at(record: Record, tier: str) -> Record:
    """A record with a single tier under that tier's name."""
    (own,) = record.after
    clients = [{**client, "top_k": tier_top_k(tier)} for client in record.ground["clients"]]
    held = {name.replace(f"k={own}", f"k={tier}"): count for name, count in record.ground["hold-outs"].items()}
    ground = {**record.ground, "clients": clients, "hold-outs": held}
    before = {tier: record.before[own]} if own in record.before else {}
    courses, evaluations = ({tier: rows[own]} if own in rows else {} for rows in (record.courses, record.evaluations))
    after = {tier: record.after[own]}
    return replace(record, before=before, after=after, ground=ground, courses=courses, evaluations=evaluations)


def _scores(event: Event, prefix: str) -> Figures:
    return {
        prefix + name: worst if event[name] is None else float(event[name]) for name, worst in _BROKEN.items() if name in event
    }


def _worst(history: History, tier: str, round_index: int | None) -> Figures:
    """The task metrics of the worst tenth of the clients, whose hold-outs are scored one by one in this round."""
    found = {f"worst_{name}": across_clients(history.own_scores, tier, round_index, name) for name in TASK_METRICS}
    return {name: summary.worst_tenth for name, summary in found.items() if summary is not None}


def _fairness(history: History, tier: str, round_index: int | None) -> Figures:
    """How accuracy differs between the clients, likewise."""
    found = across_clients(history.own_scores, tier, round_index, "accuracy")
    return {} if found is None else dict(zip(FAIRNESS, (found.mean, found.worst_tenth, found.std), strict=True))


def _flops(history: History, tier: str) -> Figures:
    """The mean over the tier's client events; nothing where one of them lacks the field (a run of an older version)."""
    total, rows, known = history.trained.flops.get(tier, (0.0, 0, 0))
    return {"flops": total / rows} if known and known == rows else {}


def _ground(history: History) -> dict[str, Any]:
    """What all methods of a seed must share."""
    holdings = history.holdings
    clients = [
        {**{key: client.get(key) for key in ("name", "samples", "sequences", "top_k")}, "tokens": targets_of(client)}
        for client in holdings
    ]
    counts = [holdings.counts_of(place) for place in range(len(holdings))]
    # Round 0, before any method has done anything: what differs there is not the method.
    pooled = {key: event for key, event in history.evaluations.items() if key[0] == 0 and event["split"] in SPLITS}
    tokens = {f"{split} k={tier}": event.get("tokens") for (_, split, tier), event in pooled.items()}
    return {
        "foundation": history.run.get("foundation"),
        "clients": clients,
        "distribution": {"labels": holdings.labels, "counts": counts},
        "hold-outs": tokens,
    }


def check_same_ground(records: Sequence[Record]) -> None:
    """Raise UserError unless all runs of a seed had the same foundation, clients, data and hold-outs."""
    first: dict[int, Record] = {}
    for record in records:
        reference = first.setdefault(record.seed, record)
        for key, value in record.ground.items():
            if value != reference.ground[key]:
                raise UserError(
                    f"{key}: {_brief(value)}: {record.name} differs from {reference.name} ({_brief(reference.ground[key])}); "
                    "the methods of a seed must share foundation and data: remove both folders and start again"
                )


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
