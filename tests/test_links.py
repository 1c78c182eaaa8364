"""Symbolic links where a run, a study or a plan writes: nothing outside is written, emptied, made or removed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_compare
from federations import alone, make_config, write_inputs
from scaling_inputs import make_request, plan, record_all
from scaling_inputs import start as start_scaling
from test_compare import NOWHERE

from fedmoe_ds.bench.harness.table import check_writable, write_json
from fedmoe_ds.bench.results import suite
from fedmoe_ds.checkpoint.skipped_clients import SkippedClients
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import session
from fedmoe_ds.federation.deepspeed_tools import _PassProfile
from fedmoe_ds.planner.slurm import log_folder, submit
from fedmoe_ds.report.__main__ import main as rebuild
from fedmoe_ds.storage.files import open_plain, remove, write_whole
from fedmoe_ds.studies.compare import Request, compare
from fedmoe_ds.studies.runner import Runner
from fedmoe_ds.studies.scaling.measured import note_machine

SMALL: dict[str, Any] = {
    "federation": {"rounds": 2},
    "local": {"max_steps": 1},
    "evaluation": {"max_sequences": 2, "client_sequences": 0, "every": 2},
    "checkpoint": {"keep": 1},
    "deepspeed": {"comms_logger": {"enabled": True}},
}
RANDOM = (".draft-", ".flops-")
"""Names that nobody can foresee."""


class Writes:
    """The paths that this process writes below a folder, as the interpreter announces them."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.found: set[str] = set()
        self.then: Callable[[str], None] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, values: tuple[Any, ...]) -> None:
        if self.root is None or event not in ("open", "os.rename", "os.mkdir", "os.truncate"):
            return
        if event == "open" and not (isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        for value in values[: 2 if event == "os.rename" else 1]:
            path = os.fsdecode(value) if isinstance(value, str | bytes | os.PathLike) else ""
            if path.startswith(self.root + "/") and not any(part in path for part in RANDOM):
                self.found.add(path.removeprefix(self.root + "/"))
            if self.then is not None and path.startswith(self.root):
                self.then(path)

    @contextmanager
    def below(self, root: Path, then: Callable[[str], None] | None = None) -> Iterator[set[str]]:
        """`then` hears of every single write before it happens, and may raise."""
        self.root, self.found, self.then = str(root), set(), then
        try:
            yield self.found
        finally:
            self.root = None


@pytest.fixture(scope="module")
def writes() -> Writes:
    return Writes()


class Victims:
    """A file, a folder and a name that is free, outside; every one may be what a planted link names."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root, self.free = root, root / "free"
        self.file, self.folder = root / "file", root / "folder"
        self.file.write_text('{"event":"run"}\nhalf a line')
        for path in ("round-00001/manifest.json", ".writing-old/x", "run.sbatch", "job.lock"):
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text("somebody else's")
        self.before = self.state()

    def state(self) -> dict[str, tuple[str, int]]:
        found = sorted(path for path in self.root.rglob("*"))
        return {str(p): (p.read_text() if p.is_file() else "folder", p.lstat().st_mode) for p in found}

    def check(self, where: str) -> None:
        assert self.state() == self.before, where


def planted(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(path)
    path.symlink_to(target)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("links")
    write_inputs(root, samples=(6, 5), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    return root


def train(inputs: Path, output: Path, rounds: int = 2) -> session.Ending:
    config = make_config(inputs, "run", SMALL, {"output": str(output), "federation": {"rounds": rounds}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "build_topology", lambda config, runtime: alone()[1])
        ending = session.train(config, alone()[0], "auto", StopRequest())
    SkippedClients(output / "run", {}, []).add(1, 2)
    assert rebuild([str(output / "run")]) == 0
    return ending


def one_line(error: pytest.ExceptionInfo[BaseException] | UserError, path: Path) -> None:
    text = str(error.value if isinstance(error, pytest.ExceptionInfo) else error)
    assert "\n" not in text and ("symbolic link" in text or path.name in text), text


def sweep_run(inputs: Path, folder: Path, name: str, kind: str, rounds: int = 2) -> None:
    """A run whose folder has a link at one of the names it writes."""
    victims = Victims(folder.parent / f"{folder.name}-victims")
    path = folder / "run" / name
    planted(path, getattr(victims, kind))
    try:
        ending = train(inputs, folder, rounds)
        assert ending.exit_code == 0
    except (UserError, OSError) as error:
        assert isinstance(error, UserError) or name == "absent.jsonl", error  # `Federation` words that one
        one_line(UserError(str(error)), path)
    victims.check(f"{name} -> {kind}")


@pytest.fixture(scope="module")
def written(writes: Writes, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every name below a run folder that a run writes."""
    output = tmp_path_factory.mktemp("ordinary")
    with writes.below(output / "run") as found:
        assert train(inputs, output).exit_code == 0
    left = {str(path.relative_to(output / "run")) for path in (output / "run").rglob("*")}
    parts = {str(parent) for name in found | left for parent in Path(name).parents if str(parent) != "."}
    names = sorted(found | left | parts)
    expected = {"metrics.jsonl", "config.yaml", "report.html", "job.lock", "absent.jsonl", "comms-rank0.csv", "checkpoints"}
    assert expected <= set(names) and any(".writing-" in name for name in names), names
    return names


def test_a_run(inputs: Path, written: list[str], tmp_path: Path) -> None:
    """At every name one kind of link; all kinds at all names are in the sweep."""
    kinds = ("file", "folder", "free")
    first = [name for name in written if name.count("/") < 2 and "00002" not in name]
    for place, name in enumerate(first):
        sweep_run(inputs, tmp_path / str(place), name, kinds[place % 3], rounds=1)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["file", "folder", "free"])
