"""Charts of whatever a run may have recorded: constant, zero, single, empty, not finite or huge values have a sensible span."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from every import every
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.axis import Axis as PlotAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_compare import comparison_of

from fedmoe_ds.report import final_table, formats
from fedmoe_ds.report.activation import expert_section
from fedmoe_ds.report.axis import Axis, whole_ticks
from fedmoe_ds.report.history import History
from fedmoe_ds.report.html import page
from fedmoe_ds.report.sections import convergence_section, results_section, time_section
from fedmoe_ds.report.svg import Column, Series, bar_rows, dense_columns, line_chart, stacked_columns
from fedmoe_ds.studies.compare.plot import TITLE, picture
from fedmoe_ds.studies.compare.plot import draw as draw_comparison
from fedmoe_ds.studies.figure import styled
from fedmoe_ds.studies.scaling.plot import draw as draw_scaling
from fedmoe_ds.studies.scaling.plot import picture as scaling_picture
from fedmoe_ds.studies.scaling.rows import Line
from fedmoe_ds.studies.scaling.study import Study
from fedmoe_ds.studies.spread import Spread

HUGE = 1.7e308
EXTREME = [0.0, 1.0, 5e-324, 1e-300, 1e-9, 62.3, 62.300001, 1e17, 1e304, HUGE]
any_value = st.none() | st.sampled_from([*EXTREME, -1.0, -HUGE, math.nan, math.inf, -math.inf]) | st.floats() | st.floats(0, 1)
finite = st.sampled_from([*EXTREME, -1.0, -HUGE]) | st.floats(allow_nan=False, allow_infinity=False)
values = st.lists(any_value, max_size=6)
COORDINATES = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height")


def drawn(markup: str) -> ElementTree.Element:
    """The chart, every one of whose coordinates is a number."""
    root = ElementTree.fromstring(f"<div>{markup}</div>")
    for element in root.iter():
        numbers = [element.get(name, "0") for name in COORDINATES]
        numbers += re.findall(r"[^\sMLZ]+", element.get("d", ""))
        assert every(re.fullmatch(r"-?\d+(\.\d+)?%?", number) for number in numbers), (element.tag, element.attrib)
    return root


def inside(root: ElementTree.Element, names: Sequence[str], low: float, high: float) -> None:
    for element in root.iter():
        for name in names:
            assert low - 0.1 <= float(element.get(name, low)) <= high + 0.1, (element.tag, element.attrib)


def labels(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter("text") if element.get("class") == "tick left"]


@given(st.lists(finite, max_size=6), st.booleans(), st.booleans())
@example([0.0, 0.0], False, False)
@example([HUGE, -HUGE], False, False)
@example([1.0, 1e304], True, False)
def test_an_axis_holds_its_values_and_has_round_ticks(given_values: list[float], log: bool, zero: bool) -> None:
    shown = [value for value in given_values if value >= 1e-300] if log else given_values
    axis = Axis.around(shown, log=log, zero=zero)
    assert math.isfinite(axis.low) and math.isfinite(axis.high) and axis.low < axis.high
    if all(value >= 0 for value in shown):
        assert axis.low >= 0, "what is never negative has no negative range"
        assert axis.low == 0 or log or not zero
    for value in shown:
        assert -1e-6 <= axis.place(value, 0.0, 1.0) <= 1 + 1e-6
    places = [axis.place(tick, 0.0, 1.0) for tick in axis.ticks()]
    assert 1 <= len(places) <= 12 and places == sorted(places) and places[0] >= -1e-6 and places[-1] <= 1 + 1e-6


@given(st.floats(0, 1))
def test_an_axis_of_shares_stays_among_shares(share: float) -> None:
    axis = Axis.around([share], most=1.0)
    assert 0 <= axis.low < axis.high <= 1.0
    assert Axis.around([0.0], most=1.0) == Axis(0.0, 1.0), "an all-zero accuracy spans 0 to 100 %"


@given(st.integers(-(10**12), 10**12), st.integers(0, 10**12))
def test_whole_ticks_are_few(first: int, length: int) -> None:
    ticks = whole_ticks(first, first + length)
    assert len(ticks) <= 9 and every(first <= tick <= first + length for tick in ticks)


@settings(max_examples=150)
@given(st.lists(values, max_size=3), st.booleans(), st.booleans())
@example([[0.0, 0.0, 0.0]], False, False)
@example([[1.0, 1e304]], True, False)
def test_line_charts(lines: list[list[float | None]], log: bool, zero: bool) -> None:
    series = [Series("t0", f"line {i}", list(enumerate(line)), ["tip"] * len(line)) for i, line in enumerate(lines)]
    root = drawn(line_chart(series, title="title", x_label="round", form=lambda y: f"{y:,.6g}", log=log, zero=zero))
    known = [y for line in lines for y in line if y is not None and math.isfinite(y) and (y >= 1e-300 or not log)]
    if not known:
        assert "nothing to draw" in "".join(root.itertext())
        return
    inside(root, ("cx", "x1", "x2"), 0, 480)
    inside(root, ("cy", "y1", "y2"), 0, 290)
    assert len(list(root.iter("circle"))) >= len(known)
    marks = labels(root)
    assert 1 <= len(marks) <= 12 and len(set(marks)) == len(marks), marks
    if all(y >= 0 for y in known):
        assert not any(mark.startswith("-") for mark in marks)


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats() | st.sampled_from(EXTREME), max_size=3), max_size=4))
def test_columns_and_bars(stacks: list[list[float]]) -> None:
    columns = [Column(f"c{i}", [("l0", value, "tip") for value in stack]) for i, stack in enumerate(stacks)]
    root = drawn(stacked_columns(list(enumerate(columns, 1)), title="title", x_label="round", form=lambda y: f"{y:,.6g}"))
    inside(root, ("x", "y"), 0, 480)
    marks = labels(root)
    assert len(set(marks)) == len(marks) <= 12 and not any(mark.startswith("-") for mark in marks)
    drawn(dense_columns(columns, ["t0"] * len(columns)))
    bars = drawn(bar_rows([(column.label, "", column, "1") for column in columns]))  # type: ignore[misc]
    widths = [float(re.findall(r"width:([^%]+)%", bar.get("style", ""))[0]) for bar in bars.iter("i")]
    assert all(0 < width <= 100.001 or width == 0 for width in widths)  # hypothesis draws an empty one, too


def evaluated(perplexities: list[float | None], accuracies: list[float | None]) -> History:
    rows: list[dict[str, Any]] = []
    for index, (perplexity, accuracy) in enumerate(zip(perplexities, accuracies, strict=True)):
        figures = {"perplexity": perplexity, "accuracy": accuracy, "tokens": 74}
        rows.append({"event": "eval", "round": index, "tier": 4, "split": "global", **figures})
        layer = [accuracy if index % 2 else 0.0, None]
        rows.append({"event": "experts", "round": index, "tier": 4, "activation": [layer]})
        rows.append({"event": "round", "round": index, "phases": {"train": perplexity}, "tokens_per_s": perplexity})
    return History.of(rows)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.none() | st.floats(1, 1.1e304), st.none() | st.floats(0, 1)), min_size=1, max_size=5))
@example([(5.0, 0.0), (5.0, 0.0)])
@example([(1.0, 1.0)])
def test_the_sections_of_the_report(rows: list[tuple[float | None, float | None]]) -> None:
    history = evaluated([row[0] for row in rows], [row[1] for row in rows])
    for section in (convergence_section, results_section, time_section):
        drawn(re.sub(r"<input[^>]*>", "", section(history)))
    expert_section(history)
    accuracy = drawn(convergence_section(history).split("<figure>")[-1].split("</figure>")[0])
    assert all(0 <= float(mark) <= 100 for mark in labels(accuracy)), "percent"  # of nothing, nothing is drawn
    assert max(map(len, final_table([{**row, "event": "eval"} for row in history.evaluations.values()]).splitlines())) < 140


# The whole page, of any run that the engine can produce.

figure = st.none() | st.sampled_from([*EXTREME, 1e300]) | st.floats(0, allow_infinity=False, allow_nan=False)
round_number = st.integers(1, 6) | st.sampled_from([10**5, 10**9, 10**9 + 1])


def recorded(rounds: list[int], figures: Iterator[float | None]) -> list[dict[str, Any]]:
    """Events of a run as `Journal` and `session` write them: any figure may be huge, tiny, or not finite (null)."""
    tiers = [{"tier": 4, "tier_label": "4"}, {"tier": 2, "tier_label": "2 r8"}]
    client = {"name": "a", "samples": 3, "sequences": 2, "tokens": 9, "targets": 9, "top_k": 4, "tier_label": "4"}
    rows: list[dict[str, Any]] = [{"event": "run", "name": "x", "num_experts": 2, "top_k": 4, "layers": 1}]
    rows += [{"event": "data", "clients": [client], "distribution": {"labels": ["l"], "counts": [[3]]}}]
    for number in [0, *rounds]:
        for tier, split in itertools.product(tiers, ("global", "clients", "client")):
            scores = {"perplexity": next(figures), "accuracy": 0.5, "loss": next(figures), "targets": 74}
            whose = {"client": "a"} if split == "client" else {}
            rows.append({"event": "eval", "round": number, **tier, "split": split, **scores, **whose})
        if number:
            losses = {
                "loss_first": next(figures),
                "loss_last": next(figures),
                "flops": next(figures),
                "rescaler": next(figures),
            }
            spent = {"seconds": next(figures), "steps": 1, "tokens": 9, "status": "ok"}
            rows.append({"event": "client", "round": number, "client": "a", "top_k": 4, **losses, **spent})
            rows.append({"event": "experts", "round": number, **tiers[0], "activation": [[0.0, None], [1.0, 0.0]]})
            phases = {"train": next(figures), "evaluate": next(figures)}
            speed = {"tokens": 9, "tokens_per_s": next(figures), "seconds": next(figures), "participants": 1, "waves": 1}
            rows.append({"event": "round", "round": number, "phases": phases, **speed})
    return [*rows, {"event": "end", "rounds": len(rounds), "digest": "ab", "seconds": next(figures)}]


@settings(max_examples=60, deadline=None)
@given(st.sets(round_number, max_size=4), st.lists(figure, min_size=1, max_size=12))
@example({1}, [1e300])
@example({10**9}, [1.0])
@example({1, 10**9}, [HUGE, None])
def test_the_page_of_any_run(rounds: set[int], figures: list[float | None]) -> None:
    rows = recorded(sorted(rounds), itertools.cycle(figures))
    text = page(History.of(rows), "name: x")
    assert len(text) < 120_000, "a page of so few rounds is small, whatever their numbers: nothing counts up to them"
    assert ">nan" not in text and ">inf" not in text
    final_table(rows)


def test_the_page_of_a_long_run_stays_small() -> None:
    """And says what it leaves out."""
    rows = recorded(list(range(1, 2101)), itertools.cycle([2.0, 3.0, 5.0, 7.0]))
    text = page(History.of(rows), "name: x")
    assert len(text) < 1_500_000 and text.count("data-t=") < 10_000
    for told in ("(400 of 2\u202f101 rounds)", "(400 of 2\u202f100 rounds)", "in figures (2000 of 2\u202f100 rounds)"):
        assert told in text, told
    drawn = re.findall(r"data-t=\"round (\d+)\n", text)
    assert {"1", "2100"} <= set(drawn), "the first and the last are always there"


# The pictures of studies are matplotlib's: what is checked is where it puts the words, and what stands in the file.


def parsed(svg: str) -> ElementTree.Element:
    """A picture, no number of which is missing or infinite, and which is the same each time."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        for value in element.attrib.values():
            assert not re.search(r"\b(nan|inf)\b", value), (element.tag, element.attrib)
    assert "Matplotlib v" not in svg and "dc:date" not in svg
    return root


