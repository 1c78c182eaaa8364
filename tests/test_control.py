"""The control plane in worlds of light processes: 64 ranks with 256 open files each, and one answer whatever the tree."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_world import SMALL
from every import every

from fedmoe_ds.distributed import open_files
from fedmoe_ds.errors import EXIT_LOST

LIMIT = 256
World = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Runs a world of so many ranks with so many open files which may be given rank by rank: its exit code, and what
    they have printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    program = [sys.executable, str(Path(__file__).parent / "control_world.py")]
    with subprocess.Popen(program, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def run(ranks: int, limits: int | list[int], folder: Path, dies: int | None = None) -> tuple[int, str]:
            given = [limits] if isinstance(limits, int) else limits
            stdin.write(json.dumps([ranks, given, str(folder), dies]) + "\n")
            stdin.flush()
            return int(stdout.readline()), (folder / "output").read_text()

        yield run
        stdin.close()
        assert server.wait(60) == 0


# Both are trees; the larger one takes half a minute of a busy machine.
@pytest.fixture(scope="module", params=[32, pytest.param(64, marks=pytest.mark.cluster)])
def found(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank of a large world has found."""
    folder, ranks = tmp_path_factory.mktemp("world"), int(request.param)
    code, output = world(ranks, LIMIT, folder)
    assert code == 0, output
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def check(answers: dict[str, Any], rank: int, size: int, sums: list[Any]) -> None:
    half = range(size // 2) if rank < size // 2 else range(size // 2, size)
    assert answers["place"] == [rank, size, half.index(rank), len(half)]
    assert answers["gather"] == [f"{r}!" for r in range(size)]
    assert answers["long"] == [100 * (r % 5) for r in range(size)] and answers["empty"] == [0] * size
    assert answers["broadcast"] == "from 0" and answers["broadcast long"] == 1000
    assert answers["inside"] == [str(r) for r in half] and answers["no numbers"] == []
    assert [answers[name] for name in ("sum", "disjoint", "largest")] == sums


def test_many_ranks_with_256_open_files_each(found: list[dict[str, Any]]) -> None:
    sums = [found[0]["world"][name] for name in ("sum", "disjoint", "largest")]
    for rank, here in enumerate(found):
        assert here["control"] == "TreeControl" and here["soft"] == LIMIT, "the soft limit was lower"
        check(here["world"], rank, len(found), sums)
        planned = open_files.files_of(rank, len(found), 1)
        # The halves of `answers` are gone by now; a file or two are the system's own matter.
        assert planned - 2 <= here["files"] <= planned, (rank, here["files"], planned)


def test_one_answer_whatever_the_tree(found: list[dict[str, Any]]) -> None:
    """As one group, as blocks of four, and as blocks whose last has one rank alone."""
    sums = [found[0][f"flat {SMALL}"][name] for name in ("sum", "disjoint", "largest")]
    for rank, here in enumerate(found[:SMALL]):
        flat, *trees = (here[f"flat {width}"] for width in (SMALL, 4, 1))
        assert flat["class"] == "FlatControl" and every(tree["class"] == "TreeControl" for tree in trees)
        for answers in (flat, *trees):
            check(answers, rank, SMALL, sums)


@pytest.mark.parametrize("dies", [5, 7], ids=["a head", "another"])
def test_a_rank_that_is_lost_ends_all(world: World, tmp_path: Path, dies: int) -> None:
    """Ranks that connect with it only now, too: gloo waits for it, and the watchdog knows that it is gone."""
    _, output = world(20, 1024, tmp_path, dies)
    codes = json.loads((tmp_path / "codes.json").read_text())
    assert codes == [EXIT_LOST] * dies + [-9] + [EXIT_LOST] * (19 - dies), output
    assert f"error: rank {dies} on " in output and "Traceback" not in output


# With 12 ranks rank 0 needs some 120 open files, 86 of them to meet the others, and those some 90.
@pytest.mark.parametrize(
    ("limits", "line"),
    [
        (100, r"open files: 100: rank 0 on \S+ needs \d+ in a world of 12 ranks; raise the hard limit of every host \("),
        (
            [300, 300, 60, 300, 60, 300],
            r"open files: 60: rank 2 on \S+ needs \d+ in a world of 12 ranks, 2 of which have too few; ",
        ),
        (
            80,
            r"open files: 80: rank 0 needs 86 for 12 ranks to meet, and twice as many later; raise the hard limit of every ",
        ),
    ],
    ids=["rank 0", "others", "not even for the store"],
)
def test_too_few_open_files_end_all_ranks_alike(world: World, tmp_path: Path, limits: int | list[int], line: str) -> None:
    """Nobody waits for a rank that has gone, and nobody takes it for lost: that would start the job again."""
    _, output = world(12, limits, tmp_path)
    assert json.loads((tmp_path / "codes.json").read_text()) == [2] * 12, output
    said = [text for text in output.splitlines() if "open files" in text]
    assert len(said) == 12 and every(re.search(f"^error: (rank [0-9]+ on [^ ]+: )?{line}", text) for text in said), said
    assert not list(tmp_path.glob("rank-*"))


def test_a_rank_alone_has_too_few_open_files(world: World, tmp_path: Path) -> None:
    code, output = world(1, 60, tmp_path)
    assert code == 2 and "error: open files: 60: rank 0 on " in output, output
    assert not list(tmp_path.glob("rank-*"))


def test_hosts_with_different_limits_meet(world: World, tmp_path: Path) -> None:
    """A rank that may have less than rank 0 needs for the store (104) does not need that much."""
    code, output = world(30, [300, 101], tmp_path)
    assert code == 0, output
