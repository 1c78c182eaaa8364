"""The benchmark command: its JSON interface, its agreement check, its memory bound, bad input. No timing is asserted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import every

from fedmoe_ds.bench.fft_moe.command import check_first_losses, run_pool
from fedmoe_ds.bench.fft_moe.systems import Dense, ExpertPool
from fedmoe_ds.bench.fft_moe.workload import DENSE, PoolWorkload, write_dense_model
from fedmoe_ds.bench.harness.shapes import SHAPES, write_model
from fedmoe_ds.bench.harness.system import DisagreementError, check_agreement, system_names
from fedmoe_ds.bench.harness.table import check_writable
from fedmoe_ds.bench.harness.workload import Workload, make_workloads
from fedmoe_ds.bench.memory.load import TooMuchMemoryError, check_bound, run_load
from fedmoe_ds.bench.products.command import COMMAND as KERNELS
from fedmoe_ds.bench.wave.floor import DeviceFloor, Floor
from fedmoe_ds.bench.wave.fused import Fused
from fedmoe_ds.bench.wave.measure import run_wave
from fedmoe_ds.bench.wave.peft import Peft
from fedmoe_ds.errors import UserError
from fedmoe_ds.kernels import matrix

BENCH = Path(__file__).parents[1] / "launch" / "bench.py"
SYSTEMS = ["fedmoe_ds", "peft eager"]


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True, timeout=280)


def read_rows(path: Path) -> list[dict[str, Any]]:
    stored = json.loads(path.read_text())
    assert stored["command"].startswith(f"python launch/bench.py {stored['benchmark']} ") and stored["machine"]["cpu"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", stored["date"])
    rows: list[dict[str, Any]] = stored["rows"]
    return rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Workload]:
    workload = Workload(SHAPES["tiny"], steps=1, sequences=2, length=24, seed=3)
    folder = tmp_path_factory.mktemp("tiny")
    write_model(workload.shape, workload.seed, folder)
    return folder, workload


@pytest.mark.cluster  # slow: every system in a process of its own
def test_wave_writes_its_rows(tmp_path: Path) -> None:
    target = tmp_path / "wave.json"
    small = ["--steps", "1", "--rounds", "1", "--sequences", "2", "1", "--length", "24"]
    done = run_bench("wave", "--shape", "tiny", *small, "--mode", "fast", "--peers", "grouped_mm", "--json", str(target))
    assert done.returncode == 0, done.stderr
    about, *lines = done.stdout.splitlines()[-3:]
    compiled = matrix.kernel()
    assert compiled is not None and about == f"Our products with frozen weights: matrix.cpp for {compiled.processor}."
    assert [line.split(":")[0] for line in lines] == [f"tiny, {tokens} tokens per client and step" for tokens in (48, 24)]
    assert every("(one timing) times as fast as peft grouped_mm" in line for line in lines)
    rows = read_rows(target)
    assert [row["system"] for row in rows] == ["fedmoe_ds", "peft grouped_mm"] * 2
    assert [row["sequences"] for row in rows] == [2, 2, 1, 1]
    for row in rows:
        assert {name: [row[name]] for name in row["samples"]} == row["samples"], "one round"
        assert (
            row["shape"] == "tiny"
            and row["tokens"] == 8 * 1 * row["sequences"] * 24
            and row["caps"] == [8, 8, 4, 4, 2, 2, 1, 1]
        )
        assert row["tokens_per_s"] > 0 and row["peak_mib"] > 50 and row["floor_share"] > 0
        assert row["threads"] == 1 and row["cpu"] and row["versions"]["torch"]
    assert rows[0]["ratio"] == 1.0 and rows[0]["cpu_ratio"] == 1.0


def test_kernels_of_every_class_beside_torch() -> None:
    notes: list[str] = []
    settings = {"dtype": ["float32", "bfloat16"], "experts": [2], "width": [32], "rows": [3], "rounds": 2, "seed": 0}
    rows = KERNELS.run(Namespace(**settings, processors=None), notes.append)
    systems = [row["system"] for row in rows]
    assert systems[-1] == "torch" and len(rows) == 4 * len(set(systems))
    assert every(row["gflops"] > 0 and len(row["samples"]["of_torch"]) == 2 for row in rows)
    assert every(row["of_torch"] == 1.0 for row in rows if row["system"] == "torch")
    table = KERNELS.show(rows).text()
    assert every(name in table for name in set(systems))
    for change, message in (
        ({"processors": ["AVX1024"]}, "--processors: AVX1024: cannot be had on this machine; classes are AMX-BF16, "),
        ({"width": [32, 64]}, "--experts, --width: 1 and 2 values; give pairs"),
        ({"dtype": ["float32", "float16"]}, "--dtype: float16: unknown type"),
        ({"experts": [0]}, "--experts: 0: too small; use 1 or more"),
        ({"width": [-8]}, "--width: -8: too small; use 1 or more"),
        ({"width": [12]}, "--width: 12: torch's product takes rows of whole 16 bytes; use a multiple of 8"),
        ({"rows": [16, 0]}, "--rows: 0: too small; use 1 or more"),
        ({"rounds": 0}, "--rounds: 0: too small; use 1 or more"),
        ({"seed": 10**30}, "--seed: 10*: too large; use less than"),
        ({"width": [8 * 10**9]}, r"--experts, --width, --rows: 2, 8000000000, 3: need \d+ MiB, and \d+ are left; use less"),
    ):
        with pytest.raises(UserError, match=message):
            KERNELS.run(Namespace(**settings | {"processors": None} | change), notes.append)


def test_load_writes_its_rows(tmp_path: Path) -> None:
    target = tmp_path / "load.json"
    done = run_bench("load", "--shape", "load-tiny", "--ep-size", "2", "--json", str(target))
    assert done.returncode == 0, done.stderr
    rows = read_rows(target)
    assert [(row["ep_size"], row["rank"]) for row in rows] == [(2, 0), (2, 1)]
    assert every(row["system"] == "fedmoe_ds" and row["shape"] == "load-tiny" and row["peak_mib"] > 50 for row in rows)
    for row in rows:
        assert row["own_experts_mib"] == pytest.approx(2 * 8 * 3 * 64 * 64 * 4 / 2**20)
        assert row["model_mib"] == pytest.approx(row["dense_mib"] + 2 * row["own_experts_mib"])


@pytest.mark.cluster  # slow, as above
def test_experts_writes_its_rows(tmp_path: Path) -> None:
    target = tmp_path / "pool.json"
    small = ["--steps", "1", "--rounds", "1", "--clients", "2", "--sequences", "1", "--length", "16"]
    done = run_bench("experts", "--experts", "4", "8", *small, "--json", str(target))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split()[:3] == ["system", "ms", "/"] and len(done.stdout.splitlines()) == 4
    rows = read_rows(target)
    assert [(row["system"], row["experts"]) for row in rows] == [(DENSE, None), ("experts 4", 4), ("experts 8", 8)]
    assert rows[0]["to_dense"] == rows[1]["to_first"] == 1.0
    for row in rows:
        assert row["shape"] == "pool" and row["tokens_per_s"] > 0 and row["peak_mib"] > 50 and row["cpu"]
        assert (row["clients"], row["sequences"], row["length"], row["top_k"]) == (2, 1, 16, 4)
    for row in rows[1:]:
        assert row["passes_share"] + row["optimizer_share"] + row["setup_share"] == pytest.approx(1.0)
        # value, gradient and two moments of U, V and W_R, for two clients and four layers
        numbers = 2 * 4 * row["experts"] * (2 * 16 * 128 + 128)
        assert row["adapter_mib"] == row["optimizer_mib"] == pytest.approx(2 * numbers * 4 / 2**20)
        assert 4 * 4 <= row["used_experts"] <= 4 * row["experts"]


@pytest.mark.parametrize("bitwise", [False, True])
def test_pools_start_as_the_dense_foundation(tmp_path: Path, bitwise: bool) -> None:
    workload = PoolWorkload(steps=2, clients=3, sequences=2, length=24, seed=3, bitwise=bitwise)
    write_dense_model(workload.seed, tmp_path)
    systems = {DENSE: Dense(tmp_path, workload), "experts 16": ExpertPool(tmp_path, workload, 16)}
    for _ in range(2):  # every wave starts afresh
        losses = {name: system.measure()["losses"] for name, system in systems.items()}
        assert every(len(set(found)) == 3 for found in losses.values())
        check_first_losses(losses)
    with pytest.raises(DisagreementError, match="not the same computation"):
        check_first_losses({**losses, "experts 16": [loss + 1e-2 for loss in losses[DENSE]]})


@pytest.mark.parametrize(("bitwise", "implementation"), [(False, "grouped_mm"), (True, "eager"), (True, "batched_mm")])
def test_fused_waves_and_peft_compute_the_same(tiny: tuple[Path, Workload], bitwise: bool, implementation: str) -> None:
    folder, workload = tiny
    ours = Fused(folder, workload, bitwise)
    peer = Peft(folder, workload, implementation)
    for stage in ("warm-up", "timed", "warm-up"):  # every wave starts afresh
        mine, theirs = ours.train(stage), peer.train(stage)
        for a, b in zip(mine.losses, theirs.losses, strict=True):
            assert a == pytest.approx(b, abs=1e-5)
    rows_per_client = [sum(map(sum, layers)) for layers in mine.rows]
    per_cap = workload.shape.layers * workload.stage_steps("warm-up") * workload.sequences * workload.length
    assert rows_per_client == [cap * per_cap for cap in workload.caps]


def test_plain_lora_and_peft_compute_the_same(tmp_path: Path) -> None:
    (workload,) = make_workloads(["dense-tiny"], [2], dense=True, steps=1, length=24, seed=0)
    write_model(workload.shape, workload.seed, tmp_path)
    peer, expected = Peft(tmp_path, workload, "eager"), workload.shape.layers * (2 + 3) * 2
    assert len(peer.start) == expected, "q and v of attention, all of the feed-forward block, A and B"
    theirs = peer.train("warm-up").losses
    for bitwise in (False, True):
        mine = Fused(tmp_path, workload, bitwise).train("warm-up").losses
        for a, b in zip(mine, theirs, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("change", [{"alpha": 8.0}, {"caps": (8, 8, 4, 4, 2, 2, 1, 2)}, {"lr": 2e-3}])
def test_agreement_sees_a_different_computation(tiny: tuple[Path, Workload], change: dict[str, Any]) -> None:
    folder, workload = tiny
    other = Workload.from_json({**workload.to_json(), **change})
    losses = {name: Peft(folder, load, "grouped_mm").train("warm-up").losses for name, load in (("a", workload), ("b", other))}
    check_agreement({"a": losses["a"], "again": losses["a"]})
    with pytest.raises(DisagreementError, match="not the same computation"):
        check_agreement(losses)


def test_agreement_refuses_nan() -> None:
    with pytest.raises(DisagreementError):
        check_agreement({"a": [(1.0, 1.0)], "b": [(1.0, float("nan"))]})


def test_memory_bound() -> None:
    row = {"ep_size": 2, "rank": 1, "dense_mib": 30.0, "own_experts_mib": 300.0, "growth_mib": 400.0}
    check_bound(row)
    with pytest.raises(TooMuchMemoryError, match="ep_size 2, rank 1"):
        check_bound({**row, "growth_mib": 600.0})


def test_unknown_shape_is_one_line() -> None:
    done = run_bench("wave", "--shape", "e33")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --shape: e33: unknown shape; did you mean 'e32'?"


def test_bad_input(tmp_path: Path) -> None:
    settings = {"steps": 1, "sequences": 1, "length": 16, "seed": 0}
    with pytest.raises(UserError, match="--steps: 0"):
        make_workloads(["e32"], **{**settings, "sequences": [1], "steps": 0})
    with pytest.raises(UserError, match="--length: 513"):
        make_workloads(["e32"], **{**settings, "sequences": [1], "length": 513})
    with pytest.raises(UserError, match=r"--peers: groped_mm: .*did you mean 'grouped_mm'"):
        system_names("both", ["groped_mm"])
    with pytest.raises(UserError, match="--experts: 3: fewer than the 4 active ones"):
        run_pool([3], PoolWorkload(**settings, clients=1), 1, lambda text: None)
    with pytest.raises(UserError, match="--clients: 0"):
        PoolWorkload(**settings, clients=0)
    with pytest.raises(UserError, match="--mode: slow"):
        system_names("slow", [])
    with pytest.raises(UserError, match="--device: tpu: unknown device"):
        make_workloads(["e32"], **{**settings, "sequences": [1]}, device="tpu")
    with pytest.raises(UserError, match=r"--kernels: tritn: .*did you mean 'triton'"):
        make_workloads(["e32"], **{**settings, "sequences": [1]}, kernels="tritn")
    with pytest.raises(UserError, match="--rounds: 0"):
        run_wave([], [], 0, lambda text: None)
    with pytest.raises(UserError, match="--ep-size: 3: it does not divide the 16 experts"):
        run_load([1, 3], "load-tiny", 0, lambda text: None)
    with pytest.raises(UserError, match=r"--json: .*missing"):
        check_writable(tmp_path / "missing" / "rows.json")


def test_the_floor_of_a_device_counts_what_the_other_multiplies() -> None:
    workload = Workload(SHAPES["tiny"], steps=2, sequences=2, length=24, seed=3)
    rows_CLE = np.full((8, 2, 16), 2 * 24 * 4 * 2 // 16)  # four active experts in each of two steps, evenly
    floor, device = Floor(workload, rows_CLE), DeviceFloor(workload, rows_CLE, side=64)
    flops = sum(2.0 * left.shape[0] * left.shape[1] * right.shape[1] for left, right, _ in floor.products)
    flops += sum(2.0 * left.numel() * right.shape[2] for left, right, _ in floor.batched)
    assert device.flops == floor.flops() == 2 * flops > 0
    spans = [device.measure(repeats=2) for _ in range(2)]
    assert every(span.wall > 0 and span.cpu == 0 for span in spans)


def test_devices_of_a_wave() -> None:
    done = run_bench("wave", "--shape", "tiny", "--device", "cuda", "--mode", "bitwise")
    assert done.returncode == 2 and "error: --mode: bitwise: bitwise is measured on CPUs alone; use fast" in done.stderr
    if not torch.cuda.is_available():
        done = run_bench("wave", "--shape", "tiny", "--device", "cuda")
        assert done.returncode == 2 and "error: --device: cuda: no CUDA device is visible; leave it out" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_wave_on_a_device(kernels: str, tmp_path: Path) -> None:
    target = tmp_path / "wave.json"
    small = ["--steps", "1", "--rounds", "1", "--sequences", "2", "--length", "24", "--dtype", "bfloat16"]
    words = ["--shape", "tiny", *small, "--device", "cuda", "--kernels", kernels, "--peers", "eager", "--json", str(target)]
    done = run_bench("wave", *words)
    assert done.returncode == 0, done.stderr
    rows = read_rows(target)
    assert [(row["system"], row["device"], row["kernels"]) for row in rows] == [(name, "cuda", kernels) for name in SYSTEMS]
    assert every(row["floor_share"] > 0 and row["peak_mib"] > 0 for row in rows)