def words_of(figure: Figure) -> list[str]:
    """Every text that is drawn, none of which leaves the picture or covers another one."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in beyond(axis)}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
    for (left, one), (right, other) in itertools.combinations(boxes, 2):
        across, down = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
        assert across < 1 or down < 1, (left, right)
    return [text for text, _ in boxes]


def beyond(axis: PlotAxis) -> list[Text]:
    """Labels of ticks outside of the axis: matplotlib keeps them, but does not draw them."""
    low, high = sorted(axis.get_view_interval())
    air = 1e-6 * (high - low)
    ticks = [tick for tick in axis.get_major_ticks() if not low - air <= tick.get_loc() <= high + air]
    return [label for tick in ticks for label in (tick.label1, tick.label2)]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.none() | st.sampled_from([1.0, 5.0, 1e304, math.inf]) | st.floats(1, 1.1e304), min_size=2, max_size=4))
@example([5.0, 5.0])
@example([1e304, 1.0, 1e304])
@example([1.0, 1e6])
def test_the_picture_of_a_comparison(given_values: list[float | None]) -> None:
    comparison = comparison_of({"a": given_values, "b": [5.0] * len(given_values)})
    with styled():
        words = words_of(draw_comparison(comparison))
    assert not any(word.startswith(("-", "\N{MINUS SIGN}")) for word in words), "no perplexity is negative"
    parsed(picture(comparison))


LONG = "flame-temperature-0-rescaler-none-top_k-2"


def test_names_in_a_picture_are_text() -> None:
    """Neither markup nor a formula, and no letter that a page would obey; long names do not get in each other's way."""
    names = [
        "<script>alert(1)</script>",
        "a&b",
        "$\\frac{1}{",
        "x\x1b[2Jy",
        "\N{RIGHT-TO-LEFT OVERRIDE}evil",
        "日本",
        LONG,
        "b",
        "c",
        "d",
    ]
    comparison = comparison_of({name: [30.0 + place, 32.0, 35.5] for place, name in enumerate(names)})
    with styled():
        words = words_of(draw_comparison(comparison))
    svg = picture(comparison)
    root = parsed(svg)
    shown = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    expected = ["<script>alert(1)</script>", "a&b", "$\\frac{1}{", "x\\x1b[2Jy", "\\u202eevil", "日本", LONG, "b", "c", "d"]
    for name in expected:
        assert shown.count(name) == words.count(name) == len(comparison.tiers), name
    assert not [element for element in root.iter() if element.tag.endswith("}script")]
    assert svg == picture(comparison), "the same figures are the same file"
    assert [title.text for title in root.findall("{http://www.w3.org/2000/svg}title")] == [TITLE]


