"""Score tables: figures of an evaluation for people, as lines for programs, and as a document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from fedmoe_ds.report.formats import MISSING, accuracy, counted_share, number
from fedmoe_ds.report.tables import markdown
from fedmoe_ds.results.scoring import GLOBAL, Row, Scores

WIDEST = 10
"""Models side by side in a matrix on a terminal; of more, what sums them up is shown."""
_SPLITS = {"global": "global hold-out", "clients": "clients' hold-outs"}
_NOT_SHARES = frozenset({"perplexity"})


def lines(scores: Scores) -> str:
    """One JSON object per row: a stable interface, see docs/outputs.md."""
    # ASCII: what does not print is escaped by JSON's rules, not by the terminal's.
    return "\n".join(json.dumps(row.figures(), allow_nan=False) for row in scores.rows)


def document(scores: Scores, facts: Mapping[str, Any]) -> str:
    """All rows and what they are about, as JSON."""
    rows = [row.figures() for row in scores.rows]
    return json.dumps({**facts, **scores.facts, "rows": rows}, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def table(scores: Scores, given: bool) -> str:
    """What a person reads. `given`: of rows that were named, not of the run's own hold-outs."""
    rows = scores.rows
    if any(row.model is not None for row in rows):
        return _matrices(rows)
    names = [name.replace("_", " ") for name in rows[0].score.metrics]
    head = ["tier", "rows", "perplexity", "accuracy", *names, "samples", "targets", "tokens"]
    return markdown(head, [_line(row, given) for row in rows], 2)


def _line(row: Row, given: bool) -> list[str]:
    score, figures = row.score, row.figures()
    about = "all" if given else score.client or _SPLITS[score.split]
    shares = [counted_share(figures, name, score.samples) for name in score.metrics]
    counts = [str(count) for count in (score.samples, score.targets, score.tokens)]
    return [_tier(row), about, number(score.perplexity, 5), accuracy(figures), *shares, *counts]


def _tier(row: Row) -> str:
    return f"{row.score.label} (foundation)" if row.round == 0 else row.score.label


def _matrices(rows: list[Row]) -> str:
    """A table for each figure: clients' rows down, models across."""
    shown = []
    for name in ("perplexity", "accuracy", *rows[0].score.metrics):
        cells: dict[str, dict[str, float | None]] = {}
        for row in rows:
            cells.setdefault(str(row.score.client), {})[_model(row)] = row.figures()[name]
        models = list(dict.fromkeys(map(_model, rows)))
        text = _whole(cells, models, name) if len(models) <= WIDEST else _summary(cells, models, name)
        shown.append(f"{name.replace('_', ' ')}\n\n{text}")
    return "\n\n".join(shown)


def _model(row: Row) -> str:
    return str(row.model) if row.model != GLOBAL else f"{GLOBAL} {_tier(row)}"


def _whole(cells: dict[str, dict[str, float | None]], models: list[str], name: str) -> str:
    head = ["rows of", *models]
    return markdown(head, [[client, *(_cell(found.get(model), name) for model in models)] for client, found in cells.items()])


def _summary(cells: dict[str, dict[str, float | None]], models: list[str], name: str) -> str:
    """Of many models: the global ones, the client's own, and the mean over the others'."""
    shared = [model for model in models if model.startswith(f"{GLOBAL} ")]
    body = []
    for client, found in cells.items():
        others = [value for model, value in found.items() if model not in (client, *shared) and value is not None]
        figures = [found.get(client), fmean(others) if others else None]
        body.append([client, *(_cell(found.get(model), name) for model in shared), *(_cell(value, name) for value in figures)])
    count = len(models) - len(shared)
    text = markdown(["rows of", *shared, "own", "others, mean"], body)
    return f"{text}\n\n{count} models of clients; --json FILE or --lines has the figures of every one"


def _cell(value: float | None, name: str) -> str:
    if value is None:
        return MISSING
    return number(value, 5) if name in _NOT_SHARES else f"{100 * value:.1f} %"
