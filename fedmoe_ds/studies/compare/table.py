"""Table: the results of a comparison as Markdown whose columns line up, so that it reads as plain text too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from fedmoe_ds.report import formats
from fedmoe_ds.report.history import TASK_METRICS
from fedmoe_ds.report.tables import markdown
from fedmoe_ds.studies.compare.aggregate import FOUNDATION, Comparison, Line
from fedmoe_ds.studies.compare.paired import half_interval
from fedmoe_ds.studies.compare.verdict import Verdict
from fedmoe_ds.studies.spread import with_spread

MISSING = "-"
_FAIRNESS = {"mean_accuracy": "mean accuracy of clients", "worst_accuracy": "worst tenth", "accuracy_spread": "spread"}
_NAMES = {
    "perplexity": "perplexity",
    "clients_perplexity": "clients' perplexity",
    "accuracy": "accuracy",
    **_FAIRNESS,
    "rounds": "rounds to the target",
    "virtual_time": "virtual time to the target",
    "joules": "energy to the target",
    "flops": "TFLOP",
}
_SPLITS = {"": "global", "clients_": "clients, pooled", "worst_": "worst tenth of the clients"}
_TASKS = {prefix + name: (words, split) for name, words in TASK_METRICS.items() for prefix, split in _SPLITS.items()}
_HEAD = ("method", "perplexity", "clients' hold-outs", "accuracy", "TFLOP", "of {first}")


def tier_table(comparison: Comparison, tier: str) -> str:
    """Foundation and methods at one tier: mean ± sample standard deviation over seeds, in bold what is not beaten.

    Perplexity and accuracy are those of the global hold-out, TFLOP those of one client in one round, forward and backward
    (without a spread: it is a count, and what it varies with is the clients' data).
    """
    lines = comparison.lines(tier)
    costs = {line.label: line.figures["flops"].mean for line in lines if "flops" in line.figures}
    reference = costs.get(comparison.labels[0])
    shares = [line.figures["accuracy"].mean for line in lines if "accuracy" in line.figures]
    # The coarsest line decides: a column with several precisions would be read as several certainties.
    digits = min((formats.share_digits(share, comparison.targets(tier)) for share in shares), default=2)

    def row(line: Line) -> list[str]:
        complete = line.seeds == comparison.seeds
        name = line.label if complete else f"{line.label} ({line.seeds} of {comparison.seeds} seeds)"
        cost = costs.get(line.label)
        share = f"{100 * cost / reference:.0f} %" if cost is not None and reference else MISSING
        cells = [
            _cell(comparison, line, tier, "perplexity", number),
            _cell(comparison, line, tier, "clients_perplexity", number),
            _cell(comparison, line, tier, "accuracy", lambda value: f"{100 * value:.{digits}f} %"),
            MISSING if cost is None else formats.number(cost / 1e12),
        ]
        return [name, *cells, share]

    head = [text.format(first=comparison.labels[0]) for text in _HEAD]
    return markdown(head, [row(line) for line in lines])


def task_table(comparison: Comparison, tier: str) -> str:
    """Task metrics before and after, with 95 % t-intervals over seeds; empty where the runs have none.

    The change is paired by seed: foundation and method have answered the same samples.
    """
    rows = []
    for label in comparison.labels:
        for figure, (words, split) in _TASKS.items():
            if (ends := comparison.before_after(label, tier, figure)) is not None:
                before, after = (list(end.values.values()) for end in ends)
                changes = [new - old for old, new in zip(before, after, strict=True)]
                rows.append([label, words, split, _share(before), _share(after), _share(changes, "+"), str(len(changes))])
    head = ["method", "metric", "hold-out", "foundation, %", "after, %", "change, points", "seeds"]
    return markdown(head, rows, text_columns=3) if rows else ""


def fairness_table(comparison: Comparison, tier: str) -> str:
    """Accuracy over clients, mean ± half of the 95 % t-interval over seeds; empty where clients were not scored one by one."""
    lines = [line for line in comparison.lines(tier) if all(figure in line.figures for figure in _FAIRNESS)]
    rows = [[line.label, *(_share(list(line.figures[name].values.values())) for name in _FAIRNESS)] for line in lines]
    head = ["method", *(f"{words}, {'points' if words == 'spread' else '%'}" for words in _FAIRNESS.values())]
    return markdown(head, rows) if rows else ""


def _share(values: Sequence[float], sign: str = "") -> str:
    mean, half = 100 * statistics.fmean(values), half_interval(values)
    return f"{mean:{sign}.1f}" if half is None else f"{mean:{sign}.1f} ± {100 * half:.1f}"


def _cell(comparison: Comparison, line: Line, tier: str, figure: str, form: Callable[[float], str]) -> str:
    spread = line.figures.get(figure)
    if spread is None:
        return MISSING
    text = with_spread(spread, form)
    return f"**{text}**" if line.label != FOUNDATION and line.label in comparison.best(tier, figure) else text


def number(value: float) -> str:
    """Two decimals, two digits where those would show little."""
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return "0" if value == 0 else f"{value:.2f}" if abs(value) >= 0.095 else f"{value:.2g}"


def verdict_table(verdicts: Sequence[Verdict], sources: bool = True) -> str:
    """Published orderings and what became of them; the difference is log(left / right) in percent, of shares in points."""
    arithmetic = all(verdict.arithmetic for verdict in verdicts)
    rows = []
    for verdict in verdicts:
        row = [_claim(verdict), verdict.answer, verdict.expectation.source, verdict.tier, _difference(verdict)]
        row += [] if arithmetic else [*_p_values(verdict), _flops(verdict)]
        rows.append(row if sources else [*row[:2], *row[3:]])
    head = ["expected", "verdict", *(["source"] if sources else []), "top-k", "left against right"]
    head += [] if arithmetic else ["p", "corrected p", "FLOPs of left"]
    return markdown(head, rows, text_columns=3 if sources else 2)


def _claim(verdict: Verdict) -> str:
    expected = verdict.expectation
    claim = f"{expected.claim}, {_NAMES[expected.metric]}"
    if expected.over > 1:
        claim += f", mean of {expected.over} evaluations"
    if expected.more_than_at is not None:
        claim += f", more clearly than at k={expected.more_than_at}"
    return claim


def _difference(verdict: Verdict) -> str:
    if verdict.difference is None:
        return MISSING
    unit = "points" if verdict.in_points else "%"
    text = with_spread(verdict.difference, lambda value: f"{number(100 * value)} {unit}")
    return text + (" (one seed)" if len(verdict.difference.values) == 1 else "")


def _p_values(verdict: Verdict) -> list[str]:
    return [MISSING, MISSING] if verdict.test is None else [p_value(verdict.test.p), p_value(verdict.test.corrected)]


def p_value(p: float) -> str:
    """Two digits; what is smaller than a thousandth says only that."""
    return "<0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def _flops(verdict: Verdict) -> str:
    """Those of the left side in those of the right one."""
    if verdict.flops is None:
        return MISSING
    share = f"{100 * math.exp(verdict.flops.mean):.0f} %"
    return f"equal ({share})" if verdict.equal_flops else share