def test_a_picture_does_not_depend_on_the_users_matplotlibrc() -> None:
    comparison = comparison_of({"a": [5.0, 6.0], "b": [5.5, 5.0]})
    expected = picture(comparison)
    with matplotlib.rc_context({"font.size": 20.0, "svg.hashsalt": "other", "axes.grid": False}):
        assert picture(comparison) == expected and matplotlib.rcParams["font.size"] == 20.0


def lines_of_a_study(values: Sequence[int], figures: Callable[[int], dict[str, Spread]]) -> list[Line]:
    def runs(value: int) -> Any:
        rate = figures(value)["tokens_per_s"].values
        measured = SimpleNamespace(ranks=value, cores=None)
        return [
            SimpleNamespace(repeat=repeat, measured=measured, throughput=lambda *ignored, of=repeat: rate[of])
            for repeat in rate
        ]

    return [Line(value, runs(value), figures(value)) for value in values]


NAMES = ["tokens_per_s", "efficiency", "s_per_round", "all_to_all_s", "other_collectives_s", "recorded_s", "predicted_s"]
NAMES += ["train_s", "aggregate_s", "evaluate_s", "other_s"]


@pytest.mark.parametrize("seconds", [0.0, 1e-12, 3.0, 1e300, math.nan, math.inf])
def test_the_picture_of_a_scaling_study(seconds: float) -> None:
    lines = lines_of_a_study((1, 2), lambda _: {name: Spread({0: seconds}) for name in NAMES})
    study = Study(name="s", base="b", axis="ranks", values=[1, 2], scaling="strong")
    with styled():
        words = words_of(draw_scaling(study, lines))
    assert not any(word.startswith(("-", "\N{MINUS SIGN}")) or word in ("nan", "inf") for word in words)
    # Throughput, efficiency, prediction; what trained nothing has no efficiency.
    assert words.count("nothing to draw") == (3 if not math.isfinite(seconds) else int(seconds == 0.0))
    parsed(scaling_picture(study, lines))


