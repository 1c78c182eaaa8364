"""Simulation: against a plan where both work, failures against a slow simulation of them, the command and its page."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.commands import simulate as command
from fedmoe_ds.config import Config, load_config
from fedmoe_ds.distributed.gloo_control import FLAT, gather_hops
from fedmoe_ds.errors import UserError
from fedmoe_ds.planner import Job, World, load_hardware
from fedmoe_ds.planner.memory import PERSONAL
from fedmoe_ds.planner.network import Group, wire_shares
from fedmoe_ds.planner.plan import plan
from fedmoe_ds.simulation import Setting, simulate
from fedmoe_ds.simulation.clients import MOST_SAMPLES, Names, peopled, samples_of
from fedmoe_ds.simulation.curve import Curve, figures, links
from fedmoe_ds.simulation.failures import Checkpointing, Failures
from fedmoe_ds.simulation.federation import Simulated, resolved
from fedmoe_ds.simulation.text import lines
from fedmoe_ds.simulation.walls import Wall, walls

REPOSITORY = Path(__file__).parents[1]
OLMOE = REPOSITORY / "configs" / "olmoe-7b.yaml"
H200 = load_hardware("h200")
WORLD = World(4, 8)


def configured(*overrides: str) -> Config:
    config = load_config(OLMOE, list(overrides))
    path = str(REPOSITORY / "configs" / "models" / "olmoe-1b-7b")
    return config.model_copy(update={"foundation": config.foundation.model_copy(update={"path": path})})


@pytest.fixture(scope="module")
def job() -> Job:
    return resolved(configured("federation.rounds=5"), H200)


def simulated(job: Job, world: World = WORLD, **values: float) -> Simulated:
    return simulate(job.config, world, H200, Setting(**values), job)  # type: ignore[arg-type]


def test_equal_clients_take_what_a_plan_says(job: Job) -> None:
    """The same clients, made by another way: full sequences, as a plan assumes them without a tokenizer."""
    config = configured("federation.rounds=5", "federation.participation=0.25", "data.partition.clients=64")
    planned = plan(config, WORLD, H200, searching=False)
    each = config.local.steps * config.local.batch_size  # type: ignore[operator]
    found = simulated(job, clients=64, participants=16, samples=each, sigma=0.0)
    expected = {name: seconds for name, seconds in planned.prediction.seconds.items() if name != "evaluate"}
    assert {name: found.first.seconds[name] for name in expected} == expected
    sent = planned.prediction.bytes
    assert found.first.bytes["all_reduce"] == sent["all_reduce"] > 0
    for name in ("all_gather", "all_to_all"):
        assert 0.9 * sent[name] < found.first.bytes[name] < sent[name], "without that of the evaluation"
    assert found.evaluation_s == pytest.approx(planned.evaluation_s) and planned.evaluation_s > 0
    assert found.seconds == pytest.approx(planned.seed_seconds, rel=0.01), "rounds of equal clients differ in their tiers alone"


def test_hold_outs_of_many_clients_cost_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    job = resolved(configured("federation.rounds=2", "evaluation.client_sequences=2"), H200)
    exact = simulated(job, clients=4096, participants=64).evaluation_s
    monkeypatch.setattr("fedmoe_ds.simulation.federation.SCORED", 1024)
    assert simulated(job, clients=4096, participants=64).evaluation_s == pytest.approx(exact, rel=0.1)
    assert exact > 1.5 * simulated(job, clients=1024, participants=64).evaluation_s


def test_sizes_are_lognormal() -> None:
    setting = Setting(samples=100.0, sigma=1.0)
    sizes = samples_of(100_000, setting, 0)
    assert sizes.mean() == pytest.approx(100.0, rel=0.03) and np.log(sizes).std() == pytest.approx(1.0, rel=0.03)
    assert np.array_equal(sizes, samples_of(100_000, setting, 0)) and not np.array_equal(sizes, samples_of(100_000, setting, 1))
    assert samples_of(100_000, Setting(samples=20_000.0, sigma=3.0), 0).max() == MOST_SAMPLES
    names = Names(1000)
    assert (
        list(names) == sorted(names)
        and names[7:9] == ["client-007", "client-008"]
        and len(set(names)) == 1000
        and names[-1] == "client-999"
    )


def slow(rng: np.random.Generator, failures: Failures, work: float, lag: float, segments: int) -> float:
    """Seconds of so many segments, failure by failure."""
    clock, done, pending = 0.0, 0, False
    while done < segments:
        if (failed := rng.exponential(failures.between)) >= work:
            clock, done, pending = clock + work, done + 1, True
            continue
        clock += failed
        # The checkpoint of the segment before was not on disk yet.
        done -= pending and failed < lag
        pending = False
        while (again := rng.exponential(failures.between)) < failures.restart:
            clock += again
        clock += failures.restart
    return clock


@given(st.floats(0.02, 1.5), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 2**32))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_failures_cost_what_a_slow_simulation_says(work: float, restart: float, late: float, seed: int) -> None:
    failures, rng = Failures(1.0, restart), np.random.default_rng(seed)
    lag = late * work
    runs = np.array([slow(rng, failures, work, lag, 200) / 200 for _ in range(20)])
    error = runs.std(ddof=1) / math.sqrt(len(runs))
    # The first segment has none before it that could be undone: one of 200.
    assert abs(runs.mean() - failures.segment(work, lag)) < 5 * error + 0.01 * runs.mean()


@given(st.floats(1.0, 1e4), st.floats(0.01, 1e3), st.floats(10.0, 1e6), st.floats(0.0, 1e4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_recommended_interval_is_the_best(
    round_s: float, write_s: float, between: float, restart: float, beside: bool
) -> None:
    checkpointing, failures = Checkpointing(round_s, write_s, beside), Failures(between, restart)
    costs = [float(checkpointing.slowdown(failures, n)) for n in range(1, 41)]
    best = checkpointing.best(failures, 40)
    assert costs[best - 1] == min(costs) and (best == 1 or costs[best - 2] > costs[best - 1])
    assert every(cost >= 1.0 for cost in costs)


@given(st.floats(0.01, 100.0), st.floats(1e3, 1e6))
@settings(max_examples=60, deadline=None)
def test_dalys_interval_is_near_the_best(checkpoint: float, between: float) -> None:
    failures = Failures(between, 0.0)

    def cost(work: float) -> float:
        return float(failures.segment(work + checkpoint)) / work

    daly = failures.daly(checkpoint)
    least = min(cost(daly * factor) for factor in np.geomspace(0.2, 5.0, 101))
    assert least <= cost(daly) <= least * 1.001
    assert failures.young(checkpoint) - checkpoint <= daly <= failures.young(checkpoint) * 1.1


@pytest.mark.parametrize(("between_min", "best_min"), [(24 * 60, 117.0), (6 * 60, 57.0), (15, 9.1)])
def test_dalys_own_examples(between_min: float, best_min: float) -> None:
    """Figures 3 to 5 of the paper: a checkpoint takes five minutes, a restart ten."""
    assert Failures(60.0 * between_min, 600.0).daly(300.0) / 60.0 == pytest.approx(best_min, rel=0.007)


def test_a_job_that_cannot_finish_a_round_says_so(job: Job) -> None:
    found = simulated(job, clients=1000, participants=64, mtbf_hours=0.01, restart_minutes=1e5)
    assert math.isinf(found.run_seconds()) and "never hours" in "\n".join(lines(found)).replace("days", "hours")
    assert found.checkpointing().best(found.failures, 10) == 1 and figures(found)["run_s"] is None


@given(st.integers(1, 64), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_bytes_cross_links_once_per_hop(hosts: int, each: int) -> None:
    group = Group(hosts * each, hosts)
    if group.size == 1:
        return
    for name, turns in (
        ("all_to_all", (group.size - 1) / group.size),
        ("all_reduce", 2 * (group.size - 1) / group.size),
        ("all_gather", group.size - 1),
    ):
        inside, between = wire_shares(name, group)
        assert inside + between == pytest.approx(turns) and min(inside, between) >= 0
        assert (between == 0) == (hosts == 1) and (inside < 1e-12) == (each == 1)


def test_messages_of_many_ranks_take_a_tree(job: Job) -> None:
    assert gather_hops(FLAT) == FLAT - 1 and gather_hops(4096) == 132
    hops = [gather_hops(size) for size in (100, 1000, 10_000)]
    assert every(hops[i] < hops[i + 1] < 4 * hops[i] for i in range(2))
    few, many = (simulated(job, World(hosts, 8), clients=10_000, participants=5120, sampled=1) for hosts in (4, 512))
    assert many.first.traffic["control"].seconds < 16 * few.first.traffic["control"].seconds


def test_personal_state_lies_at_home_and_in_files() -> None:
    # So many rounds that everybody has been drawn.
    job = resolved(configured("method.name=fedsa-lora", "execution.client_state_gib=0.5", "federation.rounds=200000"), H200)
    few, many = (simulated(job, clients=clients, participants=4, sampled=1) for clients in (16, 200_000))
    assert 0 < few.host_memory[PERSONAL] < 2**29 and few.spilled == 0
    assert 2**29 <= many.host_memory[PERSONAL] < 2 * 2**29 < many.spilled
    assert next(wall for wall in walls(many) if wall.name == PERSONAL).used > 1
    assert many.host_memory["checkpoint's copy"] == few.host_memory["checkpoint's copy"], "rows are written from where they lie"


def test_walls_stand_where_the_limit_is_reached() -> None:
    assert Wall("", "ranks", 100, 0.25, "").stands == 400
    assert Wall("", "ranks", 100, 0.25, "", power=0.5).stands == 1600
    assert Wall("", "ranks", 100, 0.6, "", fixed=0.2).stands == pytest.approx(200)
    assert Wall("", "ranks", 100, 2.0, "", fixed=1.5).stands == 0 and math.isinf(Wall("", "ranks", 1, 0.0, "").stands)


def test_more_of_everything_brings_walls_nearer(job: Job) -> None:
    near, far = (simulated(job, world, clients=clients, participants=participants) for world, clients, participants in
                 ((WORLD, 2000, 64), (World(64, 8), 200_000, 4096)))  # fmt: skip
    used = {wall.name: wall.used for wall in walls(near)}
    for wall in walls(far):
        if wall.name in ("open files of rank 0", "reports at rank 0", "columns of all clients", "failures"):
            assert wall.used > used[wall.name], wall.name
    assert every(size > 0 for size in links(far).values())
    shown = "\n".join(lines(far))
    assert every(f"--{name}" in shown for name in ("samples", "sigma", "mtbf-hours", "storage-gb-per-s", "restart-minutes"))
    assert every(wall.name in shown and wall.moves in shown for wall in walls(far))
    assert ("beyond 100 x the clients" in shown) == any(
        wall.stands >= 100 * wall.at for wall in walls(far) if wall.x == "clients"
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--clients", "0"], "--clients: 0: must be 1 or more"),
        (["--ranks", "12"], "--ranks: 12: not a whole number of hosts of 8 ranks"),
        (["--sigma", "4"], "--sigma: 4.0: must lie between 0"),
        (["--mtbf-hours", "nan"], "--mtbf-hours: nan: must be 0.01 or more"),
        (["--samples", "inf"], "--samples: inf: must be 1 or more"),
        (["--storage-gb-per-s", "0"], "--storage-gb-per-s: 0.0: must be"),
        (["--curve", "gpus", "8"], "--curve: gpus: choose one of ranks, clients, participants"),
        (["--curve", "ranks"], "--curve: ranks: no values"),
        (["--curve", "ranks", "8", "-1"], "--curve: -1: must be a whole number of ranks"),
        (["--gpu", "h2000"], "--hardware: h2000: neither a calibration file nor in the table"),
        (["--rounds", "0"], "--rounds: 0: must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(words: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        command.main(["--config", str(OLMOE), *words])
    assert "\n" not in str(error.value)


def test_what_cannot_be_simulated_is_one_line(job: Job) -> None:
    for setting, reason in (
        (Setting(clients=10**9), "--clients: 1000000000: must be at most"),
        (Setting(clients=10, participants=11), "--participants: 11: there are 10 clients"),
        (Setting(clients=10**6, participants=10**6), "--participants: 1000000 of a round: must be at most"),
    ):
        with pytest.raises(UserError, match=re.escape(reason)):
            peopled(job, setting)
    with pytest.raises(UserError, match="ep_size"):
        simulated(job, World(1, 4), clients=64)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    words = ["--nodes", "2", "--clients", "500", "--participants", "32", "--sampled", "2", "--checkpoint-every", "3"]
    assert command.main(["--config", str(OLMOE), *words, "--json", str(file), "federation.rounds=6"]) == 0
    shown, data = capsys.readouterr().out, json.loads(file.read_text())
    assert "rounds per hour: " in shown and "checkpoint.every=3: failures" in shown and "the next walls" in shown
    assert (data["ranks"], data["clients"], data["participants"], list(data["round_s"])) == (16, 500, 32, ["1", "6"])
    assert data["run_s"] > data["seed_s"] > 0 and data["checkpoint_every"] >= 1


def commands() -> list[tuple[str, str]]:
    """(command, first line of its output) of every curve of the page."""
    page = (REPOSITORY / "docs" / "simulation.md").read_text()
    return re.findall(r"```\n(python launch/simulate\.py [^\n]*--curve [^\n]*)\n\n([^\n]+)\n", page)


def test_the_curves_of_the_page_are_made_by_their_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a size that a test can afford: the columns are those of the page, with a row for each value."""
    monkeypatch.chdir(REPOSITORY)
    assert {shown.split()[shown.split().index("--curve") + 1] for shown, _ in commands()} == {
        "ranks",
        "clients",
        "participants",
    }
    for shown, header in commands():
        words = shlex.split(shown)[2:]
        at = words.index("--curve")
        values = [word for word in words[at + 2 :] if word.isdigit()]
        small = ["16", "32"] if words[at + 1] == "ranks" else ["128", "256"]
        words = [*words[: at + 2], *small, *words[at + 2 + len(values) :]]
        for name, most in (("--ranks", 32), ("--clients", 1000), ("--participants", 64)):
            if name in words:
                words[words.index(name) + 1] = str(most)
        assert command.main([*words, "--sampled", "1"]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].split() == header.split() and [line.split()[0] for line in printed[1:]] == small and len(values) >= 4


def test_a_curve_is_its_points(job: Job) -> None:
    curve = Curve.parse(["clients", "100", "200"])
    found = [simulated(job, clients=clients, participants=16) for clients in curve.values]
    assert [row["clients"] for row in curve.data(found)] == [100, 200] and set(curve.data(found)[0]) == set(figures(found[0]))
