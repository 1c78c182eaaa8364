"""Resume: a run that was killed, stopped or damaged ends with the bits of the run that was left alone, on any topology."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killing import PHASES, Aim, Topology, assert_same, go_on, kill_a_rank, reach, several_waves, start
from launching import Result, changed, read_events

from fedmoe_ds.checkpoint import reader as checkpoint
from fedmoe_ds.errors import EXIT_STOPPED

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def undisturbed(nano: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The run that nobody touched."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with start(changed(several_waves(nano), output=str(folder)), folder, (1, 1), ()) as job:
        result = job.finish()
    assert result.digest
    return result


@pytest.fixture
def config(nano: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return changed(several_waves(nano), output=str(tmp_path))


def pace(undisturbed: Result) -> dict[str, float]:
    phases: dict[str, float] = read_events(undisturbed.folder, "round")[-1]["phases"]
    return phases


def newest(folder: Path) -> Path:
    """The newest checkpoint, which is intact."""
    found = checkpoint.candidates(folder / "checkpoints")[0]
    assert checkpoint.find_damage(found) is None
    return found


KILLS: list[tuple[Topology, Aim, int]] = [
    ((1, 1), Aim("checkpoint", rounds=1, place=0.4), 0),
    ((2, 1), Aim("evaluation", rounds=0, place=0.4), 0),
    ((1, 2), Aim("training", rounds=1, place=0.4), 1),
]
"""A topology, a moment, and who is killed then. The first start saves a round, from which the others go on."""


@pytest.mark.cluster
def test_three_kills(undisturbed: Result, config: dict[str, Any], tmp_path: Path) -> None:
    assert {aim.phase for _, aim, _ in KILLS} == set(PHASES)
    for number, (topology, aim, which) in enumerate(KILLS):
        with start(config, tmp_path, topology, aim=aim) as job:
            assert kill_a_rank(job, aim, pace(undisturbed), which)
            result = job.finish()
        assert result.code != 0, result.stdout
        if topology != (1, 1):  # the ranks that are left say which one is gone, and nothing else
            assert any(re.match(r"error: rank \d on \S+ died \(last heard in round \d, ", line) for line in result.errors)
            assert "Traceback" not in result.stderr
        assert ("resumed from round-00001" in result.stderr) == (number > 0), result.stderr
        assert not read_events(result.folder, "end")
    with start(config, tmp_path, (1, 1)) as job:
        result = job.finish()
    assert_same(result, undisturbed)
    assert newest(result.folder).name == "round-00003"


def assert_stopped(result: Result, name: str) -> None:
    assert result.code == EXIT_STOPPED, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "--resume auto" in line]
    assert line.startswith(f"stopped by {name} with a checkpoint")
    assert f"digest: {result.digest}" in result.stdout.splitlines()


@pytest.mark.cluster
def test_sigterm_in_the_middle_of_a_round(undisturbed: Result, config: dict[str, Any], tmp_path: Path) -> None:
    aim = Aim("training", rounds=1, place=0.15)  # of the time that one rank takes for all clients
    with start(config, tmp_path, (2, 1), aim=aim) as job:
        assert reach(job, aim, pace(undisturbed))
        job.signal_ranks(signal.SIGTERM)
        go_on(job)
        stopped = job.finish()
    assert_stopped(stopped, "SIGTERM")
    assert newest(stopped.folder).name == "round-00001-partial"
    with start(config, tmp_path, (1, 2)) as job:
        result = job.finish()
    assert_same(result, undisturbed)
    assert "resumed from round-00001-partial" in result.stderr


@pytest.mark.cluster
def test_sigusr1_at_the_beginning_and_during_evaluation(undisturbed: Result, config: dict[str, Any], tmp_path: Path) -> None:
    with start(config, tmp_path, (1, 1)) as job:
        assert job.wait_until(lambda: job.events("run"))
        job.signal_ranks(signal.SIGUSR1)
        stopped = job.finish()
    assert_stopped(stopped, "SIGUSR1")
    assert newest(stopped.folder).name.startswith("round-00000")
    # Nothing but the stop itself asks for this checkpoint; and how one is written is no part of a run's identity.
    rare = changed(config, checkpoint={"every": 9, "background": False})
    aim = Aim("evaluation", rounds=0, place=0.3)
    with start(rare, tmp_path, (1, 1), aim=aim) as job:
        assert reach(job, aim, pace(undisturbed))
        job.signal_ranks(signal.SIGUSR1)
        go_on(job)
        stopped = job.finish()
    assert_stopped(stopped, "SIGUSR1")
    # Struck at the very end of the evaluation, the round after it is the one that is stopped; the stop alone has saved either.
    assert newest(stopped.folder).name in ("round-00001", "round-00001-partial")
    with start(config, tmp_path, (2, 1)) as job:
        assert_same(job.finish(), undisturbed)


def flip_bytes(path: Path) -> str:
    (file,) = path.glob("adapters-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-200:-196] = bytes(255 - value for value in content[-200:-196])
    file.write_bytes(content)
    return f"{file.name} does not match its checksum"


def truncate_manifest(path: Path) -> str:
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes()[:100])
    return "manifest.json is missing or unreadable"


@pytest.mark.parametrize("damage", [flip_bytes, truncate_manifest])
def test_a_damaged_checkpoint(
    damage: Callable[[Path], str], undisturbed: Result, config: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(undisturbed.folder, tmp_path / "nano")
    what = damage(tmp_path / "nano" / "checkpoints" / "round-00003")
    with start(config, tmp_path, (1, 1)) as job:
        result = job.finish()
    assert f"checkpoint round-00003 is damaged ({what})" in result.stderr
    assert "resumed from round-00002" in result.stderr
    assert_same(result, undisturbed)
    assert newest(result.folder).name == "round-00003"


def test_the_newest_checkpoints_are_kept(undisturbed: Result) -> None:
    kept = sorted(path.name for path in (undisturbed.folder / "checkpoints").iterdir())
    assert kept == ["round-00002", "round-00003"]
