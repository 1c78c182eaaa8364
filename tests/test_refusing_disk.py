"""A disk that refuses: a run whose folder can no longer be written ends in one line, and what is there stays readable."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from federations import alone, make_config
from test_links import SMALL, Writes, inputs, writes

from fedmoe_ds.checkpoint import reader as checkpoint
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import session
from fedmoe_ds.report import read_metrics

__all__ = ["inputs", "writes"]


@contextmanager
def refusing(writes: Writes, root: Path, start: int, reason: int) -> Iterator[None]:
    """From this write on (counted from 0) every one below `root` fails."""
    seen = iter(range(10**6))

    def refuse(path: str) -> None:
        if next(seen) >= start:
            raise OSError(reason, os.strerror(reason), path)

    with writes.below(root, refuse):
        yield


def train(inputs: Path, output: Path) -> session.Ending:
    config = make_config(inputs, "run", SMALL, {"output": str(output)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "build_topology", lambda config, runtime: alone()[1])
        return session.train(config, alone()[0], "auto", StopRequest())


@pytest.fixture(scope="module")
def digest(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return train(inputs, tmp_path_factory.mktemp("ordinary")).lines[-2]


def check(writes: Writes, inputs: Path, output: Path, start: int, reason: int, digest: str) -> bool:
    """Whether the run was stopped by it."""
    root = output / "run"
    with refusing(writes, root, start, reason):
        try:
            ending = train(inputs, output)
        except UserError as error:
            line = str(error)
        else:
            assert ending.lines[-2] == digest, "nothing more had to be written"
            return False
    assert os.strerror(reason) in line and "\n" not in line, (start, line)
    assert line.startswith(("output: ", "checkpoint: ")) and str(output) in line, (start, line)
    if (root / "metrics.jsonl").exists():
        read_metrics(root / "metrics.jsonl")
    assert not checkpoint.newest_intact(root / "checkpoints")[1], (start, "no half of a checkpoint")
    assert train(inputs, output).lines[-2] == digest, (start, "with room it ends as ever")
    return True


@pytest.mark.parametrize(("reason", "step"), [(errno.EROFS, 9), pytest.param(errno.ENOSPC, 1, marks=pytest.mark.sweep)])
def test_a_disk_that_refuses_from_some_write_on(
    writes: Writes, inputs: Path, tmp_path: Path, digest: str, reason: int, step: int
) -> None:
    """Read-only from the beginning, or at any later moment."""
    start = 0
    while check(writes, inputs, tmp_path / str(start), start, reason, digest):
        start += step
    assert start >= 2 * step, "some writes were refused"


def test_an_output_that_is_no_folder(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output: .*file/run: cannot be written: Not a directory"):
        train(inputs, tmp_path / "file")
