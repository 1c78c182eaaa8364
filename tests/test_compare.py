"""Studies: what is run and what is left alone, the figures over seeds, verdicts, the report, and mistakes as one line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import pytest
from every import every
from hypothesis import given
from hypothesis import strategies as st
from launching import REPOSITORY, SCRIPT, changed, read_events
from pydantic import ValidationError
from scipy import stats

from fedmoe_ds.config import Config, dump_config, load_config
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.no_experts import as_meant
from fedmoe_ds.report import MetricsLog
from fedmoe_ds.report.tables import markdown
from fedmoe_ds.studies.compare import Request, compare
from fedmoe_ds.studies.compare.aggregate import Comparison
from fedmoe_ds.studies.compare.paired import ALPHA, PairedTest, family_tests, half_interval, holm, smallest_effect, t_test
from fedmoe_ds.studies.compare.plan import parse_variants, plan_runs
from fedmoe_ds.studies.compare.protocol import Expectation, MethodEntry, Metric, read_protocol
from fedmoe_ds.studies.compare.record import Record, check_same_ground, read_record
from fedmoe_ds.studies.compare.table import fairness_table, number, p_value, task_table, tier_table, verdict_table
from fedmoe_ds.studies.compare.verdict import judge
from fedmoe_ds.studies.run import Run, check_saved
from fedmoe_ds.studies.runner import Runner, locked
from fedmoe_ds.studies.spread import Spread, with_spread

NOWHERE = Path("no-such-script.py")
STUDY = """
methods:
  flame-t0: {name: flame, set: {method.temperature: 0.0}}
  flame-wide: {name: flame, take: [adapters.rank]}
expectations:
  - {claim: flame < flame-t0, tiers: [2, 1], source: a paper}
