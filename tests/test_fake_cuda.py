"""On the stand-in for CUDA (tests/fake_cuda/): every case of tests/fake_cuda/cases/ is one test here.

The stand-in must be there before torch is, so cases run in processes of their own: one for all topics of a single rank, and
one for each rank of a topic that says `RANKS = n`. A process tells each case as it ends, and tests are served in that order.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cuda.library import compiler

FOLDER = Path(__file__).parent / "fake_cuda"
Case = tuple[str, str]

pytestmark = pytest.mark.skipif(compiler() is None, reason="the stand-in for CUDA is compiled with g++, which is not there")


def topics() -> dict[str, tuple[int, list[str]]]:
    """Ranks and cases of every topic, read without importing it: its module needs the stand-in."""
    found = {}
    for path in sorted((FOLDER / "cases").glob("[a-z]*.py")):
        body = ast.parse(path.read_text()).body
        names = [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")]
        ranks = [node.value.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RANKS"]
        found[path.stem] = (ranks[0] if ranks else 1, names)
    return found


TOPICS = topics()
CASES: list[Case] = [(topic, name) for topic, (_, names) in TOPICS.items() for name in names]


class Cases:
    """Cases that run one after the other in one process per rank; what ends without having told a case is started once more."""

    def __init__(self, cases: list[Case], ranks: int, folder: Path) -> None:
        self.left, self.ranks, self.folder = list(cases), ranks, folder
        self.found: dict[Case, list[dict[str, Any]]] = {}
        self.processes: list[subprocess.Popen[str]] = []
        self.starts = itertools.count()

    def lines(self, case: Case) -> list[dict[str, Any]]:
        """What every rank says of a case."""
        while case not in self.found:
            if not self.processes:
                self._start()
            told = [self._next(process) for process in self.processes]
            here = self.left.pop(0)
            if None in told:  # a process has ended, or speaks of something else: this case has not been told
                self.end()
                told = [line or {"ok": False, "error": self._last_words(rank)} for rank, line in enumerate(told)]
            self.found[here] = told  # type: ignore[assignment]
        return self.found[case]

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.start = next(self.starts)
        wanted = [f"{topic}::{name}" for topic, name in self.left]
        for rank in range(self.ranks):
            world = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": self.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            environment |= {name: str(value) for name, value in world.items()} if self.ranks > 1 else {}
            with self._words(rank).open("w") as words:
                command = [sys.executable, str(FOLDER / "run.py"), *wanted]
                made = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True, env=environment)
            self.processes.append(made)

    def _next(self, process: subprocess.Popen[str]) -> dict[str, Any] | None:
        assert process.stdout is not None
        for text in process.stdout:
            line = json.loads(text) if text.startswith('{"topic"') else None  # else: what the package prints
            if line is not None:
                return line if (line["topic"], line["case"]) == self.left[0] else None
        return None

    def _words(self, rank: int) -> Path:
        return self.folder / f"{self.start}-{rank}.txt"

    def _last_words(self, rank: int) -> str:
        return "the process ended without telling this case:\n" + self._words(rank).read_text()[-3000:]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes = []


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Cases]]:
    """By topic, the processes that run what is selected of it."""
    selected = [item.callspec.params["case"] for item in request.session.items if "case" in getattr(item, "fixturenames", ())]
    alone = [case for case in CASES if case in selected and TOPICS[case[0]][0] == 1]
    found = dict.fromkeys(TOPICS, Cases(alone, 1, tmp_path_factory.mktemp("alone")))
    for topic, (ranks, _) in TOPICS.items():
        if ranks > 1:
            mine = [case for case in CASES if case in selected and case[0] == topic]
            found[topic] = Cases(mine, ranks, tmp_path_factory.mktemp(topic))
    yield found
    for cases in found.values():
        cases.end()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1].removeprefix('case_')}")
def test_on_the_stand_in(case: Case, outcomes: dict[str, Cases]) -> None:
    lines = outcomes[case[0]].lines(case)
    assert len(lines) == TOPICS[case[0]][0]
    for rank, line in enumerate(lines):
        assert line["ok"], f"rank {rank}: {line['error']}"
