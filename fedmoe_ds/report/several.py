"""Several runs on one self-contained page: who they are, what came out, their curves in one picture, what they differ in.

The page calls the runs A, B, C, in the order in which they were named: names may be long, and two runs may share one.
"""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds.clients.tiers import tier_order
from fedmoe_ds.config.yaml12 import parse_yaml
from fedmoe_ds.errors import UserError
from fedmoe_ds.report import formats
from fedmoe_ds.report.differences import difference_section
from fedmoe_ds.report.history import TASK_METRICS, Event, History, TierResult, tier_results
from fedmoe_ds.report.html import PAGE, document, read_config, read_history
from fedmoe_ds.report.markup import Markup, choices, join, legend, table, tag
from fedmoe_ds.report.sections import tick
from fedmoe_ds.report.svg import Series, line_chart, tier_colours, tier_mark
from fedmoe_ds.report.tasks import HOLD_OUT
from fedmoe_ds.storage.files import write_whole

COLOURS = 8
DIGEST = 12
"""Hexadecimal digits of a digest that a table shows; all of them when pointed at."""
RUN_LEAD = (
    "Sent: bytes that rank 0 has handed to collectives, over all recorded rounds. Time: of the last start, or of the rounds so "
    "far. Equal digests are equal results, to the bit."
)
RESULT_LEAD = (
    "Before is {before}, after the global model of the last evaluated round. A ratio below 1 is better. In brackets: the "
    "95 % interval for the number of targets or samples, taken as independent."
)
CURVE_LEAD = "Round 0 is {before}, before any client has trained. Each line is a run; a picture per tier and figure."


@dataclass(frozen=True)
class Told:
    """A run as its folder tells it; `key` and `css` are its letter and its colour on the page."""

    key: str
    css: str
    folder: Path
    history: History
    config: dict[str, Any] | None

    @property
    def name(self) -> str:
        return str(self.history.run.get("name") or self.folder.name)

    @property
    def results(self) -> dict[tuple[str, str], TierResult]:
        return {(result.split, result.tier): result for result in tier_results(self.history.evaluations.values())}


def write_comparison(folders: Sequence[Path], target: Path) -> Path:
    """Write the page about several runs, finished or not, and return its path.

    Raises:
        UserError: a folder is named twice, is none, or holds no readable record; `target` is the page of a run.
        OSError: the page cannot be written.
    """
    check_target(target)
    runs = read_runs(folders)
    write_whole(target, page(runs))
    return target


def check_target(target: Path) -> None:
    """Raises UserError for the page that a run folder has of its own, which the run would write again."""
    if target.name == PAGE and (target.parent / "metrics.jsonl").exists():
        raise UserError(f"--output: {target}: is the page of the run in that folder; give another file")


def read_runs(folders: Sequence[Path]) -> list[Told]:
    """Raises UserError for a run that is named twice, also by way of a link, or that cannot be read."""
    seen: dict[str, Path] = {}
    for folder in folders:
        if (first := seen.setdefault(os.path.realpath(folder), folder)) is not folder:
            raise UserError(f"run folder: {folder}: is {first} once more; name every run once")
    keys = _letters(len(folders))
    return [_told(key, number, folder) for number, (key, folder) in enumerate(zip(keys, folders, strict=True))]