def test_a_run_with_every_kind_of_link_at_every_name(inputs: Path, written: list[str], tmp_path: Path, kind: str) -> None:
    for place, name in enumerate(written):
        sweep_run(inputs, tmp_path / str(place), name, kind)


def test_the_run_folder_itself_may_be_a_link(inputs: Path, tmp_path: Path) -> None:
    """A larger disk: the usual reason for a link."""
    (tmp_path / "disk").mkdir()
    planted(tmp_path / "runs" / "run", tmp_path / "disk")
    assert train(inputs, tmp_path / "runs").exit_code == 0
    assert (tmp_path / "disk" / "checkpoints" / "round-00002" / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["file", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("folder", "free"))])
def test_a_comparison(inputs: Path, tmp_path: Path, kind: str) -> None:
    """Its lock, a run's configuration and messages, text, picture, numbers, and the copy of the report."""
    victims = Victims(tmp_path / "victims")
    keys = {
        key: value for key, value in make_config(inputs, "x").model_dump(mode="json").items() if key not in ("name", "output")
    }
    (tmp_path / "base.yaml").write_text(json.dumps(keys))
    (tmp_path / "study.yaml").write_text(test_compare.STUDY)
    (tmp_path / "docs").mkdir()
    files = (tmp_path / "base.yaml", tmp_path / "study.yaml", tmp_path / "runs")
    request = Request("flame", 1, *files, report=tmp_path / "docs" / "copy.md")
    names = [".lock", "flame-seed0.yaml", "flame-seed0.log", *(f"comparison.{end}" for end in ("md", "svg", "json"))]
    for path in [*(request.output / name for name in names), tmp_path / "docs" / "copy.md", tmp_path / "docs" / "copy.svg"]:
        planted(path, getattr(victims, kind))
        try:
            assert compare(request, NOWHERE, test_compare.environment(), test_compare.no_note)[0], "there is no command"
        except UserError as error:
            one_line(error, path)
        victims.check(str(path))
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["file", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("folder", "free"))])
def test_a_scaling_study(corpus: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, kind: str) -> None:
    victims = Victims(tmp_path / "victims")
    request = make_request(corpus, tmp_path_factory.getbasetemp() / "shapes", tmp_path)
    assert request.output is not None
    record_all(request, [(6.0, 4.0), (3.0, 3.75)])
    for path in (request.output / f"scaling.{end}" for end in ("csv", "md", "svg")):
        planted(path, getattr(victims, kind))
        assert start_scaling(replace(request, collect=True))[0] == 0
        victims.check(str(path))
    run, environ = plan(request)[0].runs[0], dict(os.environ)
    run.metrics.unlink()
    for path in (
        run.folder / ".lock",
        Path(f"{run.folder}.machine.json"),
        Path(f"{run.folder}.yaml"),
        Path(f"{run.folder}.log"),
    ):
        planted(path, getattr(victims, kind))
        try:
            Runner(NOWHERE, environ, lambda text: None, prepare=lambda run: note_machine(run, environ)).run([run])
        except UserError as error:
            one_line(error, path)
        victims.check(str(path))
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["file", "folder", "free"])
def test_what_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """`--json` of a plan or a measurement, messages of the suite, the batch script, the profile."""
    victims = Victims(tmp_path / "victims")
    path = tmp_path / "figures.json"
    planted(path, getattr(victims, kind))
    with pytest.raises(UserError, match=r"^--json: .*(symbolic link|cannot be written)"):
        check_writable(path)
    write_json({"figure": 1}, path)  # it was put there meanwhile
    victims.check("--json")
    planted(tmp_path / "wave.log", getattr(victims, kind))
    monkeypatch.setattr(suite, "SCRIPT", Path("/no/such/script"))
    with pytest.raises((UserError, OSError), match="symbolic link"):
        suite._run("wave", [], tmp_path)
    victims.check("suite")
    config: Any = SimpleNamespace(output=str(tmp_path / "runs"), name="run")
    monkeypatch.setattr("fedmoe_ds.planner.slurm.check", lambda request, environment: SimpleNamespace(config=config, notes=()))
    monkeypatch.setattr("fedmoe_ds.planner.slurm.compose", lambda *ignored: "#!/bin/bash\n")
    for place in (log_folder(config) / "run.sbatch", log_folder(config)):
        planted(place, getattr(victims, kind))
        with pytest.raises(UserError, match=r"^sbatch: not found|symbolic link"):
            submit(SimpleNamespace(), tmp_path, {"PATH": str(tmp_path)})  # type: ignore[arg-type]
        victims.check(str(place))
    model: Any = SimpleNamespace(base_model=SimpleNamespace(register_forward_pre_hook=lambda hook: None))
    monkeypatch.setattr("fedmoe_ds.federation.deepspeed_tools.FlopsProfiler", Profiler)
    planted(tmp_path / "flops.txt", getattr(victims, kind))
    _PassProfile({}, model, tmp_path).finish()
    victims.check("profile")
    assert (tmp_path / "flops.txt").read_text() == "FLOPs"


class Profiler:
    """Writes as DeepSpeed's does: through whatever is there."""

    started = True

    def __init__(self, model: Any) -> None:
        self.end_profile = lambda: None

    def print_model_profile(self, profile_step: int, output_file: str) -> None:
        Path(output_file).write_text("FLOPs")


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    """And nobody waits for the other end of a pipe."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(OSError, match="no plain file"):
            write_whole(path, "text")
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
            with pytest.raises(OSError):
                open_plain(path, flags)
    assert Path("/dev/null").is_char_device() and sorted(path.name for path in tmp_path.iterdir()) == ["pipe"]