def test_a_scaling_study_over_many_values_has_room_for_its_words_and_whiskers() -> None:
    values = [1, 2, 4, 8, 16, 32, 64, 1024]
    lines = lines_of_a_study(values, lambda value: {name: Spread({0: 9.0 * value, 1: 11.0 * value}) for name in NAMES})
    study = Study(name="s", base="b", axis="ranks", values=values, scaling="strong", repeats=2)
    with styled():
        figure = draw_scaling(study, lines)
        words = words_of(figure)
    assert {"measured", "ideal", "predicted", "train", "other", "in all-to-all", "1024"} <= set(words)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(titles) == 5 and every(titles)
    (measured, _ideal) = figure.axes[0].containers
    (bars,) = measured.lines[2]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([value * (10 - math.sqrt(2)), value * (10 + math.sqrt(2))]) for value in values]


# Accuracies say what their number of targets can tell.


@given(st.integers(1, 10**7).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_solves_its_equation(counted: tuple[int, int]) -> None:
    """Its ends are the shares p for which the observed one is just 1.96 standard deviations away."""
    right, targets = counted
    share = right / targets
    low, high = formats.wilson(share, targets)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            off = (share - end) ** 2 - 1.959964**2 * end * (1 - end) / targets
            assert abs(off) <= 1e-9 * max(end * (1 - end), 1 / targets), (end, off)


@given(st.floats(0, 1), st.integers(1, 10**9))
def test_no_decimal_is_finer_than_the_interval(share: float, targets: int) -> None:
    low, high = formats.wilson(share, targets)
    digits = formats.share_digits(share, targets)
    assert digits == 0 or 10.0 ** (1 - digits) > 50 * (high - low)
    assert digits == 2 or 10.0**-digits <= max(1.0, 50 * (high - low)) * 1.000001


def test_an_accuracy_over_few_targets() -> None:
    few = {"accuracy": 49 / 74, "tokens": 74}
    assert formats.accuracy(few) == "66\u202f% (55 to 76)"
    assert formats.accuracy({"accuracy": 0.6621, "targets": 7_400_000}) == "66.21\u202f% (66.18 to 66.24)"
    assert formats.accuracy({"accuracy": 0.6621}) == "66.2\u202f%" and formats.accuracy({"accuracy": None}) == "not finite"
    rows = [{"round": index, "tier": 4, "split": "global", "perplexity": 9.0, **few} for index in range(2)]
    assert final_table(rows).splitlines()[-1].split()[5:] == ["66%", "66%", "+0", "55-76%"]
