"""Run folder: one job at a time, a finished record that stays as it is, and a name that a failed start leaves free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federations import alone, make_config, read_events, write_inputs

from fedmoe_ds import session
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import Federation
from fedmoe_ds.folder_lock import NAME, FolderLock
from fedmoe_ds.journal import Journal
from fedmoe_ds.stop import StopRequest

SMALL: dict[str, Any] = {
    "federation": {"rounds": 2},
    "local": {"max_steps": 1},
    "evaluation": {"max_sequences": 2, "client_sequences": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    write_inputs(folder, samples=(6, 5, 4), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    return folder


@pytest.fixture(autouse=True)
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process group: these runs have one rank, inside of this process."""
    monkeypatch.setattr(session, "build_topology", lambda config, runtime: alone()[1])


def train(config: Config, resume: str = "never") -> session.Ending:
    return session.train(config, alone()[0], resume, StopRequest())


@pytest.fixture(scope="module")
def finished(root: Path) -> Config:
    """A finished run."""
    config = make_config(root, "finished", SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "build_topology", lambda config, runtime: alone()[1])
        assert train(config).exit_code == 0
    return config


def folder_of(config: Config) -> Path:
    return Path(config.output) / config.name


def content(config: Config) -> dict[str, tuple[bytes, int]]:
    """Every file of a run folder with the time of its last change; who holds the lock is no part of the record."""
    files = [path for path in folder_of(config).rglob("*") if path.is_file() and path.name != NAME]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def digest(ending: session.Ending) -> str:
    return ending.lines[-2].removeprefix("digest: ")


# What a start does, in order: at each of them a second job is tried, or the start fails.
STAGES: dict[str, tuple[Any, str]] = {
    "claim": (session, "claim_folder"),
    "groups": (session, "build_topology"),
    "loading": (session, "load_parts"),
    "tools": (session, "DeepSpeedTools"),
    "record": (session, "begin"),
    "facts": (session, "data_facts"),
    "configuration": (Journal, "config"),
    "first evaluation": (Federation, "_evaluate"),
    "first round": (Federation, "_train"),
    "checkpoint": (Federation, "_save"),
    "report": (Journal, "report"),
    "summary": (session, "summary"),
}
BEFORE_A_ROUND = list(STAGES)[: list(STAGES).index("checkpoint")]


def before(monkeypatch: pytest.MonkeyPatch, stage: str, action: Callable[[], None]) -> None:
    """Run `action` once, before the first call of a stage."""
    owner, name = STAGES[stage]
    real, left = getattr(owner, name), [action]

    def instead(*args: Any, **named: Any) -> Any:
        if left:
            left.pop()()
        return real(*args, **named)

    monkeypatch.setattr(owner, name, instead)


def test_a_second_job_is_refused_at_every_stage(
    root: Path, finished: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And leaves no trace in what the first one does."""
    config = make_config(root, "first", SMALL, {"output": str(tmp_path)})
    refused: list[str] = []

    def second() -> None:
        for resume in ("never", "auto"):
            with pytest.raises(UserError, match=rf"^name: first: .* in use by a job .*process {os.getpid()} on .*another name"):
                train(config, resume)
        refused.append("twice")

    for stage in STAGES:
        before(monkeypatch, stage, second)
    ending = train(config)
    assert len(refused) == len(STAGES)
    assert digest(ending) == read_events(folder_of(finished))[-1]["digest"]
    assert [event["event"] for event in read_events(folder_of(config))].count("run") == 1
    assert train(config, "auto").exit_code == 0, "free again"


def test_kill_9_leaves_no_lock(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from fedmoe_ds.folder_lock import FolderLock; "
        "FolderLock(Path(sys.argv[1])).take(); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {other.pid} on "):
            FolderLock(tmp_path).take()
        os.kill(other.pid, signal.SIGKILL)
    lock = FolderLock(tmp_path)
    assert (tmp_path / NAME).exists() and lock.take() == []
    lock.release()


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    (note,) = FolderLock(tmp_path).take()
    assert "has no locks" in note


NO_EFFECT: dict[str, dict[str, Any]] = {
    "federation.rounds: 1": {"federation": {"rounds": 1}},
    "--resume: evaluation.max_sequences: 1": {"evaluation": {"max_sequences": 1}},
    "--resume: evaluation.every: 2": {"evaluation": {"every": 2}},
    "--resume: evaluation.clients_every: 1": {"evaluation": {"clients_every": 1}},
    "--resume: evaluation.batch_size: 3": {"evaluation": {"batch_size": 3}},
    "--resume: checkpoint.keep: 7": {"checkpoint": {"keep": 7}},
    "--resume: execution.clients_in_flight: 1": {"execution": {"clients_in_flight": 1}},
    "--resume: deepspeed.csv_monitor": {"deepspeed": {"csv_monitor": {"enabled": True}}},
    "--resume: local.lr: 0.1": {"local": {"lr": 0.1}},
}


@pytest.mark.parametrize("line", NO_EFFECT)
def test_a_finished_run_refuses_what_has_no_effect(line: str, root: Path, finished: Config) -> None:
    kept = content(finished)
    with pytest.raises(UserError, match=f"^{line}.*use another name"):
        train(make_config(root, "finished", SMALL, NO_EFFECT[line]), "auto")
    assert content(finished) == kept


def test_a_finished_run_says_its_result_and_stays_as_it_is(root: Path, finished: Config) -> None:
    kept = content(finished)
    ending = train(make_config(root, "finished", SMALL, {"topology": {"timeout_s": 99.0}}), "auto")
    assert (ending.exit_code, digest(ending)) == (0, read_events(folder_of(finished))[-1]["digest"])
    assert content(finished) == kept


def test_a_finished_run_without_checkpoints_is_not_begun_again(root: Path, tmp_path: Path) -> None:
    config = make_config(root, "bare", SMALL, {"output": str(tmp_path), "federation": {"rounds": 1}})
    train(config)
    for path in (folder_of(config) / "checkpoints").glob("*/*"):
        path.unlink()
    kept = content(config)
    with pytest.raises(UserError, match="has finished and no intact checkpoint of it is left"):
        train(config, "auto")
    assert content(config) == kept


@pytest.mark.parametrize("stage", BEFORE_A_ROUND)
def test_a_start_that_fails_leaves_the_name_free(
    stage: str, root: Path, finished: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        raise UserError(f"{stage} failed")

    config = make_config(root, "again", SMALL, {"output": str(tmp_path)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "build_topology", lambda config, runtime: alone()[1])
        before(patch, stage, fail)
        with pytest.raises(UserError, match=f"{stage} failed"):
            train(config)
    assert session.claim_folder(folder_of(config), "never")["checkpoint"] is None
    lock = FolderLock(folder_of(config))
    assert lock.take() == []
    lock.release()
    if stage == BEFORE_A_ROUND[-1]:
        assert digest(train(config)) == read_events(folder_of(finished))[-1]["digest"]
