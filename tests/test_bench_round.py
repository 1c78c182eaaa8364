"""The round benchmark: phases out of real events, its arithmetic, what it asks for, bad input. No timing is asserted."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from every import every
from federations import make_config, run_alone, write_inputs

from fedmoe_ds.bench.harness.command import add_options
from fedmoe_ds.bench.harness.shapes import SHAPES, write_model
from fedmoe_ds.bench.harness.system import BITWISE, OURS
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.rounds import budget, overhead, weak
from fedmoe_ds.bench.rounds.command import COMMAND, run_rounds
from fedmoe_ds.bench.rounds.jobs import PHASES, TRAINING, RoundJobs, RoundTime, RoundWorkload, Timed, round_times
from fedmoe_ds.bench.rounds.shares import shares_row
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.planner import resolve

BENCH = Path(__file__).parents[1] / "launch" / "bench.py"
JOBS = RoundJobs(RoundWorkload(SHAPES["tiny"], clients=4, steps=5, sequences=2, length=10), Path("nowhere"))


def round_time(seconds: float, tokens: int = 400, **phases: float) -> RoundTime:
    return RoundTime(seconds, tokens, {**dict.fromkeys(PHASES, 0.0), **phases})


def bench_round(**changes: Any) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, COMMAND.options)
    COMMAND.run(argparse.Namespace(**{**vars(parser.parse_args([])), **changes}), lambda text: None)


def test_phases_of_a_real_run_add_up_to_its_rounds(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    events = run_alone(make_config(tmp_path, "timed", {"federation": {"rounds": 3}})).events
    found = round_times(events)
    whole = [event for event in events if event["event"] == "round"]
    assert [one.tokens for one in found] == [event["tokens"] for event in whole[1:]]
    for one, before, after in zip(found, whole, whole[1:], strict=False):
        assert one.seconds == pytest.approx(after["time"] - before["time"])
        assert list(one.phases) == list(PHASES) and sum(one.phases.values()) == pytest.approx(one.seconds)
        assert one.phases["passes"] > 0 and one.phases["optimizer"] > 0 and one.phases["checkpoint"] > 0
        assert one.phases["passes"] + one.phases["optimizer"] < after["phases"]["train"]
        assert one.phases["evaluate"] == after["phases"]["evaluate"] and one.phases["fold"] > 0
        assert one.phases["other"] > -0.01  # what is counted twice would show here; time stamps have milliseconds
        assert one.without_evaluation == one.seconds - one.phases["evaluate"]


def test_the_checkpoint_in_a_round_is_the_one_before() -> None:
    wave = {"set_up": 0.5, "passes": 5.0, "optimizer": 1.0, "reports": 0.25}
    phases = {"schedule": 0.1, "train": 7.0, "aggregate": 0.5, "evaluate": 2.0}
    events: list[dict[str, Any]] = [{"event": "run", "time": 0.0}]
    for number in (1, 2, 3):
        events.append(
            {"event": "round", "round": number, "time": 10.0 * number, "tokens": 7, "phases": phases, "wave_seconds": wave}
        )
        events.append({"event": "checkpoint", "round": number, "time": 10.0 * number + 0.1, "seconds": 0.01 * number})
    first, second = round_times(events)
    assert (first.phases["checkpoint"], second.phases["checkpoint"]) == (0.01, 0.02)
    assert first.phases["fold"] == pytest.approx(7.0 - 6.75)
    assert first.phases["other"] == pytest.approx(10.0 - 7.0 - 0.1 - 0.5 - 2.0 - 0.01)


def test_shares_sum_to_one() -> None:
    slow = round_time(100.0, passes=90.0, optimizer=5.0, evaluate=5.0)
    usual = [round_time(12.0, passes=6.0, optimizer=3.0, set_up=0.5, other=0.5, evaluate=2.0)] * 2
    row = shares_row(JOBS, OURS, Timed([slow, *usual], 70.0))
    for shares in (row["shares"], row["shares_without_evaluation"]):
        assert sum(shares.values()) == pytest.approx(1.0)
    assert row["value"] == pytest.approx(0.1) and row["samples"]["value"] == pytest.approx([0.0, 0.1, 0.1])
    assert row["samples"]["evaluation"] == pytest.approx([0.05, 1 / 6, 1 / 6])
    assert row["phase_samples"]["passes"] == pytest.approx([90 / 95, 0.6, 0.6])
    assert row["with_evaluation"] == pytest.approx(3 / 12)
    assert row["round_s"] == 12.0 and row["tokens_per_s"] == pytest.approx(400 / 10.0)
    assert sum(row["shares_without_evaluation"][name] for name in TRAINING) == pytest.approx(0.9)


def test_overhead_is_per_token_of_the_centralised_run() -> None:
    costs = {system: overhead.Cost() for system in (*overhead.METHODS, overhead.PEER)}
    seconds = {OURS: 1.1, f"{OURS} flame": 1.2, overhead.CENTRALISED: 1.0, overhead.WHOLE_WAVES: 0.5}
    for system, cost in costs.items():
        cost.add([seconds.get(system, 4.0)] * 2, [100, 100], 50.0)
        cost.add([seconds.get(system, 4.0) * 9], [100], 40.0)  # a disturbed turn, in which everybody is slow: ratios stay
    rows = {(row["system"], row["against"]): row for row in overhead.overhead_rows(JOBS, costs)}
    single, waves = overhead.CENTRALISED, overhead.WHOLE_WAVES
    assert [row["target"] for row in rows.values()] == [1.15] * 4 + [None] * 3
    assert [row["samples"]["value"] for row in rows.values()][:2] == [pytest.approx([1.1] * 3), pytest.approx([2.2] * 3)]
    met = [cells[-1] for cells in COMMAND.show(list(rows.values())).cells]
    assert met == ["yes", "no", "no", "no", "", "", ""]
    assert rows[OURS, single]["value"] == pytest.approx(1.1) and rows[OURS, waves]["value"] == pytest.approx(2.2)
    assert rows[overhead.PEER, single]["value"] == pytest.approx(4.0)
    assert rows[OURS, single]["peak_mib"] == 50.0 and rows[OURS, single]["round_s"] == pytest.approx(1.1 * 4 * 5 * 2 * 10)
    assert overhead.in_turn(["a", "b"], 0) == ["a", "b"] and overhead.in_turn(["a", "b"], 1) == ["b", "a"]


def test_weak_scaling_counts_tokens_per_rank() -> None:
    alone, together = Timed([round_time(10.0, tokens=400, evaluate=2.0)], 80.0), Timed([round_time(9.0, tokens=700)], 90.0)
    one, two, machine = weak.weak_rows(JOBS, alone, together, machine=[0.8, 0.9, 1.0], peak=60.0)
    assert (one["ranks"], two["ranks"], one["clients"], two["clients"]) == (1, 2, 4, 8)
    assert one["tokens_per_s"] == pytest.approx(50.0) and two["tokens_per_s"] == pytest.approx(700 / 9)
    assert two["value"] == pytest.approx(700 / 9 / 2 / 50.0) and two["target"] == 0.9 and one["target"] is None
    assert two["of_machine"] == pytest.approx(two["value"] / 0.9) and machine["value"] == 0.9
    slow, fast = round_time(10.0), round_time(8.0)
    varying = weak.weak_rows(JOBS, Timed([slow, fast], 80.0), Timed([fast, slow], 90.0), machine=[1.0], peak=60.0)
    assert varying[1]["samples"]["value"] == pytest.approx([10 / 8 / 2, 8 / 10 / 2]), "by turn"


def test_flops_of_a_wave_are_those_of_the_cost_model(tmp_path: Path) -> None:
    load = Workload(SHAPES["tiny"], steps=1, sequences=2, length=24, seed=3)
    write_model(load.shape, load.seed, tmp_path)
    job = resolve(budget.job_config(load, tmp_path))
    tokens, layers, head = 8 * 2 * 24, load.shape.layers, load.shape.hidden * load.shape.vocab
    # q k^T and its values, forward and twice backward; of the scores a causal mask leaves half.
    scores = 8 * 2 * 24 * 24 * load.shape.hidden * layers * 4 * 3 / 2
    for cap in (1, 3, 8):
        routed = tokens * cap * layers
        # The cost model has the output head on every token and no scores; there are targets for all positions but the first.
        expected = job.cost.spent(tokens, routed, routed, load.rank) - 4 * head * 8 * 2 + scores
        assert budget.wave_flops(load, job, cap) == pytest.approx(expected, rel=1e-9)
    row = budget.budget_row(load, {1: [1.0, 2.0, 9.0], 8: [4.0, 4.0, 4.0]}, job, 60.0)
    ratio = budget.wave_flops(load, job, 1) / budget.wave_flops(load, job, 8)
    assert row["time_ratio"] == 0.5 and row["flops_ratio"] == pytest.approx(ratio) and 1 / 8 < ratio < 1
    assert row["value"] == pytest.approx(0.5 / ratio)
    assert row["samples"]["value"] == pytest.approx([0.25 / ratio, 0.5 / ratio, 2.25 / ratio])
    assert budget.same_cap(load, 3) == replace(load, caps=(3,) * 8)


def test_the_table_says_what_was_met() -> None:
    done = [
        round_time(12.0, passes=9.0, optimizer=1.0, evaluate=2.0),
        round_time(12.0, passes=9.0, optimizer=0.9, evaluate=2.1),
    ]
    shares = shares_row(JOBS, BITWISE, Timed(done, 70.0))
    alone, together = Timed([round_time(10.0)] * 2, 80.0), Timed([round_time(10.0, tokens=800)] * 2, 90.0)
    table = COMMAND.show([shares, *weak.weak_rows(JOBS, alone, together, [1.0, 1.0], 60.0)])
    assert len(table.cells) == 1 + len(PHASES) + 3 and every(len(cells) == len(table.header) for cells in table.cells)
    assert table.cells[0][:3] == ["shares", "tiny", BITWISE] and table.cells[0][-2:] == ["<= 5.0 %", "yes"]
    assert table.cells[-2][-2:] == [">= 0.90", "yes"] and table.cells[-1][-2:] == ["", ""]
    assert table.cells[1][3:6] == ["forward and backward", "90.5 % (90.0 % to 90.9 %)", "75.0 %"]
    evaluation = table.cells[len(PHASES)]
    assert evaluation[3:6] == ["evaluation", "", "17.1 % (16.7 % to 17.5 %)"], "beside what is left when it is not counted"
    assert "8 clients" not in table.text() and "4 clients x 5 steps takes 12.00 s, 17.1 % of it evaluation" in table.lines[0]
    once = weak.weak_rows(JOBS, Timed([round_time(10.0)], 80.0), Timed([round_time(10.0, tokens=800)], 90.0), [1.0], 60.0)
    assert COMMAND.show(once).cells[1][4:] == ["1.00 (one timing)", "", ">= 0.90", "not decided"]


def test_what_is_run_is_a_valid_configuration() -> None:
    config = Config.model_validate(JOBS.tree("a", {"data": {"max_samples": 6}, "method": {"name": "fedit"}}))
    assert (config.local.steps, config.local.batch_size, config.federation.rounds) == (5, 2, 4)
    assert (config.data.max_samples, config.data.sequence_length, config.method.name) == (6, 10, "fedit")
    assert overhead.peer_workload(JOBS).tokens * JOBS.load.clients == 4 * 5 * 2 * 10


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"--parts: share: unknown part; did you mean 'shares'"):
        bench_round(parts=["k", "share"])
    with pytest.raises(UserError, match="--steps: 0: too small"):
        replace(JOBS.load, steps=0)
    with pytest.raises(UserError, match="--length: 513"):
        replace(JOBS.load, length=513)
    with pytest.raises(UserError, match="--sequences: 33"):
        replace(JOBS.load, sequences=33)
    with pytest.raises(UserError, match="--k-sequences: 0: too small"):
        bench_round(k_sequences=[1, 0])
    with pytest.raises(UserError, match="--repeats: 0"):
        run_rounds(JOBS.load, JOBS.load, ["overhead"], 0, lambda text: None)


@pytest.mark.cluster
@pytest.mark.timeout(850)
def test_round_writes_its_rows(tmp_path: Path) -> None:
    target = tmp_path / "round.json"
    small = ["--shape", "tiny", "--clients", "2", "--steps", "2", "--length", "16", "--rounds", "1"]
    runs = ["--repeats", "1", "--overhead-steps", "2"]
    waves = ["--k-shape", "tiny", "--k-sequences", "1", "2", "--k-steps", "1"]
    command = [sys.executable, str(BENCH), "round", *small, *runs, *waves, "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["rows"]
    assert [row["part"] for row in rows] == ["shares"] * 2 + ["overhead"] * 7 + ["weak"] * 3 + ["k"] * 2
    for row in rows:
        assert row["shape"] == "tiny" and row["value"] >= 0 and row["peak_mib"] > 50 and row["cpu"]
        assert row["target"] is None or len(row["samples"]["value"]) >= 1
    assert [sum(row["shares"].values()) for row in rows[:2]] == pytest.approx([1.0, 1.0])
    assert {count for row in rows if row["system"] in overhead.METHODS for count in row.get("round_tokens", [])} == {64}
    assert [row["ranks"] for row in rows[9:12]] == [1, 2, 2] and [row["clients"] for row in rows[9:12]] == [2, 4, 4]
