"""The frame of `launch/bench.py scale`: curves are found, measured apart, and a curve that fails says why."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from every import every

from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.bench.scale import command
from fedmoe_ds.bench.scale.curve import Curve, curve_names, growth, load_curve
from fedmoe_ds.errors import UserError

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