"""


@pytest.fixture
def request_(nano: dict[str, Any], tmp_path: Path) -> Request:
    """Two labels, two seeds, on the nano federation, everything in tmp_path."""
    (tmp_path / "base.yaml").write_text(json.dumps({key: value for key, value in nano.items() if key != "name"}))
    (tmp_path / "study.yaml").write_text(STUDY)
    return Request("flame,flame-t0", 2, tmp_path / "base.yaml", tmp_path / "study.yaml", tmp_path / "runs", jobs=2)


def plan(request: Request) -> list[Run]:
    protocol = read_protocol(request.study)
    variants = parse_variants(request.methods, protocol, request.study.parent / "methods")
    return plan_runs(request.config, variants, request.seeds, request.output, request.overrides)


def record_run(run: Run, perplexity: float | None, *, flops: float | None = None, end: int = 2, **facts: Any) -> None:
    """Write what a run leaves behind: `perplexity` at tier 2, twice that at tier 1, foundation 50 everywhere."""
    with MetricsLog(run.folder / "metrics.jsonl") as log:
        log.write("run", foundation="f0", versions={"torch": "2.13"}, **facts)
        log.write("data", clients=[{"name": "a", "samples": 3, "sequences": 2, "tokens": 9, "top_k": 2}], distribution={})
        for round_ in (0, 2):
            for tier in (2, 1):
                value = 50.0 if round_ == 0 else None if perplexity is None else perplexity * (3 - tier)
                for split in ("global", "clients"):
                    scores = {"perplexity": value, "accuracy": 0.25 if round_ else 0.125}
                    log.write("eval", round=round_, tier=tier, split=split, tokens=64, **scores)
        for client, tier in (("a", 2), ("b", 2), ("c", 1)):
            spent = {} if flops is None else {"flops": flops * tier * (2 if client == "b" else 1)}
            log.write("client", round=1, client=client, top_k=tier, **spent)
        log.write("end", rounds=end, digest="ab" * 32)
    (run.folder / "config.yaml").write_text(dump_config(run.config))


def no_note(text: str) -> None:
    """Takes lines that a test does not look at."""


def environment() -> dict[str, str]:
    return dict(os.environ) | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def start(request: Request, script: Path = NOWHERE, note: Callable[[str], None] = no_note) -> tuple[int, str]:
    return compare(request, script, environment(), note)


def comparison_of(by_label: dict[str, Sequence[float | None]], seeds: int | None = None, **facts: Any) -> Comparison:
    """Records with these perplexities by seed at tiers 2 (as given) and 1 (twice)."""
    records = [
        Record(label, seed, f"{label}-seed{seed}", "", {"2": {"perplexity": 50.0}}, after(value), {"foundation": seed}, {})
        for label, values in by_label.items()
        for seed, value in enumerate(values)
        if value is not None
    ]
    return Comparison(list(by_label), seeds or max(map(len, by_label.values())), records)


def after(value: float) -> dict[str, dict[str, float]]:
    return {"2": {"perplexity": value}, "1": {"perplexity": 2 * value}}


def test_a_run_takes_base_own_keys_overrides_and_entry_in_this_order(request_: Request) -> None:
    own = request_.study.parent / "methods"
    own.mkdir()
    (own / "flame.yaml").write_text("adapters: {rank: 2}\nlocal: {lr: 9.0}\nmethod: {name: flame, temperature: 3.0}\n")
    methods = "flame,flame-t0,flame-wide,flame:local.lr=0.5+method.rescaler=none"
    runs = {run.name: run.config for run in plan(replace(request_, methods=methods, seeds=1, overrides=["local.lr=0.25"]))}
    inline = "flame-lr-0.5-rescaler-none-seed0"
    assert list(runs) == ["flame-seed0", "flame-t0-seed0", "flame-wide-seed0", inline]
    assert [config.local.lr for config in runs.values()] == [0.25, 0.25, 0.25, 0.5], "the file's own lr is not a method key"
    assert [config.adapters.rank for config in runs.values()] == [4, 4, 2, 4], "only `take` brings the file's rank in"
    own_keys = [config.method.model_dump() for config in runs.values()]
    assert [keys["temperature"] for keys in own_keys] == [3.0, 0.0, 3.0, 3.0]
    assert [keys["rescaler"] for keys in own_keys] == ["learnable"] * 3 + ["none"]
    assert every(config.output == str(request_.output) for config in runs.values())


def test_the_runs_of_a_seed_differ_in_their_method_only(request_: Request) -> None:
    first, second = (run.config.model_dump(exclude={"name", "method"}) for run in plan(request_) if run.seed == 1)
    assert first == second and first["seed"] == 1


def test_finished_runs_are_not_started_again(request_: Request) -> None:
    for place, run in enumerate(plan(request_)):
        record_run(run, 30.0 + place)
    notes: list[str] = []
    code, text = start(request_, note=notes.append)
    assert code == 0 and notes == ["4 of 4 runs are finished already"]
    assert text.splitlines()[-1] == f"report: {request_.output / 'comparison.md'}"
    assert not list(request_.output.glob("*.log")), "no command was started"


def test_only_what_is_missing_is_started_and_its_failure_leaves_the_rest(request_: Request) -> None:
    runs = plan(request_)
    for run in runs[:2]:
        record_run(run, 30.0)
    record_run(runs[2], 30.0, end=1)  # asked to stop after its first round
    script = request_.output.parent / "command.py"
    script.write_text("import sys\nsys.exit('error: a: b: c' if 'seed0' in sys.argv[2] else sys.argv[1:])\n")
    notes: list[str] = []
    code, _ = start(request_, script, notes.append)
    assert code == 1 and sorted(path.name for path in request_.output.glob("*.log")) == [
        "flame-t0-seed0.log",
        "flame-t0-seed1.log",
    ]
    assert any(note.startswith("flame-t0-seed0: failed: a: b: c") for note in notes), notes
    report = (request_.output / "comparison.md").read_text()
    assert "2 of 4 runs are finished." in report and "| flame-t0-seed0 | a: b: c" in report
    command = f"['--config', '{runs[3].folder}.yaml', '--resume', 'auto']"
    assert (request_.output / "flame-t0-seed1.log").read_text().strip() == command
    assert load_config(Path(f"{runs[3].folder}.yaml")) == runs[3].config


def test_exit_code_tells_the_users_mistakes_from_other_failures(request_: Request) -> None:
    script = request_.output.parent / "command.py"
    script.write_text("import sys\nsys.stderr.write('error: data.source: x: no such file\\n')\nsys.exit(2)\n")
    assert start(request_, script)[0] == 2
    script.write_text("import os\nos.abort()\n")
    assert start(request_, script)[0] == 1
    assert "killed by SIGABRT" in (request_.output / "comparison.md").read_text()


@contextlib.contextmanager
def soon(number: signal.Signals, when: Callable[[], bool]) -> Any:
    """Send this process a signal once a condition holds."""

    def send() -> None:
        deadline = time.monotonic() + 30
        while not when() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_and_starts_no_other(request_: Request, number: signal.Signals) -> None:
    """The command deafens itself at first, as a rank that still imports does, and must be asked again."""
    script = request_.output.parent / "command.py"
    script.write_text(
        "import signal, sys, time, pathlib\n"
        "mark = pathlib.Path(sys.argv[2] + '.mark')\n"
        "mark.write_text('up')\n"
        "time.sleep(0.5)\n"
        "def stop(number, frame):\n    mark.write_text('saved')\n    sys.exit(0)\n"
        "signal.signal(signal.SIGUSR1, stop)\n"
        "time.sleep(60)\n"
    )
    before = signal.getsignal(number)
    marks = [Path(f"{run.folder}.yaml.mark") for run in plan(request_)]
    with locked(request_.output) as lock, soon(number, lambda: marks[0].exists() and marks[1].exists()):
        outcome = Runner(script, environment(), no_note, jobs=2).run(plan(request_), lock)
    assert outcome.stopped and not outcome.codes
    assert [mark.read_text() if mark.exists() else None for mark in marks] == ["saved", "saved", None, None]
    assert signal.getsignal(number) is before


def test_the_first_run_of_a_seed_goes_ahead_alone(request_: Request) -> None:
    """It makes the foundation that the others find in the cache: with four jobs, two seeds start two runs."""
    script = request_.output.parent / "command.py"
    script.write_text("import time\ntime.sleep(60)\n")
    started: list[str] = []

    def two() -> bool:
        time.sleep(0.5)  # long enough for a third to start
        started[:] = sorted(path.name for path in request_.output.glob("*.log"))
        return len(started) >= 2

    def kill_soon() -> None:
        while not two():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    with locked(request_.output) as lock:
        thread = threading.Thread(target=kill_soon)
        thread.start()
        outcome = Runner(script, environment(), no_note, jobs=4).run(plan(request_), lock)
        thread.join()
    assert outcome.stopped and started == ["flame-seed0.log", "flame-seed1.log"]


def test_a_folder_with_another_configuration_is_refused(request_: Request) -> None:
    run = plan(request_)[0]
    record_run(run, 30.0)
    with pytest.raises(UserError, match=r"^local\.max_steps: 7: .*flame-seed0 was run with 3; set it back"):
        start(replace(request_, overrides=["local.max_steps=7"]))
    moved = request_.output.with_name("moved")
    request_.output.rename(moved)
    check_saved(plan(replace(request_, output=moved)))


def test_a_study_of_plain_lora_continues(tmp_path: Path) -> None:
    """A start saves what it has resolved: no experts on a dense model. Earlier versions saved the template `text`."""
    dense = {"foundation": {"preset": "nano-llama"}, "method": {"name": "fedit"}}
    config = Config.model_validate({**dense, "name": "x", "output": str(tmp_path)})
    run = Run("plain", 0, config)
    run.folder.mkdir(parents=True)
    saved = as_meant(config, sparse=False)
    for template in ("auto", "text"):
        tree = saved.model_copy(update={"data": saved.data.model_copy(update={"template": template})})
        (run.folder / "config.yaml").write_text(dump_config(tree))
        check_saved([run])
    (run.folder / "config.yaml").write_text(dump_config(saved.model_copy(update={"seed": 3})))
    with pytest.raises(UserError, match=r"^seed: 0: .* was run with 3"):
        check_saved([run])


def test_runs_of_a_seed_with_another_foundation_or_data_are_refused(request_: Request) -> None:
    runs = [run for run in plan(request_) if run.seed == 0]
    for run in runs:
        record_run(run, 30.0)
    first, second = (read_record(run) for run in runs)
    check_same_ground([first, second])
    check_same_ground([first, replace(second, seed=1, ground={**second.ground, "foundation": "f1"})])
    with pytest.raises(UserError, match=r'^foundation: "f1": flame-t0-seed0 differs from flame-seed0 \("f0"\)'):
        check_same_ground([first, replace(second, ground={**second.ground, "foundation": "f1"})])
    for key, other in (("clients", []), ("distribution", {"labels": ["x"]}), ("hold-outs", {"global k=2": 63})):
        assert first.ground[key] != other
        with pytest.raises(UserError, match=f"^{key}: "):
            check_same_ground([first, replace(second, ground={**second.ground, key: other})])


def test_mean_and_sample_deviation_over_seeds() -> None:
    lines = {line.label: line for line in comparison_of({"a": [10.0, 12.0, 17.0], "b": [11.0]}, seeds=3).lines("2")}
    spread = lines["a"].figures["perplexity"]
    assert spread.mean == 13.0 and spread.std == pytest.approx(math.sqrt(13.0))
    assert lines["b"].figures["perplexity"].std is None and lines["b"].seeds == 1
    assert lines["foundation"].figures["perplexity"].values == {0: 50.0, 1: 50.0, 2: 50.0}


def test_flops_are_means_over_a_tiers_clients_and_absent_in_older_runs(request_: Request) -> None:
    new, old = plan(request_)[:2]
    record_run(new, 30.0, flops=2.0e12)
    record_run(old, 30.0)
    assert read_record(new).after["2"]["flops"] == 6.0e12 and read_record(new).after["1"]["flops"] == 2.0e12
    assert "flops" not in read_record(old).after["2"]


def test_a_figure_that_was_not_finite_is_said_to_be(request_: Request) -> None:
    run = plan(request_)[0]
    record_run(run, None)
    comparison = Comparison(["flame"], 1, [read_record(run)])
    assert tier_table(comparison, "2").splitlines()[-1].split("|")[2].strip() == "not finite"
    assert comparison.order("2") == []


def noisy(base: Sequence[float], factor: float, spread: float = 0.001) -> list[float]:
    """Figures by seed that are `factor` times those of a base, give or take `spread`, with no mean of the noise."""
    return [value * factor * math.exp(spread * (-1) ** seed) for seed, value in enumerate(base)]


TASKS = [10.0, 20.0, 40.0, 15.0, 12.0, 33.0]


def test_methods_are_told_apart_by_pairs_of_one_seed() -> None:
    """The tasks of the seeds differ by far more than the methods do, and yet a is better in every one of them."""
    comparison = comparison_of({"b": noisy(TASKS, 1.02), "a": TASKS, "c": noisy(TASKS, 1.0003)})
    assert comparison.order("2") == [("", "a"), ("≈", "c"), ("<", "b")]
    assert sorted(comparison.below("2")) == [("a", "b"), ("c", "b")]
    ratio = comparison.log_ratio("a", "b", "2", "perplexity")
    assert ratio is not None and ratio.mean == pytest.approx(-math.log(1.02))
    assert comparison.best("2", "perplexity") == {"a", "c"} and comparison.best("2", "flops") == set()


def test_three_seeds_with_a_mean_beyond_its_deviation_decide_nothing() -> None:
    """That was the rule once: it is p < 0.23 for one pair, and worse for the best of many."""
    comparison = comparison_of({"a": [10.0, 20.0, 40.0], "b": [10.2, 20.1, 40.9], "c": [10.3, 20.0, 41.5]})
    ratio = comparison.log_ratio("a", "b", "2", "perplexity")
    assert ratio is not None and ratio.std is not None and abs(ratio.mean) > ratio.std
    assert [sign for sign, _ in comparison.order("2")] == ["", "≈", "≈"] and not comparison.below("2")
    assert comparison.best("2", "perplexity") == set()
    assert judge([expectation("a < b", [2])], comparison)[0].answer == "not decided"


def test_noise_decides_nothing_as_often_as_promised() -> None:
    """Ten methods that do not differ: any of 45 pairs is decided in at most one study of twenty, give or take chance."""
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(40):
        noise = random.normal(0.0, 0.01, (10, 6))
        found = family_tests([list(noise[i] - noise[j]) for i in range(10) for j in range(i)])
        wrong += any(test is not None and test.decided for test in found)
    assert wrong <= 6  # 2 expected; more than 6 has a probability below 0.005


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_against_its_definition(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert every(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for level in (0.01, 0.05, 0.2):
        rejected: set[int] = set()
        for place, index in enumerate(order):  # step down: stop at the first that is not below level / what is left
            if (len(order) - place) * p_values[index] >= level:
                break
            rejected.add(index)
        assert {index for index, c in enumerate(corrected) if c < level} == rejected


def test_t_tests_against_scipys_pairs() -> None:
    left, right = [1.0, 2.5, 3.0, 4.5], [1.5, 2.0, 4.0, 6.5]
    expected = stats.ttest_rel(left, right).pvalue
    assert t_test([a - b for a, b in zip(left, right, strict=True)]) == pytest.approx(expected)
    assert t_test([0.1]) is None and t_test([0.0, 0.0]) == 1.0 and t_test([0.1, 0.1, 0.1]) == 0.0
    assert family_tests([[0.1], [0.1, 0.2, 0.3]]) == [
        None,
        PairedTest(pytest.approx(0.0742, abs=1e-4), pytest.approx(0.0742, abs=1e-4), 1),
    ]


@pytest.mark.parametrize("seeds", [3, 6, 10])
def test_the_smallest_effect_is_just_decided(seeds: int) -> None:
    def first(effect: float) -> bool:
        """Whether the first of a family of 15 is decided, with this mean over its standard deviation."""
        noise = [1.0, -1.0] * (seeds // 2) + [0.0] * (seeds % 2)
        unit = [value / Spread(dict(enumerate(noise))).std for value in noise]
        test = family_tests([[effect + value for value in unit], *[noise] * 14])[0]
        return test is not None and test.decided

    least = smallest_effect(seeds, 15)
    assert first(1.01 * least) and not first(0.99 * least)
    assert smallest_effect(1, 15) == math.inf and ALPHA == 0.05


def test_only_methods_with_all_seeds_are_compared_at_a_tier() -> None:
    comparison = comparison_of({"a": [1.0, 1.0, *[None] * 4], "b": TASKS, "c": noisy(TASKS, 1.1)})
    assert comparison.best("2", "perplexity") == {"b"} and comparison.order("2") == [("", "b"), ("<", "c")]
    assert "| a (2 of 6 seeds) |" in tier_table(comparison, "2")
    ratio = comparison.log_ratio("a", "b", "2", "perplexity")
    assert ratio is not None and list(ratio.values) == [0, 1], "only the seeds that both have"


def expectation(claim: str, tiers: list[int], **more: Any) -> Expectation:
    return Expectation(claim=claim, tiers=tiers, source="a paper", **more)


def test_verdicts() -> None:
    comparison = comparison_of({"a": TASKS, "b": noisy(TASKS, 1.1), "c": noisy(TASKS, 1.0003)})
    asked = [expectation(claim, [2]) for claim in ("a < b", "b < a", "a < c", "a < missing")]
    verdicts = judge(asked, comparison)
    assert [verdict.answer for verdict in verdicts] == ["held", "did not hold", "not decided", "not tested"]
    assert [verdict.test.family for verdict in verdicts[:3] if verdict.test] == [3, 3, 3], "what is not there is not tested"
    assert judge([expectation("a < b", [8])], comparison)[0].answer == "not tested"
    single = judge([expectation("a < b", [2, 1])], comparison_of({"a": [10.0], "b": [11.0]}))
    assert [verdict.answer for verdict in single] == ["not decided"] * 2 and "(one seed)" in verdict_table(single)


def test_counts_are_no_results_and_equal_flops_are_equal() -> None:
    """At tier 1 the sides agree within 2 % in every seed, at tier 2 only on average."""
    sides = {"a": [1.0, 1.0, 1.0, 1.0], "b": [1.03, 0.97, 1.03, 0.97]}
    records = [
        Record(label, seed, "", "", {}, {"2": {"flops": cost, "perplexity": 9.0 + seed}, "1": {"flops": 1 + cost / 10}}, {}, {})
        for label, costs in sides.items()
        for seed, cost in enumerate(costs)
    ]
    records = [replace(one, after={**one.after, "1": {**one.after["1"], "perplexity": 5.0 + one.seed}}) for one in records]
    comparison = Comparison(["a", "b"], 4, records)
    verdicts = judge([expectation("a < b", [2, 1]), expectation("a < b", [2, 1], metric="flops")], comparison)
    assert [verdict.equal_flops for verdict in verdicts[:2]] == [False, True]
    assert [verdict.arithmetic for verdict in verdicts] == [False, False, True, True]
    assert [verdict.test.family for verdict in verdicts if verdict.test] == [2, 2], "counts are in no family"
    table = [row.split("|")[-2].strip() for row in verdict_table(verdicts[:2]).splitlines()[2:]]
    assert table == ["100 %", "equal (100 %)"] and "p" not in verdict_table(verdicts[2:]).splitlines()[0].split()
    assert verdicts[2].answer == "not decided", "a count that depends on the seed settles nothing"
    cheaper = [replace(one, after={"2": {"flops": 0.8 if one.label == "a" else 1.0}}) for one in records]
    assert judge([expectation("a < b", [2], metric="flops")], Comparison(["a", "b"], 4, cheaper))[0].answer == "held"


def test_shares_over_clients_are_told_apart_in_points() -> None:
    """The worst tenth of the clients may have nothing right, which has no logarithm."""
    sides = {"fair": [0.1, 0.2, 0.3, 0.2], "plain": [0.0, 0.09, 0.21, 0.1]}
    records = [
        Record(label, seed, "", "", {}, {"1": {"worst_accuracy": share, "mean_accuracy": 0.8, "accuracy_spread": 0.2}}, {}, {})
        for label, shares in sides.items()
        for seed, share in enumerate(shares)
    ]
    comparison = Comparison(["fair", "plain"], 4, records)
    (verdict,) = judge([expectation("plain < fair", [1], metric="worst_accuracy")], comparison)
    assert verdict.answer == "held" and verdict.in_points and verdict.difference is not None
    assert verdict.difference.mean == pytest.approx(-0.1) and "-10.00 points ±" in verdict_table([verdict])
    assert comparison.log_ratio("plain", "fair", "1", "worst_accuracy") is None
    assert "| fair  " in fairness_table(comparison, "1") and "80.0 ± 0.0" in fairness_table(comparison, "1")
    broken = [replace(records[0], after={"1": {"worst_accuracy": math.nan}}), *records[1:]]
    asked = [expectation("plain < fair", [1], metric="worst_accuracy")]
    assert judge(asked, Comparison(["fair", "plain"], 4, broken))[0].answer == "not tested"


@pytest.mark.parametrize(("metric", "factor"), [("virtual_time", 3.0), ("joules", 5.0)])
def test_costs_are_those_until_the_target_of_the_seed(metric: str, factor: float) -> None:
    """Both reach 10: the slow one in its third evaluation, the other in its second, where it has spent less."""
    records = []
    for seed in range(4):
        for label, times, heights in (("fast", (0, 1, 2), (20, 10, 5)), ("slow", (0, 1, 3), (20, 15, 10))):
            rows = [
                {"virtual_time": time, "joules_total": time * (5 / 3 if label == "slow" else 1), "perplexity": height}
                for time, height in zip(times, heights, strict=True)
            ]
            records.append(Record(label, seed, "", "", {}, {"1": {}}, {}, {}, courses={"1": rows}))
    comparison = Comparison(["fast", "slow"], 4, records)
    (verdict,) = judge([expectation("fast < slow", [1], metric=metric)], comparison)
    assert verdict.answer == "held" and verdict.difference is not None
    assert verdict.difference.mean == pytest.approx(-math.log(factor))
    never = [replace(record, targets={"perplexity": 7.0}) for record in records]
    unreached = judge([expectation("fast < slow", [1], metric=metric)], Comparison(["fast", "slow"], 4, never))
    assert unreached[0].answer == "not tested", "the slow one never gets to 7"


def over_rounds(heights: dict[str, Sequence[float]]) -> Comparison:
    """Four seeds alike: the perplexity of every method, the foundation's first."""
    records = [
        Record(label, seed, "", "", {}, {"1": {"perplexity": course[-1]}}, {}, {}, evaluations={"1": rows})
        for label, course in heights.items()
        for rows in [[{"round": number, "perplexity": height} for number, height in enumerate(course)]]
        for seed in range(4)
    ]
    return Comparison(list(heights), 4, records)


