"""Run folder: one job at a time, a finished record that stays as it is, and a name that a failed start leaves free."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federations import alone, make_config, read_events, write_inputs

from fedmoe_ds.config import Config
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import session
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.round_checkpoints import RoundCheckpoints
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.report import MetricsLog
from fedmoe_ds.storage import folder_lock
from fedmoe_ds.storage.folder_lock import NAME, FolderLock

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
    "monitors": (session, "start_monitors"),
    "record": (session, "begin"),
    "facts": (session, "data_facts"),
    "configuration": (Journal, "config"),
    "first evaluation": (Federation, "_evaluate"),
    "first round": (Federation, "_train"),
    "checkpoint": (RoundCheckpoints, "save"),
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
        "import sys, time; from pathlib import Path; from fedmoe_ds.storage.folder_lock import FolderLock; "
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


# Locks that each host keeps to itself.


class Host:
    """Starts on one host of several, on a file system whose locks stop nobody on another."""

    def __init__(self, patch: pytest.MonkeyPatch, locks: str) -> None:
        self.patch, self.locks = patch, locks
        patch.setattr(folder_lock, "BEAT_S", 0.02)
        patch.setattr(folder_lock, "PATIENCE_S", 0.3)
        patch.setattr(folder_lock, "_LOOK_S", 0.01)
        patch.setattr("fcntl.flock", self.flock)

    def flock(self, handle: int, how: int) -> None:
        if self.locks == "none":
            raise OSError(95, "Operation not supported")

    def lock(self, folder: Path, host: str) -> FolderLock:
        self.patch.setattr(folder_lock, "boot", lambda: f"boot of {host}")
        self.patch.setattr("socket.gethostname", lambda: host)
        return FolderLock(folder)


@pytest.fixture(params=["per host", "none"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch, request.param)


def test_a_holder_on_another_host_keeps_the_folder(tmp_path: Path, host: Host) -> None:
    first, second = host.lock(tmp_path, "n1"), host.lock(tmp_path, "n2")
    first.take()
    for _ in range(3):
        with pytest.raises(UserError, match=rf"in use by a job .*process {os.getpid()} on n1, since "):
            second.take()
    first.confirm()
    first.release()
    second = host.lock(tmp_path, "n2")
    assert not any("taking over" in line for line in second.take()), "it said that it left: nobody waits"
    second.release()
    first.release()


def test_a_dead_holder_on_another_host_is_taken_over(tmp_path: Path, host: Host) -> None:
    first = host.lock(tmp_path, "n1")
    first.take()
    first._left.set()  # the thread ends with its process; nothing says that the holder has left
    second = host.lock(tmp_path, "n2")
    last = second.take()[-1]
    assert last.startswith(f"process {os.getpid()} on n1, since ") and last.endswith("taking over")
    with pytest.raises(UserError, match=r"process .* on n2"):
        first.confirm()
    first.release()
    second.confirm()
    third = host.lock(tmp_path, "n3")
    with pytest.raises(UserError, match="on n2"):
        third.take()
    second.release()


def test_two_starts_in_the_same_moment(tmp_path: Path, host: Host) -> None:
    """Each finds the folder free before the other has written its name: whoever wrote last has it."""
    locks = [host.lock(tmp_path, f"n{number}") for number in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_lock, "_read", lambda path: {})
        for lock in locks:
            lock.take()
    with pytest.raises(UserError, match=r"in use by a job .* on n1"):
        locks[0].confirm()
    locks[1].confirm()
    for lock in locks:
        lock.release()
    assert "left" in json.loads((tmp_path / NAME).read_text())


@pytest.mark.parametrize(
    "said",
    [
        "",
        "{",
        "[]",
        "null",
        '{"process": {}, "host": "x", "boot": 7}',
        '{"since": 1e300, "process": 1, "host": "a"}',
        "\\ud800" * 9,
    ],
)
def test_whatever_the_file_says_a_lock_is_taken(tmp_path: Path, said: str, host: Host) -> None:
    """By a dead holder of another version, a full disk, or somebody else."""
    (tmp_path / NAME).write_text(said)
    lock = host.lock(tmp_path, "n1")
    lock.take()
    lock.confirm()
    assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid(), "it names us now, and nothing else"
    lock.release()


def test_a_record_of_yesterdays_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names process and host alone: on this host the lock decides, and nobody waits."""
    (tmp_path / NAME).write_text(json.dumps({"process": 1, "host": socket.gethostname(), "since": 1700000000}) + "\n")
    lock = FolderLock(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits for signs of life"))
    assert lock.take() == []
    lock.release()


@pytest.mark.parametrize("stage", ["first round", "checkpoint", "report"])
def test_two_jobs_that_nothing_keeps_apart(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str) -> None:
    """The second one truncates the record of the first, which must not end as if nothing had happened."""
    config = make_config(root, "shared", SMALL, {"output": str(tmp_path), "federation": {"rounds": 3}})
    monkeypatch.setattr(FolderLock, "take", lambda self: [])
    before(monkeypatch, stage, lambda: seconds.append(train(config, "auto")))
    seconds: list[session.Ending] = []
    try:
        first = train(config, "auto").exit_code
    except UserError as error:
        assert "another process writes to it" in str(error) and "--resume auto" in str(error)
        first = 2
    (second,) = seconds
    rounds = [event["round"] for event in read_events(folder_of(config)) if event["event"] == "round"]
    assert second.exit_code == 0 and rounds == [1, 2, 3], "the record is that of a whole run"
    assert first == (2 if stage != "report" else 0), "it has ended before the second began"


@pytest.mark.parametrize("change", ["append", "cut", "remove", "replace", "empty"])
def test_a_record_that_somebody_else_writes_to(tmp_path: Path, change: str) -> None:
    path = tmp_path / "metrics.jsonl"
    changes = {
        "append": lambda: path.write_text(path.read_text() + '{"event":"x"}\n'),
        "cut": lambda: os.truncate(path, 5),
        "remove": path.unlink,
        "replace": lambda: (path.unlink(), path.write_text("")),
        "empty": lambda: path.write_text(""),
    }
    with MetricsLog(path) as log:
        log.write("run")
        log.write("round", round=1)
        changes[change]()
        kept = path.read_bytes() if path.exists() else None
        for action in (lambda: log.write("round", round=2), log.position, lambda: log.truncate(0)):
            with pytest.raises(UserError, match=r"metrics\.jsonl: .*another process writes to it"):
                action()
    assert (path.read_bytes() if path.exists() else None) == kept, "nothing more is written"


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


def test_a_trained_record_is_not_dropped_for_damage(root: Path, tmp_path: Path) -> None:
    """Checkpoints share files of clients, so one bad block may be in all of them: the record stays until its owner decides."""
    rounds = {"federation": {"rounds": 2}, "checkpoint": {"keep": 2}}
    config = make_config(root, "shared", SMALL, {"output": str(tmp_path), "method": {"name": "fedsa-lora"}}, rounds)
    train(config)
    folder = folder_of(config)
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if json.loads(line)["event"] != "end"]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    # What everybody begins with is written once, and linked from then on.
    (shared,) = (folder / "checkpoints" / "round-00002").glob("personal-00000-*")
    assert shared.stat().st_nlink == 2
    with shared.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    kept = content(config)
    with pytest.raises(UserError, match=rf"^--resume: .*round-00002 is damaged \({shared.name} .*\) and 1 older; put .* back"):
        train(config, "auto")
    assert content(config) == kept
    shutil.rmtree(folder / "checkpoints")
    assert train(config, "auto").exit_code == 0


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
