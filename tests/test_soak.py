"""Soak: twenty kills of a random rank at a random moment, every resume on a random topology, always the same digest."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import PHASES, START, Topology, assert_same, draw_aim, kill_a_rank, several_waves, start
from launching import changed, read_events

KILLS, MOST = 20, 60
"""Kills that are wanted; and with which the soak gives up hitting every phase and every topology."""
TOPOLOGIES: list[Topology] = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]


def by(kills: Counter[tuple[str, str]], part: int) -> Counter[str]:
    """Kills by topology (0) or by phase (1)."""
    found: Counter[str] = Counter()
    for key, count in kills.items():
        found[key[part]] += count
    return found


def wanted(kills: Counter[tuple[str, str]]) -> bool:
    """Whether another kill is: twenty, and every phase and every topology at least once."""
    covered = len(by(kills, 0)) == len(TOPOLOGIES) and len(by(kills, 1)) == len((START, *PHASES))
    return kills.total() < KILLS or (not covered and kills.total() < MOST)


def test_twenty_kills(nano: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = changed(several_waves(nano), federation={"rounds": 5})
    alone = changed(config, output=str(tmp_path / "undisturbed"))
    with start(alone, tmp_path, (1, 1), ()) as job:
        undisturbed = job.finish()
    pace = read_events(undisturbed.folder, "round")[-1]["phases"]
    draw = np.random.default_rng(0)
    kills: Counter[tuple[str, str]] = Counter()
    resumed: Counter[str] = Counter()
    runs = starts = 0
    while wanted(kills):
        # A run that ends before the moment of its kill came is compared too, and the next one begins.
        disturbed = changed(config, output=str(tmp_path / f"disturbed-{runs}"))
        ended = False
        while not ended:
            topology = TOPOLOGIES[int(draw.integers(len(TOPOLOGIES)))]
            aim = draw_aim(draw, 3, (START, *PHASES)) if wanted(kills) else None
            with start(disturbed, tmp_path, topology, aim=aim) as job:
                killed = aim is not None and kill_a_rank(job, aim, pace, int(draw.integers(8)))
                result = job.finish()
            starts += 1
            resumed.update(re.findall(r"resumed from (\S+)", result.stderr))
            ended = result.code == 0
            if aim is not None and killed:
                kills[f"{topology[0]}x{topology[1]}", aim.phase] += 1
            assert ended != killed, f"{topology} failed by itself\n{result.stdout}\n{result.stderr}"
        assert_same(result, undisturbed)
        runs += 1
    by_topology, by_phase = by(kills, 0), by(kills, 1)
    with capsys.disabled():
        print(f"\n{kills.total()} kills in {runs} runs ({starts} starts): {dict(by_phase)}, {dict(by_topology)}")
        print(f"resumed from {dict(resumed)}; digest {undisturbed.digest} every time")
    assert set(by_phase) == {START, *PHASES} and len(by_topology) == len(TOPOLOGIES), (by_phase, by_topology)
    assert sum(resumed.values()) > 0, "no start ever resumed"
