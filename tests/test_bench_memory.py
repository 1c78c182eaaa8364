"""The memory benchmark: its arithmetic and verdicts, bad input, and the real command on the smallest shapes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from every import every

from fedmoe_ds.bench.harness.shapes import SHAPES, write_model
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.memory.clients import slope
from fedmoe_ds.bench.memory.command import COMMAND, PARTS
from fedmoe_ds.bench.memory.one_system import counted
from fedmoe_ds.bench.memory.rounds import finished_rounds, is_flat
from fedmoe_ds.errors import UserError

BENCH = Path(__file__).parents[1] / "launch" / "bench.py"
ASKED: dict[str, Any] = {
    "parts": list(PARTS),
    "shape": "tiny",
    "mode": "both",
    "peers": ["eager"],
    "clients": [1, 3],
    "sequences": 2,
    "length": 24,
    "rounds": 40,
    "host_shape": "load-tiny",
    "seed": 0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ["client"]}, "--parts: client: unknown part; did you mean 'clients'"),
        ({"shape": "e33"}, "--shape: e33"),
        ({"host_shape": "loads"}, "--shape: loads"),
        ({"clients": [4, 4]}, "--clients: 4: one number gives no slope"),
        ({"clients": [0, 4]}, "--clients: 0: too small"),
        ({"rounds": 39}, "--rounds: 39: memory settles in 20 of them; use 40 or more"),
        ({"mode": "slow"}, "--mode: slow"),
        ({"peers": ["eger"]}, "--peers: eger"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        COMMAND.run(argparse.Namespace(**{**ASKED, **change}), lambda text: None)
    assert "\n" not in str(caught.value)


def test_slope_and_verdict() -> None:
    assert slope({1: 10.0, 2: 13.0, 4: 19.0}) == pytest.approx(3.0)
    assert slope({1: 10.0}) is None
    assert is_flat(4.9, 600.0) and is_flat(-1.0, 600.0)
    assert not is_flat(5.1, 600.0)  # under one per cent, but over five MiB
    assert not is_flat(4.9, 400.0)


def test_finished_rounds(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert finished_rounds(log) == 0
    log.write_text('{"event":"round","round":1}\n{"event":"client","round":1}\n{"event":"round","round":2}\n')
    assert finished_rounds(log) == 2


@pytest.mark.parametrize("bitwise", [False, True])
def test_count_of_a_client(tmp_path: Path, bitwise: bool) -> None:
    shape = SHAPES["tiny"]
    write_model(shape, 0, tmp_path)
    workload = Workload(shape, steps=1, sequences=2, length=24, seed=0, caps=(8,))
    expert = shape.experts * workload.rank * (shape.hidden + 2 * shape.ffn + shape.ffn + shape.hidden)
    attention = len(workload.attention) * workload.rank * 2 * shape.hidden
    numbers = shape.layers * (expert + attention)
    found = counted(tmp_path, workload, bitwise)
    assert found["adapters"] == found["gradients"] == pytest.approx(numbers * 4 / 2**20)
    assert found["moments"] == pytest.approx(2 * numbers * 4 / 2**20)
    assert found["activations"] > 0  # a pass of this family holds all clients, in bitwise mode too
    half = counted(tmp_path, replace(workload, moments="bfloat16"), bitwise)
    assert half == {**found, "moments": found["moments"] / 2}


@pytest.mark.cluster
def test_the_command(tmp_path: Path) -> None:
    target = tmp_path / "memory.json"
    words = ["--shape", "tiny", "--clients", "1", "3", "--mode", "both", "--peers", "grouped_mm", "--length", "24"]
    words += ["--rounds", "40", "--host-shape", "load-tiny", "--json", str(target)]
    done = subprocess.run([sys.executable, str(BENCH), "memory", *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["rows"]
    clients = [row for row in rows if row["part"] == "clients"]
    ours = [name for name in ("fedmoe_ds", "fedmoe_ds bitwise", "fedmoe_ds bf16 moments") for _ in range(2)]
    assert [row["system"] for row in clients] == [*ours, "peft grouped_mm"] and clients[-1]["slope_mib"] is None
    assert [row["clients"] for row in clients] == [1, 3, 1, 3, 1, 3, 1]
    assert every(row["peak_mib"] >= row["resident_mib"] > 50 and row["peak_mib"] >= row["loaded_mib"] for row in clients)
    (run,) = [row for row in rows if row["part"] == "rounds"]
    assert run["samples"][-1][0] == run["rounds"] == 40 and run["settled_round"] >= 20
    host = {(row["start"], row["rank"]): row for row in rows if row["part"] == "host"}
    assert len(host) == 6
    for (start, _), row in host.items():
        if start != "copies":  # a page of two processes is half of each
            assert 0.4 * row["weights_mib"] < row["mapped_pss_mib"] < 0.7 * row["weights_mib"]
            assert row["mapped_private_mib"] < 0.1 * row["weights_mib"]
        else:
            assert row["mapped_pss_mib"] == 0 and row["uss_growth_mib"] > 0.9 * row["weights_mib"]
    assert "MiB per client in flight; by count" in done.stdout and "KiB per round" in done.stdout


def test_table_says_what_rows_hold() -> None:
    row = {"part": "rounds", "shape": "nano-olmoe", "system": "fedmoe_ds", "rounds": 200, "settled_round": 20, "flat": False}
    row |= {"peak_mib": 700.0, "settled_mib": 600.0, "resident_mib": 700.0, "kib_per_round": 568.9}
    assert COMMAND.show([row]).lines == [
        "nano-olmoe: 600.0 MiB after round 20, 700.0 after round 200: 568.90 KiB per round; not flat"
    ]
