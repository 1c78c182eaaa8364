"""Device time: how long, and at what cost, every method takes to the same target (`to_target`), on simulated devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedmoe_ds.report import formats
from fedmoe_ds.report.device_time import energy, reached, span
from fedmoe_ds.report.history import Event
from fedmoe_ds.report.tables import markdown
from fedmoe_ds.studies import figure
from fedmoe_ds.studies.compare.aggregate import Comparison
from fedmoe_ds.studies.compare.record import Record
from fedmoe_ds.studies.compare.table import number
from fedmoe_ds.studies.compare.to_target import target_of
from fedmoe_ds.studies.spread import Spread, with_spread
from fedmoe_ds.terminal import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Perplexity on the global hold-out over virtual time: a line per seed"
LEAD = """\
Virtual time and energy until the global hold-out's figure is first as good as the target, over the seeds whose runs get there:
mean ± sample standard deviation. Without targets of the runs' own, the target of a seed is the perplexity that all of its runs
reach. Devices are simulated (docs/devices.md); no figure here is a measurement of one."""
_HEAD = ("method", "target", "reached", "virtual time", "energy", "after the last round", "energy then")


def simulated(comparison: Comparison) -> bool:
    """Whether any run was on simulated devices."""
    return any(record.courses for record in comparison.records)


def device_table(comparison: Comparison, tier: str) -> str:
    """Time and energy to every target at one tier; empty where no run has any."""
    rows = []
    for metric in ("perplexity", "accuracy"):
        found = {seed: target_of(comparison, tier, seed, metric) for seed in range(comparison.seeds)}
        goals = {seed: goal for seed, goal in found.items() if goal is not None}
        for label in comparison.labels:
            mine = [r for r in comparison.records if r.label == label and tier in r.courses and r.seed in goals]
            if mine:
                rows.append([label, *_cells(mine, tier, metric, goals)])
    return markdown(list(_HEAD), rows, text_columns=2) if rows else ""


def _cells(mine: Sequence[Record], tier: str, metric: str, goals: Mapping[int, float]) -> list[str]:
    hits = {record.seed: reached(record.courses[tier], metric, goals[record.seed]) for record in mine}
    got = {seed: row for seed, row in hits.items() if row is not None}
    ends = {record.seed: record.courses[tier][-1] for record in mine}
    goal = with_spread(Spread({seed: goals[seed] for seed in hits}), number if metric == "perplexity" else formats.percent)
    counts = f"{len(got)} of {len(hits)}"
    return [f"{metric} {goal}", counts, *_spent(got), *_spent(ends)]


def _spent(rows: Mapping[int, Event]) -> list[str]:
    """Mean time and energy over seeds."""
    forms: tuple[tuple[str, Callable[[float], str]], ...] = (("virtual_time", span), ("joules_total", energy))
    if not rows:
        return ["-", "-"]
    return [with_spread(Spread({seed: row[key] for seed, row in rows.items()}), form) for key, form in forms]


def picture(comparison: Comparison) -> str:
    """Perplexity over virtual time as SVG: one panel per tier, one colour per method."""
    return figure.svg(lambda: draw(comparison), TITLE)


def draw(comparison: Comparison) -> Figure:
    """The same as a figure; to be called within `figure.styled()`."""
    drawing, places = figure.panels(len(comparison.tiers), 4.6, 2.9)
    for axes, tier in zip(places, comparison.tiers, strict=True):
        _panel(axes, comparison, tier)
    return drawing


def _panel(axes: Axes, comparison: Comparison, tier: str) -> None:
    axes.set_title(visible(f"top-k {tier}"))
    for place, label in enumerate(comparison.labels):
        mine = [record for record in comparison.records if record.label == label and tier in record.courses]
        for number_of, record in enumerate(mine):
            rows = [row for row in record.courses[tier] if row.get("perplexity") is not None]
            times, heights = [row["virtual_time"] for row in rows], [row["perplexity"] for row in rows]
            # One name for all seeds of a method: the legend leaves out what begins with an underscore.
            name = "_" if number_of else visible(label)
            axes.plot(times, heights, color=figure.LINES[place % len(figure.LINES)], label=name)
    if axes.has_data():
        axes.set_xlabel("virtual seconds")
        axes.set_yscale("log")
        axes.legend(fontsize=8)
