"""Requeues without a newer checkpoint: when the count ends a job, and what begins it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from federations import alone, make_config, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.checkpoint.reader import Snapshot
from fedmoe_ds.distributed.stop_request import MAX_REQUEUES, StopRequest
from fedmoe_ds.errors import EXIT_STOPPED, UserError
from fedmoe_ds.federation import requeue_guard, rounds, session
from fedmoe_ds.federation.requeue_guard import FILE, RUN_FILE, RequeueGuard


def guard(folder: Path, limit: str = "3", job: str = "7") -> RequeueGuard:
    return RequeueGuard(folder, {MAX_REQUEUES: limit, "SLURM_JOB_ID": job})


def has(folder: Path, monkeypatch: pytest.MonkeyPatch, progress: tuple[int, int] | None) -> None:
    """The run folder has this checkpoint: so many rounds, so many clients of the next."""
    found = [] if progress is None else [folder / "checkpoints" / "round"]
    partial = None if progress is None or not progress[1] else {"done": dict.fromkeys(range(progress[1]))}
    monkeypatch.setattr(requeue_guard, "candidates", lambda root: found)
    monkeypatch.setattr(requeue_guard, "read_snapshot", lambda path: Snapshot((progress or (0, 0))[0], {}, 0, partial))


def stops(folder: Path, count: int, kept: str = "", job: str = "7", limit: str = "3") -> int | None:
    """The number of the stop of so many at which the job ends; None where all of them are requeued."""
    for number in range(1, count + 1):
        one = guard(folder, limit, job)
        one.begin()
        try:
            one.stopped("SIGUSR1", kept, 61.4)
        except UserError as error:
            assert str(error).startswith(f"{MAX_REQUEUES}: {limit}: the job was stopped {int(limit) + 1} times in a row ")
            assert "now by SIGUSR1 61 s after" in str(error) and "fedmoe prepare" in str(error) and "--time" in str(error)
            return number
    return None


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_one_stop_too_many_ends_the_job(limit: int, tmp_path: Path) -> None:
    assert stops(tmp_path, limit + 5, limit=str(limit)) == limit + 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_without_a_limit_nothing_is_counted(tmp_path: Path) -> None:
    for environment in ({}, {MAX_REQUEUES: "", "SLURM_JOB_ID": "7"}):
        one = RequeueGuard(tmp_path, environment)
        for _ in range(9):
            one.begin()
            one.stopped("SIGTERM", "", 1.0)
    assert not list(tmp_path.iterdir())


def test_another_job_begins_anew(tmp_path: Path) -> None:
    """Somebody has raised the limit of time, and submitted again."""
    assert stops(tmp_path, 3) is None and stops(tmp_path, 3, job="8") is None and stops(tmp_path, 9, job="8") == 1


def test_a_stop_before_the_folder_is_had_counts_for_its_own_job(tmp_path: Path) -> None:
    """Rank 0 was asked to stop while it waited for the lock, so `begin` was never called: another job's stops are no matter."""
    assert stops(tmp_path, 3) is None
    for _ in range(3):
        guard(tmp_path, job="8").stopped("SIGUSR1", "", 1.0)
    with pytest.raises(UserError, match="stopped 4 times in a row"):
        guard(tmp_path, job="8").stopped("SIGUSR1", "", 1.0)


def test_the_script_is_told_where_the_run_is(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    RequeueGuard(tmp_path / "run", {RUN_FILE: str(tmp_path / "told")}).begin()
    assert (tmp_path / "told").read_text() == f"{tmp_path / 'run'}\n" and not list((tmp_path / "run").iterdir())
    with pytest.raises(UserError, match=rf"^{RUN_FILE}: /no/such/told: cannot be written: .*; unset it$"):
        RequeueGuard(tmp_path / "run", {RUN_FILE: "/no/such/told"}).begin()


def test_kept_work_counts_only_where_it_has_come_further(tmp_path: Path) -> None:
    """Pre-training is in the cache and in no checkpoint."""
    for step in (100, 200, 300, 400, 500, 600):
        assert stops(tmp_path, 1, f"pre-training goes on after its step {step}") is None
    assert stops(tmp_path, 9, "pre-training goes on after its step 600") == 4


@settings(max_examples=60, deadline=None)
@given(progresses=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12), limit=st.integers(0, 3))
def test_only_the_newest_checkpoint_so_far_begins_the_count_anew(
    progresses: list[tuple[int, int]], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """(0, 0): no checkpoint. Older ones appear where the newest was found damaged."""
    folder = tmp_path_factory.mktemp("run")
    farthest, row, before = (0, 0), 0, (0, 0)
    for progress in progresses:
        with pytest.MonkeyPatch.context() as patch:
            has(folder, patch, None if before == (0, 0) else before)
            one = guard(folder, str(limit))
            one.begin()
            has(folder, patch, None if progress == (0, 0) else progress)
            row, farthest, before = (0, progress, progress) if progress > farthest else (row + 1, farthest, progress)
            if row > limit:
                with pytest.raises(UserError, match="without a newer checkpoint"):
                    one.stopped("SIGUSR1", "", 1.0)
                return
            one.stopped("SIGUSR1", "", 1.0)


@pytest.mark.parametrize("text", ["", "[]", '{"job": 7}', '{"job": "7", "stops": -5}', '{"job": "7", "stops": 1e99}', "\0"])
def test_a_damaged_count_begins_anew(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    assert stops(tmp_path, 9) == 4


@pytest.mark.parametrize("given", ["three", "-1", "1.5", "\u0663"])
def test_a_limit_that_is_no_number_is_refused(given: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{MAX_REQUEUES}: {given}: is no number of requeues; give 0 or more"):
        guard(tmp_path, given)


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(UserError, match=rf"^output: .*{FILE}: cannot be written: "):
        guard(tmp_path).begin()


def test_a_run_that_never_comes_to_its_first_wave_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole start, stopped while it loads, until it ends; then a job that is stopped after every wave."""
    write_inputs(tmp_path)
    waves = {"execution": {"clients_in_flight": 1}, "federation": {"rounds": 2}, "local": {"max_steps": 1}}
    config, (runtime, topology) = make_config(tmp_path, "run", waves), alone()
    monkeypatch.setattr(session, "build_topology", lambda *_: topology)
    folder = Path(config.output) / config.name
    monkeypatch.setenv(MAX_REQUEUES, "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    asked = StopRequest()
    asked.name = "SIGUSR1"
    assert session.train(config, runtime, "auto", asked).exit_code == EXIT_STOPPED
    with pytest.raises(UserError, match=r"stopped 2 times in a row without a newer checkpoint \(there is none yet\), now by "):
        session.train(config, runtime, "auto", asked)
    assert not list((folder / "checkpoints").iterdir())
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    stop, real, codes = StopRequest(), rounds.Federation._train, list[int]()

    def train(federation: rounds.Federation, work: Any) -> None:
        # Four of the six waves of the first round.
        stop.name = "SIGUSR1" if len(codes) < 4 else None
        real(federation, work)

    monkeypatch.setattr(rounds.Federation, "_train", train)
    while 0 not in codes:
        stop.name = None
        codes.append(session.train(config, runtime, "auto", stop).exit_code)
    assert codes == [EXIT_STOPPED] * 4 + [0], "one wave at a time brings a newer checkpoint each time"