def test_rounds_are_those_until_both_of_a_pair_are_there() -> None:
    """A third method that never gets so far changes nothing."""
    comparison = over_rounds({"fast": [20, 8, 10, 9], "slow": [20, 15, 12, 10], "bad": [20, 19, 19, 19]})
    (verdict,) = judge([expectation("fast < slow", [1], metric="rounds")], comparison)
    assert verdict.answer == "held" and verdict.difference is not None
    assert verdict.difference.mean == pytest.approx(math.log(1 / 3))
    assert "| fast < slow, rounds to the target " in verdict_table([verdict])


def test_several_evaluations_count_as_one_by_their_mean_loss() -> None:
    """One lucky round is no target, nor the last round the end; the foundation is in no mean."""
    courses = {"noisy": [1, 2, 32, 8, 8], "calm": [1, 16, 8, 4, 16]}
    comparison = over_rounds(courses)
    late, target = (expectation("calm < noisy", [1], metric=metric, over=2) for metric in ("perplexity", "rounds"))
    verdicts = judge([late, target], comparison)
    assert [verdict.difference and verdict.difference.mean for verdict in verdicts] == [
        pytest.approx(0.0),  # 4 and 16 are 8 by their mean loss
        pytest.approx(math.log(3 / 2)),  # what both reach is 8: of 2 and 32 in round 2, and below it, of 8 and 4, in round 3
    ]
    assert ", mean of 2 evaluations" in verdict_table(verdicts)
    assert judge([expectation("calm < noisy", [1], over=5)], comparison)[0].answer == "not tested", "a run has four"
    with pytest.raises(ValidationError, match="over: 2: accuracy is of the last round alone; use 1, or one of"):
        expectation("calm < noisy", [1], metric="accuracy", over=2)


