"""`launch/bench.py aggregate`: rows, their shares, bad input; the real sums of two ranks. No timing is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedmoe_ds.aggregation.weighted_average import Statistics
from fedmoe_ds.bench.allreduce.command import COMMAND, aggregate_row, run_aggregate
from fedmoe_ds.bench.allreduce.rank import blocks
from fedmoe_ds.errors import UserError

BENCH = Path(__file__).parents[1] / "launch" / "bench.py"


@pytest.mark.parametrize("mib", [1, 5])
def test_statistics_have_the_size_that_was_asked_for(mib: int) -> None:
    statistics = Statistics(blocks(mib), 1, exact=True)
    assert 0 <= statistics.flat.memory.nbytes / 2**20 - mib < 0.05
    assert 0.4 < statistics.flat.dense.numel() / statistics.flat.memory.numel() < 0.6, "dense and expert sums"


def test_rows_compare_with_the_library_and_with_copying() -> None:
    seconds = {"copy_seconds": [0.001] * 3, "raw_seconds": [0.008, 0.008, 0.016], "reduce_seconds": [0.01, 0.0125, 0.01]}
    measured = {"backend": "mpi", "bytes": 2**24, **seconds}
    row = aggregate_row(4, measured)
    assert row["bandwidth_share"] == pytest.approx(0.8) and row["floor_share"] == pytest.approx(0.15)
    assert (row["shape"], row["system"]) == ("16 MiB", "mpi")
    assert row["moved_bytes_per_s"] == pytest.approx(1.5 * 2**24 / 0.01)
    assert row["samples"]["bandwidth_share"] == pytest.approx([0.8, 0.64, 1.6]) and row["reduce_s"] == 0.01
    worse = aggregate_row(4, {**measured, "backend": "torch", "reduce_seconds": [0.016, 0.016, 0.016]})
    assert COMMAND.show([row, worse]).lines == [
        "the sums of a round reach at least 50 % (50 % to 100 %) of the library's all-reduce (16 MiB over torch)"
    ]


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"^--ranks: 1: nothing is summed"):
        run_aggregate(1, [1], 1)
    with pytest.raises(UserError, match=r"^--mib: 0: too small; use 1 or more"):
        run_aggregate(2, [4, 0], 1)
    with pytest.raises(UserError, match=r"^--rounds: 0: too small; use 1 or more"):
        run_aggregate(2, [4], 0)


@pytest.mark.cluster
def test_two_ranks_sum_over_both_libraries(tmp_path: Path) -> None:
    target = tmp_path / "aggregate.json"
    command = [sys.executable, str(BENCH), "aggregate", "--mib", "1", "2", "--rounds", "2", "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "of the library's all-reduce" in done.stdout.splitlines()[-1]
    rows = json.loads(target.read_text())["rows"]
    assert [(row["shape"], row["system"]) for row in rows] == [(f"{m} MiB", s) for m in (1, 2) for s in ("torch", "mpi")]
    for row in rows:
        found = row["samples"]
        for share, above in (("bandwidth_share", "raw_s"), ("floor_share", "copy_s")):  # two ranks copy what they have once
            assert found[share] == pytest.approx([a / b for a, b in zip(found[above], found["reduce_s"], strict=True)])
        assert len(found["reduce_s"]) == 2 and min(found["reduce_s"]) > 0
