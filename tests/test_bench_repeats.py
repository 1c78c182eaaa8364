"""Repetitions of a figure: how they are written, paired, and what they decide."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedmoe_ds.bench.harness.repeats import decide, interval, paired, run_of, samples_of, shown, with_range
from fedmoe_ds.bench.harness.table import two_digits

RUN = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5)


@given(st.lists(RUN, min_size=1, max_size=4), st.floats(0.2, 9.0))
def test_decided_is_what_everything_says(runs: list[list[float]], limit: float) -> None:
    """Against the rule in words: scipy's interval of all repetitions, and the median of every run."""
    every = [value for run in runs for value in run]
    answer, mirrored = decide(runs, lambda value: value >= limit), decide(runs, lambda value: value < limit)
    assert mirrored == {"yes": "no", "no": "yes"}.get(answer, answer), "no answer favours a side"
    if len(every) < 2:
        assert answer == "not decided"
        return
    error = stats.sem(every)
    reach = stats.t.interval(0.95, len(every) - 1, loc=statistics.fmean(every), scale=error) if error else (every[0], every[0])
    assert interval(every) == pytest.approx(reach)
    if answer == "yes":
        assert min(statistics.median(run) for run in runs) >= limit and interval(every)[0] >= limit
    if answer == "no":
        assert max(statistics.median(run) for run in runs) < limit and interval(every)[1] < limit


def test_spread_and_number_of_repetitions_matter() -> None:
    """1.2 on average against 1.0: decided with little spread, or with many repetitions, and never with one."""
    cases = {"yes": [[1.19, 1.21], [1.0, 1.4] * 10], "not decided": [[1.2], [1.0, 1.4], [0.8, 1.6, 1.2]]}
    for answer, found in cases.items():
        assert [decide([run], lambda value: value >= 1.0) for run in found] == [answer] * len(found)
    assert decide([[1.19, 1.2, 1.21] * 9, [0.98]], lambda value: value >= 1.0) == "not decided", "another run straddles it"
    assert interval([2.0]) == (-math.inf, math.inf)


def test_ratios_are_formed_within_a_turn() -> None:
    assert paired([2.0, 30.0, 2.0], [1.0, 10.0, 2.0]) == [2.0, 3.0, 1.0], "the second turn is slow for both"
    assert paired([200.0], [1.0, 2.0, 9.0]) == [100.0], "timed once: a ratio of medians"


def test_figures_say_how_they_came_about() -> None:
    assert with_range([3.0, 1.0, 2.0], two_digits) == "2.00 (1.00 to 3.00)"
    assert with_range([1.0, 1.0], two_digits) == "1.00" and with_range([2.0], two_digits) == "2.00 (one timing)"
    row = {"ratio": 2.0, "share": None, "samples": {"ratio": [1.0, 2.0, 3.0]}}
    assert shown(row, "ratio", two_digits) == "2.00 (1.00 to 3.00)" and shown(row, "share", two_digits) == ""
    assert shown({"ratio": 2.0}, "ratio", two_digits) == "2.00 †"
    assert (
        samples_of(row, "share") is None
        and run_of({"ratio": 2.0}, "ratio") == [2.0]
        and run_of(row, "ratio") == [1.0, 2.0, 3.0]
    )
