"""Thirty faults: nothing hangs, nothing is lost but the round that was running, and the result is the one of a calm run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import Fault, compile_late_clock, damage_newest, draw_chains, finished_rounds, newest_round
from federations import make_config, run_alone, write_inputs
from hosts import Hosts
from hosts_start import Start
from killing import evaluations
from launching import read_events

from fedmoe_ds.checkpoint import reader as checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SEED, CHAINS, FAULTS = 20, 5, 30
ROUNDS = 9
TREE: dict[str, Any] = {
    "federation": {"rounds": ROUNDS},
    "local": {"max_steps": None, "steps": 10},
    "execution": {"clients_in_flight": 1},
    "checkpoint": {"keep": 3},
    "topology": {"silence_s": 6.0, "timeout_s": 60.0},
}


@dataclass
class Calm:
    """The run that nobody touches."""

    root: Path
    digest: str
    evaluations: list[tuple[Any, ...]]
    pace: dict[str, float]


@dataclass
class Tally:
    """What came of the faults, by kind and outcome."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: dict[tuple[str, str], float] = field(default_factory=dict)
    unsaved: Counter[tuple[str, str]] = field(default_factory=Counter)
    resumed_on: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, outcome: str, seconds: float, unsaved: int) -> None:
        self.counts[kind, outcome] += 1
        self.slowest[kind, outcome] = max(seconds, self.slowest.get((kind, outcome), 0.0))
        self.unsaved[kind, outcome] += unsaved

    def lines(self) -> list[str]:
        """A table. A round counts as not saved when its figures were out and its checkpoint was not."""
        head = f"{'fault':8} {'outcome':30} {'count':>5} {'slowest end':>12} {'rounds not saved':>17}"
        rows = [
            f"{key[0]:8} {key[1]:30} {count:5} {self.slowest[key]:10.1f} s {self.unsaved[key]:17}"
            for key, count in sorted(self.counts.items())
        ]
        on = ", ".join(f"{count} on {ranks} ranks" for ranks, count in sorted(self.resumed_on.items()))
        return [head, *rows, f"next starts: {on}"]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    root = tmp_path_factory.mktemp("calm")
    write_inputs(root)
    result = run_alone(make_config(root, "calm", TREE))
    pace = [event["phases"] for event in result.events if event["event"] == "round"][-1]
    return Calm(root, result.digest, evaluations(root / "runs" / "calm"), pace)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


@pytest.fixture(scope="module")
def late_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_late_clock(tmp_path_factory.mktemp("clock"))


def saved(run: Path) -> list[str]:
    """Names of checkpoints, newest first."""
    return [path.name for path in checkpoint.candidates(run / "checkpoints")] if (run / "checkpoints").exists() else []


def rounds_of(name: str | None) -> int:
    return 0 if name is None else int(name.split("-")[1])


class Chain:
    """One federation and what is known about it between two starts."""

    def __init__(self, calm: Calm, hosts: Hosts, late_clock: Path, number: int, folder: Path) -> None:
        self.calm, self.hosts, self.late_clock, self.folder = calm, hosts, late_clock, folder
        self.config = make_config(calm.root, f"chain-{number}", TREE).model_dump(mode="json")
        self.run = calm.root / "runs" / f"chain-{number}"
        self.draw = np.random.default_rng([SEED, number])
        self.starts = 0

    def start(self, fault: Fault) -> tuple[str, float, int]:
        """One start with its fault: the outcome, seconds until all ranks were gone, finished rounds that it cost."""
        intact, before = saved(self.run), finished_rounds(self.run)
        damaged = damage_newest(self.run, self.draw) if fault.kind == "damage" else None
        if damaged is not None:
            assert damaged == intact.pop(0)
        expected = intact[0] if intact else None
        self.starts += 1
        folder, left = self.folder / str(self.starts), ROUNDS - newest_round(self.run)
        with Start(self.hosts, self.config, folder, fault, self.late_clock, left) as start:
            if fault.last:
                digest, seconds = start.finish(), 0.0
                assert digest == self.calm.digest, f"{fault}: another digest"
            else:
                start.reach(self.calm.pace)
                start.strike()
                seconds = start.end()
            assert start.resumed_from() == expected, f"{fault}: it should have resumed from {expected}\n{start.words}"
            assert (f"checkpoint {damaged} is damaged" in start.words) == (damaged is not None), start.words
            self._check_words(start)
            left = [process for host in range(1, self.hosts.count + 1) for process in self.hosts.processes(host)]
            assert not left, f"{fault}: outlived its job: {left}"
        return self._outcome(fault), seconds, self._lost(fault, before, rounds_of(expected))

    def _check_words(self, start: Start) -> None:
        """The reason is one line that names the rank."""
        fault = start.fault
        said = [line for line in start.words.splitlines() if line.startswith("error: ")]
        if fault.kind in ("kill", "stop", "link") and fault.ranks > 1:
            named = f"error: rank {fault.rank} on {self.hosts.name(fault.rank + 1)} "
            assert any(line.startswith(named) and "(last heard in round " in line for line in said), start.words
        elif fault.kind == "disk":
            assert len(said) == 1 and "cannot write" in said[0] and "Traceback" not in start.words, start.words
        else:
            assert not said, start.words

    def _outcome(self, fault: Fault) -> str:
        if fault.last:
            return "survived, run finished"
        return "survived, stopped when asked" if fault.kind in ("clock", "damage") else "ended by itself, resumed"

    def _lost(self, fault: Fault, before: dict[int, dict[str, Any]], resumed: int) -> int:
        """Check that every round that was saved stands as it was written; how many were finished and not saved."""
        after = finished_rounds(self.run)
        for index in range(1, resumed + 1):
            assert after[index] == before[index], f"{fault}: round {index} was trained again"
        finished, kept = max(after, default=0), rounds_of(next(iter(saved(self.run)), None))
        assert finished - kept <= 1, f"{fault}: {finished} rounds were finished, {kept} are saved"
        return finished - kept


@pytest.mark.parametrize("number", range(CHAINS))
def test_chain(number: int, calm: Calm, hosts: Hosts, late_clock: Path, tally: Tally, tmp_path: Path) -> None:
    chain = Chain(calm, hosts, late_clock, number, tmp_path)
    before = None
    for fault in draw_chains(SEED, CHAINS)[number]:
        tally.add(fault.kind, *chain.start(fault))
        if before is not None:
            tally.resumed_on["fewer" if fault.ranks < before else "more" if fault.ranks > before else "as many"] += 1
        before = fault.ranks
    assert evaluations(chain.run) == calm.evaluations
    assert sorted(finished_rounds(chain.run)) == list(range(1, ROUNDS + 1))
    assert len(read_events(chain.run, "end")) == 1


def test_the_campaign_is_complete(tally: Tally, capsys: pytest.CaptureFixture[str]) -> None:
    """Says what came of the faults; runs after the chains."""
    with capsys.disabled():
        print("\n" + "\n".join(tally.lines()))
    assert sum(tally.counts.values()) == FAULTS
    assert set(tally.resumed_on) == {"fewer", "as many", "more"}
    assert {kind for kind, _ in tally.counts} == {"kill", "stop", "link", "disk", "clock", "damage"}
