"""Tasks on the report page: what share of the samples is answered right, how clients differ in it, and answers as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fedmoe_ds.clients.tiers import tier_order
from fedmoe_ds.report import formats
from fedmoe_ds.report.by_client import FIGURES, OwnScores
from fedmoe_ds.report.history import TASK_METRICS, Event, History, TierResult, tier_of, tier_results
from fedmoe_ds.report.markup import Markup, table, tag
from fedmoe_ds.report.svg import tier_colours, tier_mark

HOLD_OUT = {"global": "Global hold-out", "clients": "Clients' hold-outs"}
LOWER_IS_BETTER = {"perplexity"}
TASK_LEAD = (
    "The share of hold-out samples that are answered right. Exact match: greedy decoding gives the reference answer, token by "
    "token. Ranked choice: of all answers in the data the right one is the likeliest. View 0, view 1: the model that reads "
    "this view alone names the class. In brackets: the 95 % interval for the number of samples, taken as independent."
)
ACROSS_LEAD = (
    "Every client's own hold-out is one value, whatever its size. Worst tenth: the mean over the tenth of the clients, rounded "
    "up, for which the model does worst. Spread: the standard deviation over clients."
)
GENERATION_LEAD = (
    "What the model of the largest tier answers by greedy decoding, for the first samples of the hold-out: before is "
    "{before}. An answer that had no end within evaluation.max_new_tokens is followed by an ellipsis."
)


@dataclass(frozen=True)
class Across:
    """One figure over clients, each counting once. `std` is the population's: these are all clients, not a sample."""

    clients: int
    mean: float
    worst_tenth: float
    std: float
    least: float
    most: float


def across(values: Sequence[float], lower_is_better: bool) -> Across:
    """Summarise a figure over at least one client; the worst tenth is ceil(n / 10) of them."""
    ordered = sorted(values, reverse=lower_is_better)
    worst = ordered[: math.ceil(len(ordered) / 10)]
    mean = statistics.fmean(values)
    # Not `pstdev`, whose fractions take seconds for a million clients; here, too, equal values have no spread at all.
    spread = math.hypot(*(value - mean for value in values)) / math.sqrt(len(values))
    return Across(len(values), mean, statistics.fmean(worst), spread, min(values), max(values))


def across_clients(scores: OwnScores, tier: str, round_index: int | None, figure: str) -> Across | None:
    """The same of a tier's clients in a round, the first or the last; None where none has a finite value of this figure."""
    values = scores.values(tier, round_index, figure)
    return across(values, figure in LOWER_IS_BETTER) if values else None


def task_table(history: History) -> Markup | None:
    """Task metrics before and after, per tier and hold-out; None for a run without."""
    results = [result for result in tier_results(history.evaluations.values()) if result.metrics]
    if not results:
        return None
    colours = tier_colours(history.tiers)
    head = ["hold-out", "tier", "metric", "before", "after", "change", "samples"]
    rows = [_task_row(result, name, colours[result.tier]) for result in results for name in result.metrics]
    body = tag("div", table(head, rows, text_columns=3), cls="scroll")
    return tag("div", tag("h3", "Task metrics"), tag("p", TASK_LEAD, cls="lead"), body)


def _task_row(result: TierResult, name: str, css: str) -> list[str]:
    before, after = result.before.get(name), result.after.get(name)
    gain = after - before if before is not None and after is not None else None
    shares = [formats.counted_share(event, name, event.get("samples")) for event in (result.before, result.after)]
    samples = (result.after or result.before).get("samples")
    return [
        HOLD_OUT[result.split],
        tag("td", tier_mark(css, result.tier)),
        TASK_METRICS[name],
        *shares,
        formats.points(gain, result.task_digits(name)),
        formats.count(samples),
    ]


def across_table(history: History) -> Markup | None:
    """Mean, worst tenth and spread over clients, per tier; None where clients were not evaluated one by one."""
    own = history.own_scores
    if not own:
        return None
    colours = tier_colours(history.tiers)
    rows = []
    for tier in sorted(own.tiers, key=tier_order):
        rounds = (0, own.last_round(tier) or None)
        for figure in FIGURES:
            before, after = (across_clients(own, tier, round_index, figure) for round_index in rounds)
            if before or after:
                mark = tag("td", tier_mark(colours.get(tier, "t0"), tier))
                rows.append([mark, *_across_cells(figure, before, after)])
    heads = ("mean before", "after", "worst tenth before", "after", "spread before", "after", "range after", "clients")
    body = tag("div", table(["tier", "figure", *heads], rows, text_columns=2), cls="scroll")
    return tag("div", tag("h3", "Across clients"), tag("p", ACROSS_LEAD, cls="lead"), body)


def _across_cells(figure: str, before: Across | None, after: Across | None) -> list[str]:
    form = formats.number if figure in LOWER_IS_BETTER else formats.percent
    ends = (before, after)
    cells = [form(None if end is None else getattr(end, name)) for name in ("mean", "worst_tenth", "std") for end in ends]
    reach = formats.MISSING if after is None else f"{form(after.least)} to {form(after.most)}"
    known = after or before
    return [FIGURES[figure], *cells, reach, formats.count(None if known is None else known.clients)]


def generation_section(history: History) -> Markup | None:
    """Prompt, reference, and the answers before and after; None for a run that shows none."""
    if not history.generations:
        return None
    last = max(round_ for round_, _ in history.generations)
    samples = sorted({sample for _, sample in history.generations})
    rows = []
    for sample in samples:
        before, after = history.generations.get((0, sample)), history.generations.get((last, sample)) if last else None
        known = after or before or {}
        texts = [str(known.get("prompt") or ""), str(known.get("reference") or ""), _answer(before), _answer(after)]
        rows.append([tag("td", tag("pre", text)) for text in texts])
    tier = tier_of(next(iter(history.generations.values())))
    head = ["prompt", "reference", "before", f"after round {last}" if last else "after"]
    body = tag("div", table(head, rows, text_columns=4, cls="answers"), cls="scroll")
    return tag("div", tag("p", f"{GENERATION_LEAD.format(before=history.before)} Tier: top-k {tier}.", cls="lead"), body)


def _answer(event: Event | None) -> str:
    if event is None:
        return formats.MISSING
    text = str(event.get("answer") or "")
    return text if event.get("ended", True) else f"{text} …"