def test_an_expectation_may_compare_how_clear_an_order_is_at_two_tiers() -> None:
    records = [
        Record(label, seed, f"{label}{seed}", "", {}, {"2": {"perplexity": high}, "1": {"perplexity": low}}, {}, {})
        for label, high, low in (("a", 10.0, 20.0), ("b", 11.0, 30.0))
        for seed in range(4)
    ]
    comparison = Comparison(["a", "b"], 4, records)
    up, down = judge([expectation("a < b", [1], more_than_at=2), expectation("a < b", [2], more_than_at=1)], comparison)
    assert (up.answer, down.answer) == ("held", "did not hold")
    assert up.difference is not None and up.difference.mean == pytest.approx(math.log(20 / 30) - math.log(10 / 11))


def test_tables_mark_what_is_not_beaten_and_line_up(request_: Request) -> None:
    for place, run in enumerate(plan(request_)):
        record_run(run, 30.0 + place, flops=(1 + place // 2) * 1e12)
    records = [read_record(run) for run in plan(request_)]
    head, _, *rows = tier_table(Comparison(["flame", "flame-t0"], 2, records), "2").splitlines()
    assert len({len(line) for line in (head, *rows)}) == 1
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["foundation", "flame", "flame-t0"]
    assert cells[0][1:] == ["50.00 ± 0", "50.00 ± 0", "12 % ± 0 %", "-", "-"]
    assert cells[1][1] == "**30.50 ± 0.71**" and cells[2][1] == "32.50 ± 0.71"
    assert [row[4:] for row in cells[1:]] == [["3.00", "100 %"], ["6.00", "200 %"]]


def test_task_metrics_before_and_after(request_: Request) -> None:
    """Changes are paired by seed; intervals are t-intervals over seeds; runs without task metrics have no such table."""
    assert task_table(comparison_of({"a": [1.0, 2.0]}), "2") == ""
    for run, share in zip(plan(request_), (0.5, 0.75, 0.25, 0.25), strict=True):
        record_run(run, 20.0)
        with MetricsLog(run.folder / "metrics.jsonl") as log:
            log.truncate(0)
            log.write("run", foundation="f0")
            for round_, values in ((0, (0.1, 0.3)), (2, (share, 1.0))):
                for name, value in zip(("x", "y"), values, strict=True):
                    scores = {"perplexity": 2.0, "exact_match": value, "samples": 4, "client": name}
                    log.write("eval", round=round_, tier=2, split="client", **scores)
                pooled = {"perplexity": 2.0, "exact_match": sum(values) / 2, "samples": 8}
                log.write("eval", round=round_, tier=2, split="clients", **pooled)
            log.write("end", rounds=2, digest="ab" * 32)
    records = [read_record(run) for run in plan(request_)]
    comparison = Comparison(["flame", "flame-t0"], 2, records)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in task_table(comparison, "2").splitlines()[2:]]
    half = half_interval([0.5, 0.75])
    assert half == pytest.approx(stats.t.interval(0.95, 1, 0.625, stats.sem([0.5, 0.75]))[1] - 0.625)
    worst = "worst tenth of the clients"
    assert table[1] == [
        "flame",
        "exact match",
        worst,
        "10.0 ± 0.0",
        f"62.5 ± {100 * half:.1f}",
        f"+52.5 ± {100 * half:.1f}",
        "2",
    ]
    assert table[2][:2] == ["flame-t0", "exact match"] and table[3][4:] == ["25.0 ± 0.0", "+15.0 ± 0.0", "2"]
    assert table[0][2:4] == ["clients, pooled", "20.0 ± 0.0"] and len(table) == 4


def test_accuracy_over_clients_is_read_of_the_rounds_that_are_compared(request_: Request) -> None:
    """Eleven clients, of which two are the worst tenth; the table is shown where an ordering of these figures is tested."""
    shares = [0.0, 0.25, *[0.75] * 9]
    for run in plan(request_):
        with MetricsLog(run.folder / "metrics.jsonl") as log:
            log.write("run", foundation="f0")
            for round_ in (0, 2):
                for place, share in enumerate(shares):
                    scores = {"perplexity": 2.0, "accuracy": share if round_ else 0.5, "client": f"c{place}"}
                    log.write("eval", round=round_, tier=2, split="client", **scores)
                log.write("eval", round=round_, tier=2, split="clients", perplexity=2.0, accuracy=0.5)
            log.write("end", rounds=2, digest="ab" * 32)
    record = read_record(plan(request_)[0])
    found = [record.after["2"][name] for name in ("mean_accuracy", "worst_accuracy", "accuracy_spread")]
    assert found == pytest.approx([np.mean(shares), 0.125, np.std(shares)])
    assert record.before["2"]["accuracy_spread"] == 0.0 and record.before["2"]["worst_accuracy"] == 0.5
    assert "worst tenth" not in start(request_)[1], "nothing asks for it"
    study = "expectations: [{claim: flame < flame-t0, metric: worst_accuracy, tiers: [2], source: a paper}]"
    request_.study.write_text(f"{STUDY.partition('expectations')[0]}\n{study}\n")
    assert "worst tenth, %" in start(request_)[1] and "12.5 ± 0.0" in (request_.output / "comparison.md").read_text()


def test_numbers_and_cells() -> None:
    assert [number(value) for value in (0.0, 1234.5, 0.1, 0.0123, -0.004)] == ["0", "1234.50", "0.10", "0.012", "-0.004"]
    assert with_spread(Spread({0: 2.0}), number) == "2.00"
    assert [p_value(p) for p in (0.0, 0.00099, 0.0123, 0.2345)] == ["<0.001", "<0.001", "0.012", "0.23"]
    assert markdown(["a", "b"], [["x|y", "1"]]).splitlines()[-1] == "| x\\|y |   1 |"


SAID = (  # what a reader must know before a figure is believed
    "2 rounds of at most 3 local steps, the model nano-olmoe, 2 seeds: what follows is about this model",
    "Hold-outs are samples: the global one 64 targets (at most 8 sequences), those of the clients together 64 target",
    "two-sided paired t-test of log(left / right) over seeds; p-values are corrected by Holm within a family",
    "the 1 pair of methods at a tier, by figure, and the 2 published orderings",
    "With 2 seeds, the first claim of a family is decided where its mean difference is at least 9.0 and 18.0 times",
    "could not fall below p = 0.5 before",
)


def test_the_report_holds_text_picture_and_numbers(request_: Request) -> None:
    for place, run in enumerate(plan(request_)):
        record_run(run, [30.0, 31.0, 33.0, 34.2][place], flops=1e12)
    copy = request_.output.parent / "docs.md"
    code, _ = start(replace(request_, report=copy))
    report = (request_.output / "comparison.md").read_text()
    assert code == 0 and copy.read_text() == report.replace("(comparison.svg)", "(docs.svg)")
    assert str(Path.home()) not in report.replace(str(request_.config.parent), "")
    assert re.search(r"\| held +\| a paper +\|", report)
    assert "Lowest perplexity first: flame < flame-t0\n\n1 of 1 pairs decided: flame < flame-t0" in report
    assert [text for text in SAID if text not in report] == []
    assert "Versions: torch 2.13." in report
    picture = ElementTree.fromstring((request_.output / "comparison.svg").read_text())
    words = [element.text or "" for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("flame-t0") == 2 and "33.60 ± 0.85" in words and "foundation 50.00 ± 0" in words
    assert copy.with_suffix(".svg").read_text() == (request_.output / "comparison.svg").read_text()
    numbers = json.loads((request_.output / "comparison.json").read_text())
    assert [run["after"]["2"]["perplexity"] for run in numbers["runs"]] == [30.0, 31.0, 33.0, 34.2]
    line = numbers["tiers"][0]["lines"][1]
    assert line["label"] == "flame" and line["perplexity"]["by_seed"] == {"0": 30.0, "1": 31.0}
    assert [verdict["verdict"] for verdict in numbers["expectations"]] == ["held", "held"]
    (pair,) = [one for one in numbers["tiers"][0]["pairs"] if one["figure"] == "perplexity"]
    assert (pair["left"], pair["right"], pair["family"]) == ("flame", "flame-t0", 1) and pair["p"] == pair["corrected"] < 0.02
    assert numbers["expectations"][0]["test"]["corrected"] == pytest.approx(2 * numbers["expectations"][0]["test"]["p"])


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"methods": "flame,flam"}, r"^method\.name: flam: .*did you mean 'flame'"),
    "no method": ({"methods": ""}, "^--methods: empty: lists no method"),
    "no seeds": ({"seeds": 0}, "^--seeds: 0: there is nothing to run"),
    "no jobs": ({"jobs": 0}, "^--jobs: 0: must be"),
    "no ranks": ({"ranks": 0}, "^--ranks: 0: must be"),
    "label twice": ({"methods": "flame,flame-t0,flame"}, "^--methods: flame: listed twice"),
    "entry without value": ({"methods": "flame:method.temperature"}, "^--methods: .*'method.temperature' is no key=value"),
    "key of another method": ({"methods": "fedit", "overrides": ["method.temperature=1"]}, r"^method\.temperature: unknown"),
    "the study's own key": ({"overrides": ["seed=4"]}, "^override: seed: is decided by --seeds"),
    "unknown key": ({"overrides": ["local.lrr=4"]}, r"^local\.lrr: unknown key"),
    "nothing to take from": ({"methods": "flame-wide"}, r"^--study: adapters\.rank: is to be taken from .*flame\.yaml"),
    "no base": ({"config": Path("nowhere.yaml")}, "^config: nowhere.yaml: no such file"),
    "no study": ({"study": Path("nowhere.yaml")}, "^--study: nowhere.yaml: cannot be read"),
    "output is a file": ({"output": Path(__file__)}, "^--output: .*cannot be written"),
    "report elsewhere": ({"report": Path("nowhere/x.md")}, "^--report: nowhere/x.md: cannot be written"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(request_: Request, name: str) -> None:
    changes, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as caught:
        start(replace(request_, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methodz: {}", r"study\.yaml: methodz: unknown key; did you mean 'methods'"),
        ("expectations: [{claim: a > b, tiers: [1], source: x}]", r"expectations\.0\.claim: a > b: is no ordering"),
        ("expectations: [{claim: a < b, tiers: [1]}]", r"expectations\.0\.source: missing"),
        ("- 1", "study"),
    ],
)
def test_mistakes_in_a_study_file_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_protocol(tmp_path / "study.yaml")


def test_two_studies_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match=r"^--output: .*a study, or a run it left behind"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_the_shipped_study_is_sound() -> None:
    configs = REPOSITORY / "configs"
    protocol = read_protocol(configs / "compare-study.yaml")
    base = load_config(configs / "compare.yaml")
    tiers = {tier.top_k for tier in base.federation.tiers or []}
    assert tiers == {8, 4, 2, 1} and every(set(entry.tiers) <= tiers for entry in protocol.expectations)
    labels = [label for label, entry in protocol.methods.items() if entry.name == "flame"]
    variants = parse_variants(",".join(["flame", *labels]), protocol, configs / "methods")
    runs = plan_runs(configs / "compare.yaml", variants, 1, Path("runs"), [])
    methods = {run.label: run.config.method.model_dump() for run in runs}
    assert methods["flame-t0"]["temperature"] == 0.0
    assert [methods[f"flame-{name}"]["rescaler"] for name in ("static", "none")] == ["static", "none"]
    assert not any("equal FLOPs" in entry.source for entry in protocol.expectations), "the report says where they are"
    listed = re.search(r"^METHODS \?= (\S+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert listed is not None
    named = listed[1].split(",")
    assert {side for entry in protocol.expectations for side in entry.sides} <= set(named), "every ordering is tested"
    assert parse_variants(listed[1], protocol, configs / "methods")


ORDERINGS = {
    "methods/fednova.yaml": "fedavg,fednova,ewwa-fl,flood",
    "methods/fedvra.yaml": "fedavg,fedprox,scaffold,feddyn,fedvra,fedavgm,fedadam,fedyogi,fedadagrad,fedams",
    "methods/ewwa-fl.yaml": "equal-fedavg,equal-ewwa,equal-fedadam,equal-fedams",
    "methods/fedbuff.yaml": "fedbuff,synchronous",
    "methods/ota-ffl.yaml": "ota-ffl,ota-ffl-near,ota-fedavg",
    "methods/q-fedavg.yaml": "q-fedavg,q-0,fedavg",
    "methods/wireless-fl.yaml": "wireless-fl,wireless-lots,wireless-fixed,wireless-fixed-2",
    "methods/cc-fao.yaml": "cc-fao,cc-fao-constant,cc-fao-same,cc-fao-sgd,cc-fao-raw,fedavg-async",
    "methods/split-mix.yaml": "split-mix,split-mix-first",
    "lora-equal.yaml": "fedit,fedex-lora,ffa-lora,flora,fedsa-lora,flexlora-equal,lora-fair,lora-fair-0",
    "lora-unequal.yaml": "hetlora,hetlora-0,flexlora,flora,fslora,equal-ranks",
}
"""What docs/log.md runs beside each other, by the base."""


@pytest.mark.parametrize("base", ORDERINGS)
def test_the_shipped_orderings_are_sound(base: str) -> None:
    """The labels of a base are different runs, and every ordering among them is about a tier that they have."""
    configs, labels = REPOSITORY / "configs", ORDERINGS[base].split(",")
    protocol = read_protocol(configs / "orderings.yaml")
    variants = parse_variants(ORDERINGS[base], protocol, configs / "methods")
    runs = plan_runs(configs / base, variants, 1, Path("runs"), [])
    trees = [json.dumps(run.config.model_dump(exclude={"name"})) for run in runs]
    assert len(set(trees)) == len(labels)
    asked = [entry for entry in protocol.expectations if set(entry.sides) <= set(labels)]
    config = runs[0].config
    # Without tiers there is one, and tiers may differ in something else: the cap is that of adapter experts, or of none.
    whole = config.adapters.moe.top_k if config.adapters.moe else 1
    tiers = {tier.top_k or whole for tier in config.federation.tiers or []} or {whole}
    assert asked and every(set(entry.tiers) <= tiers for entry in asked)


def test_the_page_about_studies_names_every_key_and_its_example_is_one(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "studies.md").read_text()
    names = (*get_args(Metric), *Expectation.model_fields, *MethodEntry.model_fields)
    assert [name for name in names if f"`{name}`" not in page] == []
    study = tmp_path / "mine.yaml"
    study.write_text(page.partition("```yaml\n")[2].partition("```")[0])
    protocol = read_protocol(study)
    assert protocol.expectations[0].sides == ("scaffold", "fedprox") and set(protocol.methods) == {"fedprox", "scaffold"}


def test_every_shipped_ordering_has_a_base() -> None:
    protocol = read_protocol(REPOSITORY / "configs" / "orderings.yaml")
    bases = [set(labels.split(",")) for labels in ORDERINGS.values()]
    assert every(any(set(entry.sides) <= labels for labels in bases) for entry in protocol.expectations)
    assert set(protocol.methods) <= set().union(*bases)


@pytest.mark.timeout(300)
def test_the_real_command(nano: dict[str, Any], request_: Request) -> None:
    """Two methods, one seed: trained by launch/train.py, on one foundation and the same data; a second start trains nothing."""
    tree = changed(nano, federation={"rounds": 1}, local={"max_steps": 1})
    request_.config.write_text(json.dumps({key: value for key, value in tree.items() if key != "name"}))
    request = replace(request_, seeds=1)
    notes: list[str] = []
    code, _ = start(request, SCRIPT, notes.append)
    logs = "".join(path.read_text() for path in request.output.glob("*.log"))
    assert code == 0, logs
    assert [note.split(":")[0] for note in notes] == ["[1/2] flame-seed0", "[2/2] flame-t0-seed0"]
    runs = plan(request)
    facts = [read_events(run.folder, "run")[0] for run in runs]
    assert facts[0]["foundation"] == facts[1]["foundation"] and [fact["method"] for fact in facts] == ["flame", "flame"]
    numbers = json.loads((request.output / "comparison.json").read_text())
    assert len({run["digest"] for run in numbers["runs"]}) == 2, "temperature 0 gives other adapters"
    for run, found in zip(runs, numbers["runs"], strict=True):
        scores = {
            e["tier"]: e["perplexity"] for e in read_events(run.folder, "eval") if (e["round"], e["split"]) == (1, "global")
        }
        assert {int(tier): figures["perplexity"] for tier, figures in found["after"].items()} == scores
        spent = [e["flops"] for e in read_events(run.folder, "client") if e["top_k"] == 4]
        assert found["after"]["4"]["flops"] == pytest.approx(sum(spent) / len(spent))
    assert start(request)[0] == 0, "everything is finished, so the missing script is not missed"
