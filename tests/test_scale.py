"""The frame of `launch/bench.py scale`: curves are found, measured apart, and a curve that fails says why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from every import every

from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.scale import command
from fedmoe_ds.bench.scale.curve import Curve, curve_names, growth, load_curve
from fedmoe_ds.bench.scale.curves import start, start_events
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import file_sums
from fedmoe_ds.report.client_tables import MOST_LINES

ASKED = {"curves": None, "most": None, "limit": 60, "mib": 4096}


def asked(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{**ASKED, **given})


def quiet(line: str) -> None:
    pass


def code_of(rows: list[Row]) -> int:
    assert command.COMMAND.code is not None
    return command.COMMAND.code(rows)


def test_every_module_of_the_folder_is_a_curve() -> None:
    curves = [load_curve(name) for name in curve_names()]
    assert every(curve.wall and "\n" not in curve.wall and curve.x for curve in curves)


def test_growth_is_the_factor_per_doubling() -> None:
    assert growth((10, 1.0), (40, 16.0)) == pytest.approx(4.0)
    assert growth((10, 3.0), (10_000, 3.0)) == pytest.approx(1.0)
    assert growth((10, 1.0), (1_000, 100.0)) == pytest.approx(2.0)
    assert growth((10, 0.0), (20, 1.0)) is None


def test_a_curve_is_measured_in_processes_of_its_own() -> None:
    rows = command.run(asked(curves=["sampling"], most=1_000), quiet)
    assert [(row["x"], row["failed"]) for row in rows] == [(1_000, None)]
    assert rows[0]["seconds"] > 0 and rows[0]["peak_mib"] > 10 and rows[0]["figures"]["drawn"] == 10
    text = command.COMMAND.show(rows).text()
    assert "sampling (clients)" in text and "drawn 10" in text
    assert code_of(rows) == 0


def test_what_fails_is_a_line_with_its_reason_and_ends_its_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Curve:
        if name == "clients":
            raise ImportError("no such library")
        return Curve(name, "clients", (1, 2, 3), "a wall", lambda x: {})

    def run_to_end(name: str, command: list[str], timeout_s: float) -> None:
        if command[-2] == "2":
            raise RuntimeError(f"{name} ended with exit code 1:\nTraceback\nValueError: too many")
        peak = 5000.0 if "big" in name else 9.0
        Path(command[-1]).write_text(json.dumps({"seconds": 1.0, "peak_mib": peak}))

    monkeypatch.setattr(command, "curve_names", lambda: ["big", "clients", "small"])
    monkeypatch.setattr(command, "load_curve", load)
    monkeypatch.setattr(command, "run_to_end", run_to_end)
    rows = command.run(asked(), quiet)
    assert [(row["curve"], row["x"]) for row in rows] == [("big", 1), ("clients", 0), ("small", 1), ("small", 2)]
    told = command.COMMAND.show(rows).text()
    assert "5,000 MiB at its peak, more than --mib 4096" in told and "cannot be loaded: no such library" in told
    assert "ended with exit code 1: ValueError: too many" in told
    assert code_of(rows) == 1


def test_asking_for_nothing_is_refused_or_fails() -> None:
    with pytest.raises(UserError, match=r"--curves: samplin: unknown curve.*sampling"):
        command.run(asked(curves=["samplin"]), quiet)
    with pytest.raises(UserError, match=r"--limit: 0: too small"):
        command.run(asked(limit=0), quiet)
    rows = command.run(asked(curves=["sampling"], most=10), quiet)
    assert rows[0]["failed"] == "no point up to --most 10" and code_of(rows) == 1


@pytest.fixture
def small_start(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A `GiB` of 128 MiB in two files, which are as old as they must be at once."""
    monkeypatch.setattr(start, "_GIB", 2**27)
    monkeypatch.setattr(start, "_FILE", 2**26)
    monkeypatch.setattr(file_sums, "_SETTLED_NS", 0)
    return monkeypatch


def test_a_start_reads_each_byte_once_and_its_successor_pages(small_start: pytest.MonkeyPatch) -> None:
    found = start.measure(1)
    assert found["read_gib"] == pytest.approx(1.0, rel=0.05)
    assert 0 < found["second_start_read_mib"] < 0.05 * 1024 and found["seconds"] > 0


@pytest.mark.parametrize("ranks", [(3,), range(8)])
def test_a_start_that_fails_is_no_fast_one(small_start: pytest.MonkeyPatch, ranks: Sequence[int]) -> None:
    """On one rank, while the others wait for it, or on all of them at once."""

    def fails(folder: Path, place: Path, hosts: list[str], world: Any) -> str:
        if world.rank in ranks:
            raise OSError(f"rank {world.rank} cannot read")
        return str(world.gather("x"))

    small_start.setattr(start, "shared_fingerprint", fails)
    with pytest.raises(OSError, match=f"rank {min(ranks)} cannot read"):
        start.measure(1)


@pytest.mark.parametrize(("of_rank", "message"), [(str, "8 fingerprints"), (lambda rank: "same", "has read 0.0")])
def test_a_start_that_does_not_do_its_work_is_no_fast_one(
    small_start: pytest.MonkeyPatch, of_rank: Callable[[int], str], message: str
) -> None:
    small_start.setattr(start, "shared_fingerprint", lambda folder, place, hosts, world: of_rank(world.rank))
    with pytest.raises(RuntimeError, match=message):
        start.measure(1)


@pytest.mark.parametrize("clients", [MOST_LINES, MOST_LINES + 1])
def test_what_a_start_writes_down_is_what_a_start_writes(clients: int) -> None:
    """Clients are in the line where they are few, and in a table beside it where they are many."""
    found = start_events.measure(clients)
    many = clients > MOST_LINES
    assert (found["table_mib"] > 0) == many and (found["line_kib"] < 16) == many
