"""On the stand-in for CUDA (tests/fake_cuda/): every case of tests/fake_cuda/cases/ is one test here.

The stand-in must be there before torch is, so cases run in processes of their own: one for all topics of a single rank, and one
for each rank of a topic that says `RANKS = n`. A process tells each case as it ends, and tests are served in that order.
"""

from __future__ import annotations

import ast
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cuda.ceilings import CEILINGS
from fake_cuda.library import compiler

FOLDER = Path(__file__).parent / "fake_cuda"
DEVICES = 2
"""Visible to a process without peers; each rank of several sees one, which is its own."""
LIMIT_S = 240.0
Case = tuple[str, str]

pytestmark = pytest.mark.skipif(compiler() is None, reason="the stand-in for CUDA is compiled with g++, which is not there")


class Topic:
    """A module of cases, read without importing it: that needs the stand-in.

    Its constants are literals: `RANKS`, processes (1); `NAMES`, by function the names for each of which it is one case;
    `ENDS`, by function the exit codes of the ranks where it ends them.
    """

    def __init__(self, path: Path) -> None:
        body = ast.parse(path.read_text()).body
        found: dict[str, Any] = {"RANKS": 1, "NAMES": {}, "ENDS": {}}
        for node in body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
                if name in found:
                    found[name] = ast.literal_eval(node.value)
        functions = [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")]
        self.ranks, self.ends, self.cases = found["RANKS"], found["ENDS"], list[str]()
        for name in functions:
            self.cases += [f"{name}[{given}]" for given in found["NAMES"][name]] if name in found["NAMES"] else [name]
        assert self.cases and found["NAMES"].keys() | self.ends.keys() <= set(functions), path


TOPICS = {path.stem: Topic(path) for path in sorted((FOLDER / "cases").glob("[a-z]*.py"))}
CASES: list[Case] = [(topic, name) for topic, found in TOPICS.items() for name in found.cases]


class Rank:
    """One process that runs cases. It tells a line for each, then nothing any more."""

    def __init__(self, wanted: list[str], environment: dict[str, str], words: Path) -> None:
        self.words, self.lines = words, queue.Queue[dict[str, Any] | None]()
        with words.open("w") as stream:
            command = [sys.executable, str(FOLDER / "run.py"), *wanted]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            if text.startswith('{"topic"'):  # else something that the package prints
                self.lines.put(json.loads(text))
        self.lines.put(None)

    def told(self, case: Case, limit_s: float) -> dict[str, Any]:
        """The line of a case; what is known where there is none within the limit."""
        try:
            line = self.lines.get(timeout=limit_s)
        except queue.Empty:
            line = None
        if line is not None and (line["topic"], line["case"]) == case:
            return line
        reason = "has ended, or still runs, without having told this case"
        return {"ok": False, "error": f"{reason}:\n{self.words.read_text()[-3000:]}", "mute": True}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Cases:
    """Cases that run one after the other on the same ranks; where a rank fell silent, what is left runs on new ones."""

    def __init__(self, cases: list[Case], ranks: int, folder: Path) -> None:
        self.left, self.count, self.folder = list(cases), ranks, folder
        self.found: dict[Case, list[dict[str, Any]]] = {}
        self.ranks: list[Rank] = []
        self.starts = 0

    def lines(self, case: Case) -> list[dict[str, Any]]:
        """What every rank says of a case."""
        while case not in self.found:
            if not self.ranks:
                self._start()
            here = self.left.pop(0)
            ends = TOPICS[here[0]].ends.get(here[1])
            self.found[here] = self._told(here) if ends is None else self._ended(ends)
            if ends is not None or any("mute" in line for line in self.found[here]):
                self.end()
        return self.found[case]

    def _told(self, case: Case) -> list[dict[str, Any]]:
        """A rank that has failed does not meet the others any more: they are not waited for."""
        lines: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + LIMIT_S
        while len(lines) < self.count:
            failed = any(not line["ok"] for line in lines.values())
            for rank in set(range(self.count)) - set(lines):
                if failed or not self.ranks[rank].lines.empty() or time.monotonic() > deadline or self.count == 1:
                    lines[rank] = self.ranks[rank].told(case, 5.0 if self.count > 1 else LIMIT_S)
            time.sleep(0.01)
        return [lines[rank] for rank in range(self.count)]

    def _ended(self, codes: list[int]) -> list[dict[str, Any]]:
        """How every rank has ended, beside how it was meant to."""
        lines = []
        for rank, code in zip(self.ranks, codes, strict=True):
            try:
                found: int | None = rank.process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                found = None
            lines.append({"ok": found == code, "error": f"exit code {found}, not {code}:\n{rank.words.read_text()[-3000:]}"})
        return lines

    def _start(self) -> None:
        wanted, self.starts = [f"{topic}::{name}" for topic, name in self.left], self.starts + 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.count):
            environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "FAKE_DEVICES": str(DEVICES)}
            if self.count > 1:
                # As `srun --gpus-per-task=1` starts them: each sees one device, its own.
                del environment["DS_ACCELERATOR"]
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.count)}
                environment |= {"LOCAL_SIZE": str(self.count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                environment |= {
                    "FAKE_FOLDER": str(self.folder / "inputs"),
                    "FAKE_DEVICES": "1",
                    "FAKE_GPU": str(rank),
                    "CUDA_VISIBLE_DEVICES": str(rank),
                }
            self.ranks.append(Rank(wanted, environment, self.folder / f"{self.starts}-{rank}.txt"))

    def end(self) -> None:
        for rank in self.ranks:
            rank.end()
        self.ranks = []


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Cases]]:
    """By topic, the processes that run what is selected of it."""
    chosen = {
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    alone = [case for case in CASES if case in chosen and TOPICS[case[0]].ranks == 1]
    found = dict.fromkeys(TOPICS, Cases(alone, 1, tmp_path_factory.mktemp("alone")))
    for name, topic in TOPICS.items():
        if topic.ranks > 1:
            mine = [case for case in CASES if case in chosen and case[0] == name]
            found[name] = Cases(mine, topic.ranks, tmp_path_factory.mktemp(name))
    yield found
    for cases in found.values():
        cases.end()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1].removeprefix('case_')}")
def test_on_the_stand_in(case: Case, outcomes: dict[str, Cases]) -> None:
    lines = outcomes[case[0]].lines(case)
    assert len(lines) == TOPICS[case[0]].ranks
    for rank, line in enumerate(lines):
        assert line["ok"], f"rank {rank}: {line['error']}"


def test_the_page_has_the_ceilings() -> None:
    """docs/cuda.md repeats what is held: a ceiling that moves moves there, too."""
    page = (FOLDER.parents[1] / "docs/cuda.md").read_text()
    rows = [line for line in page.split("| figure | ceiling |\n|---|---|\n")[1].splitlines() if line.startswith("|")]
    assert rows[: len(CEILINGS)] == [f"| {name} | {ceiling:,} |" for name, ceiling in CEILINGS.items()]
