"""Peers in other programs: Flower's simulation engine and DeepSpeed's own MoE layer. No timing is asserted."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file, save_file

from fedmoe_ds.bench.baselines import federated, layers
from fedmoe_ds.bench.baselines.command import COMMAND
from fedmoe_ds.bench.harness.command import add_options
from fedmoe_ds.bench.harness.program import Program, Start, programs
from fedmoe_ds.bench.harness.shapes import SHAPES, write_model
from fedmoe_ds.bench.harness.system import BITWISE, OURS, DisagreementError
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.errors import UserError

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "launch" / "bench.py"
MARK = "FEDMOE_TEST_PEERS"
SMALL = ["--shape", "tiny", "--steps", "1", "--rounds", "1", "--length", "24"]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Ray's sockets do not fit below pytest's own folders."""
    with tempfile.TemporaryDirectory(prefix="fm-") as folder:
        yield Path(folder)


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command, variables = [sys.executable, str(BENCH), "peers", *arguments], {**os.environ, MARK: "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=variables)


def tiny(**changes: Any) -> Workload:
    return Workload(SHAPES["tiny"], **{"steps": 1, "sequences": 1, "length": 24, "seed": 3, **changes})


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, COMMAND.options)
    for words, message in (
        (["--systems", "flwr"], "^--systems: flwr: unknown system; did you mean 'flower'"),
        (["--rounds", "0"], "^--rounds: 0: too small"),
        (["--mode", "slow"], "^--mode: slow: unknown mode"),
        (["--shape", "e33"], "^--shape: e33: unknown shape; did you mean 'e32'"),
    ):
        with pytest.raises(UserError, match=message):
            COMMAND.run(parser.parse_args(words), lambda text: None)
    monkeypatch.setattr(federated, "PYTHON", Path("nowhere/bin/python"))
    with pytest.raises(UserError, match=r"^--systems: flower: .* nowhere/bin/python is missing; run `make bench-peers`, or"):
        federated.run_federations([tiny()], [OURS], 1, lambda text: None)


def test_flower_environment_has_the_projects_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = (ROOT / "fedmoe_ds" / "bench" / "baselines" / "flower" / "requirements.txt").read_text().splitlines()
    theirs = [line for line in lines if not line.startswith("#")]
    shared = [line for line in theirs if not line.startswith("flwr")]
    assert set(shared) <= set(ours) and {"transformers", "peft"} <= {re.split("[<>=]", line)[0] for line in shared}


def test_programs_end_together() -> None:
    answering = "import sys\nfor line in sys.stdin: print('{\"result\": ' + line.strip() + '}', flush=True)"
    child = (
        "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\ntime.sleep(60)"
    )
    mine = psutil.Process()
    before = mine.children(recursive=True)  # of other tests
    with programs({"one": [Start([sys.executable, "-c", answering]), Start([sys.executable, "-c", child])]}) as running:
        assert running["one"].ask(do="say") == {"do": "say"}
        while len(family := [one for one in mine.children(recursive=True) if one not in before]) < 3:
            pass
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_a_dead_program_shows_its_log() -> None:
    program = Program("one", [Start([sys.executable, "-c", "raise SystemExit('no such thing')"])])
    with pytest.raises(RuntimeError, match="'one' ended with exit code 1:\nno such thing"):
        program.ask(do="say")
    program.close()


def _compare_stacks(rank: int, folder: str) -> None:
    """In a world of one, which DeepSpeed's layer wants."""
    from fedmoe_ds.bench.baselines.layer_worker import open_stack

    workload = tiny(length=40)
    layers.write_normalised(workload, Path(folder))
    stacks = {name: open_stack(name, Path(folder), workload) for name in layers.NAMES}
    found = {}
    for name, stack in stacks.items():
        stack.run()  # nothing is left of an earlier run
        found[name] = {"y": stack.run(), "factors": stack.factors_CT(), **stack.gradients()}
    layers.check_tensors(found)
    assert stacks[OURS].padding == 1.0 and stacks[layers.DEEPSPEED].padding > 1.0
    assert found[OURS]["y"].shape == (8, 40, 32) and len(found[OURS]) == 6
    assert bool((found[layers.DEEPSPEED]["factors"][:6] == 1).all() and (found[layers.DEEPSPEED]["factors"][6:] < 1).all())
    for key in found[OURS].keys() - {"factors"}:
        wrong = {name: dict(tensors) for name, tensors in found.items()}
        wrong[layers.DEEPSPEED][key] = wrong[layers.DEEPSPEED][key] * 1.001
        with pytest.raises(DisagreementError, match=f"^{re.escape(key)}: "):
            layers.check_tensors(wrong)


def test_deepspeeds_layer_and_ours_compute_the_same(tmp_path: Path) -> None:
    run_distributed(_compare_stacks, 1, str(tmp_path))


@pytest.mark.cluster
def test_peers_writes_its_rows(tmp_path: Path) -> None:
    federated.check_environment()
    target = tmp_path / "peers.json"
    done = run_bench(*SMALL, "--json", str(target))
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["rows"]
    assert [(row["part"], row["system"]) for row in rows] == [
        *((federated.PART, name) for name in (OURS, BITWISE, federated.FLOWER)),
        *((layers.PART, layers.NAMES[name]) for name in layers.NAMES),
    ]
    for row in rows:
        assert row["shape"] == "tiny" and row["tokens"] == 8 * 24 and row["tokens_per_s"] > 0 and row["peak_mib"] > 50
        assert row["length"] == 24 and row["steps"] == 1 and row["floor_share"] is None
    for row in rows[:3]:
        assert row["rounds_per_hour"] == pytest.approx(3600 * row["tokens_per_s"] / row["tokens"])
        assert 0 < row["training_share"] <= 1 and row["processes"] == federated.cores()
    assert (
        rows[2]["versions"]["flwr"]
        and rows[2]["versions"]["ray"]
        and rows[0]["adapters_apart"] < federated.ADAPTER_AGREEMENT
        and rows[4]["padding"] > 1
    )
    lines = COMMAND.show(rows).lines
    assert lines[0].startswith("tiny, rounds: fedmoe_ds is ") and lines[1].startswith("tiny, layers: fedmoe_ds layers is ")
    left = [process for process in psutil.process_iter(["environ"]) if MARK in (process.info["environ"] or {})]
    assert not psutil.wait_procs(left, timeout=10)[1]


@pytest.mark.cluster
def test_flower_and_ours_reach_the_same_adapters(short_path: Path) -> None:
    federated.check_environment()
    workload = tiny(steps=2)
    write_model(workload.shape, workload.seed, short_path / "model")
    starts = {OURS: federated.our_starts(2), federated.FLOWER: federated.flower_starts(short_path / "flower")}
    with programs(starts) as running:
        federated.open_all(short_path, workload, running, 2, lambda text: None)
        losses = {name: program.ask(do="round", stage="timed")["losses"] for name, program in running.items()}
        for ours, theirs in zip(losses[OURS], losses[federated.FLOWER], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        federated.check_adapters(short_path, running)
        file = short_path / "other.safetensors"
        running[OURS].ask(do="save", file=str(file))
        stored = load_file(file)
        changed = next(key for key in stored if key.endswith("lora_B"))
        save_file({**stored, changed: stored[changed] + torch.randn_like(stored[changed])}, file)
        found = running[federated.FLOWER].ask(do="compare", file=str(file))
        assert found["distance"] > federated.ADAPTER_AGREEMENT * found["moved"]