def _letters(size: int) -> list[str]:
    """A, B, ... Z, A2, B2, ..."""
    letters = string.ascii_uppercase
    return [letters[n % 26] + ("" if n < 26 else str(n // 26 + 1)) for n in range(size)]


def _told(key: str, number: int, folder: Path) -> Told:
    history, text = read_history(folder), read_config(folder)
    config = None if text is None else parse_yaml(text, str(folder / "config.yaml"))
    return Told(key, f"l{number % COLOURS}", folder, history, config if isinstance(config, dict) else None)


def page(runs: Sequence[Told]) -> str:
    """The whole document as text."""
    differences = difference_section([run.key for run in runs], [run.config for run in runs], [run.history.run for run in runs])
    sections = [
        ("runs", "Runs", _run_section(runs)),
        ("results", "Results", _result_section(runs)),
        ("convergence", "Convergence per tier", _curve_section(runs)),
        ("differences", "What differs", differences),
    ]
    links = [tag("a", title, href=f"#{anchor}") for anchor, title, _ in sections]
    bodies = [tag("section", tag("h2", title), body, id=anchor) for anchor, title, body in sections]
    done = sum(run.history.end is not None for run in runs)
    state = tag("span", f"{done} of {len(runs)} finished", cls="state ok" if done == len(runs) else "state")
    head = tag(
        "header",
        tag("p", "fedmoe-ds report of several runs", state, cls="eyebrow"),
        tag("h1", formats.many(len(runs), "run")),
        legend((run.css, f"{run.key}: {run.name}") for run in runs),
    )
    title = ", ".join(run.name for run in runs)
    return document(title, join([head, tag("nav", *links, aria_label="sections"), tag("main", *bodies)]))


def _run_section(runs: Sequence[Told]) -> Markup:
    head = ["run", "name", "folder", "method", "seed", "state", "rounds", "clients", "ranks", "tokens", "sent", "peak memory"]
    on_gpu = any((run.history.end or {}).get("device_peak_bytes") for run in runs)
    if on_gpu:
        head.append("peak GPU memory")
    first: dict[str, str] = {}
    rows = []
    for run in runs:
        history, start = run.history, run.history.run
        end = history.end or {}
        digest = str(end.get("digest") or "")
        # The first run with it: the others say that theirs is the same.
        same = first.setdefault(digest, run.key) if digest else run.key
        short = (digest[:DIGEST] + (f" = {same}" if same != run.key else "")) if digest else formats.MISSING
        rounds = list(history.rounds.values())
        spent = end.get("seconds") or sum(event.get("seconds") or 0 for event in rounds) or None
        rows.append(
            [
                _mark(run),
                tag("td", run.name, cls="name", data_t=run.name),
                tag("td", str(run.folder), cls="name", data_t=str(run.folder)),
                str(start.get("method") or formats.MISSING),
                str(start.get("seed", formats.MISSING)),
                "finished" if history.end else "not finished",
                formats.count(history.last_round),
                formats.count(start.get("clients") or len(history.client_names())),
                formats.count(start.get("world_size") or len(history.topology) or None),
                formats.count(sum(event.get("tokens") or 0 for event in rounds)),
                mebibytes(_sent(rounds)),
                *(mebibytes(max(end.get(peak) or [0]) or None) for peak in ("peak_bytes", "device_peak_bytes")[: 1 + on_gpu]),
                formats.duration(spent),
                tag("td", tag("code", short), data_t=digest or None),
            ]
        )
    body = tag("div", table([*head, "time", "digest"], rows, text_columns=6), cls="scroll")
    return tag("div", tag("p", RUN_LEAD, cls="lead"), body)


def _mark(run: Told) -> Markup:
    return tag("td", tag("span", run.key, cls=f"chip {run.css}", data_t=run.name))


def _sent(rounds: Sequence[Event]) -> int | None:
    """Bytes; None where no round says it, as in records of older versions."""
    tallies = [tally for event in rounds for tally in (event.get("collectives") or {}).values()]
    known = [tally["bytes"] for tally in tallies if tally.get("bytes") is not None]
    return sum(known) if known else None


def mebibytes(size: float | None) -> str:
    """Bytes as 12.3 MiB."""
    return formats.MISSING if size is None else f"{formats.number(size / 2**20)}{formats.NARROW_SPACE}MiB"


def _places(runs: Sequence[Told]) -> list[tuple[str, str]]:
    """Every hold-out and tier that one of them has, the global hold-out and high tiers first."""
    found = {place for run in runs for place in run.results}
    return sorted(found, key=lambda place: (list(HOLD_OUT).index(place[0]), tier_order(place[1])))


def _before(runs: Sequence[Told]) -> str:
    """What round 0 is: of all runs alike, or by their letters where they differ."""
    keys: dict[str, list[str]] = {}
    for run in runs:
        keys.setdefault(run.history.before, []).append(run.key)
    return next(iter(keys)) if len(keys) == 1 else "; ".join(f"of {', '.join(those)} {what}" for what, those in keys.items())


def _tiers(runs: Sequence[Told]) -> list[str]:
    return sorted({tier for run in runs for tier in run.history.tiers}, key=tier_order)


def _result_section(runs: Sequence[Told]) -> Markup:
    places = _places(runs)
    if not places:
        return tag("p", "Nothing has been evaluated yet.", cls="empty")
    colours = tier_colours(_tiers(runs))
    head = ["hold-out", "tier", "run", "perplexity before", "after", "ratio", "accuracy before", "after", "change", "round"]
    tasks = [name for name in TASK_METRICS if any(name in result.metrics for run in runs for result in run.results.values())]
    head += [text for name in tasks for text in (f"{TASK_METRICS[name]} before", "after")]
    rows = []
    for split, tier in places:
        for run in runs:
            if (result := run.results.get((split, tier))) is not None:
                where = [HOLD_OUT[split], tag("td", tier_mark(colours[tier], tier)), _mark(run)]
                rows.append([*where, *_figures(result, tasks)])
    body = tag("div", table(head, rows, text_columns=3), cls="scroll")
    return tag("div", tag("p", RESULT_LEAD.format(before=_before(runs)), cls="lead"), body)


def _figures(result: TierResult, tasks: Sequence[str]) -> list[str]:
    ends = (result.before, result.after)
    return [
        *(formats.score(event, "perplexity", formats.number) for event in ends),
        formats.number(result.ratio),
        *(formats.accuracy(event) for event in ends),
        formats.points(result.gain, result.digits),
        formats.count(result.after.get("round")),
        *(formats.counted_share(event, name, event.get("samples")) for name in tasks for event in ends),
    ]


def _curve_section(runs: Sequence[Told]) -> Markup:
    places = _places(runs)
    if not places:
        return tag("p", "Nothing has been evaluated yet.", cls="empty")
    panels = []
    for split in dict.fromkeys(split for split, _ in places):
        tiers = [tier for found, tier in places if found == split]
        panels.append((HOLD_OUT[split], tag("div", *(_tier_curves(runs, split, tier) for tier in tiers))))
    return tag("div", tag("p", CURVE_LEAD.format(before=_before(runs)), cls="lead"), choices("hold-out", panels))


def _tier_curves(runs: Sequence[Told], split: str, tier: str) -> Markup:
    """The pictures of one tier: all runs in each of them."""

    def lines(metric: str, form: Callable[[Event], str]) -> list[Series]:
        found = []
        for run in runs:
            points = run.history.curve(split, tier, metric)
            rows = [run.history.evaluations[x, split, tier] for x, _ in points]
            tips = [f"{run.key}: {run.name}\nround {row['round']}\n{metric} {form(row)}" for row in rows]
            if any(metric in row for row in rows):
                found.append(Series(run.css, run.key, points, tips))
        return found

    def share(name: str, title: str, form: Callable[[Event], str]) -> Markup:
        return line_chart(lines(name, form), title=title, x_label="round", form=lambda y: tick(100 * y), most=1.0)

    perplexity = line_chart(
        lines("perplexity", lambda row: formats.score(row, "perplexity", formats.number)),
        title="Perplexity (log scale, lower is better)", x_label="round", form=tick, log=True,
    )  # fmt: skip
    charts = [perplexity, share("accuracy", "Next-token accuracy, % (higher is better)", formats.accuracy)]
    for name, called in TASK_METRICS.items():
        form: Callable[[Event], str] = lambda row, name=name: formats.counted_share(row, name, row.get("samples"))  # type: ignore[misc]  # noqa: E731
        if lines(name, form):
            charts.append(share(name, f"{called.capitalize()}, % of samples (higher is better)", form))
    return tag("div", tag("h3", f"top-k {tier}"), tag("div", *(tag("figure", chart) for chart in charts), cls="pair"))
