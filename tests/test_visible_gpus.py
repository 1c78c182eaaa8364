"""$CUDA_VISIBLE_DEVICES says which GPUs are taken, by `make train` and by the runs of a study."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from test_compare import REPOSITORY, environment, no_note, plan
from test_compare import request_ as request_  # a fixture

from fedmoe_ds.studies import gpus
from fedmoe_ds.studies.compare.command import Request
from fedmoe_ds.studies.gpus import gpus_of, launcher_options, visible_gpus
from fedmoe_ds.studies.runner import Runner, locked


@pytest.mark.parametrize(
    ("variables", "train", "jobs"),
    [
        ({}, "--num_accelerators 8", "--jobs 8"),
        ({"CUDA_VISIBLE_DEVICES": "2"}, "--include localhost:2", "--jobs 1"),
        ({"CUDA_VISIBLE_DEVICES": "2,5"}, "--include localhost:2,5", "--jobs 2"),
        ({"CUDA_VISIBLE_DEVICES": "2,5", "RANKS": "1"}, "--include localhost:2", "--jobs 2"),
        ({"CUDA_VISIBLE_DEVICES": "2", "DS_ACCELERATOR": "cpu"}, "--num_accelerators 2", "--jobs 2"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "--num_accelerators 2", "--jobs 2"),
        ({"CUDA_VISIBLE_DEVICES": "2,5", "RANKS": "4"}, "*** RANKS: 4: CUDA_VISIBLE_DEVICES=2,5 shows 2; give RANKS=2.", ""),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, "*** CUDA_VISIBLE_DEVICES: GPU-1: deepspeed's launcher takes numbers; give", ""),
    ],
)
def test_make_takes_the_gpus_that_are_visible(tmp_path: Path, variables: dict[str, str], train: str, jobs: str) -> None:
    """On a host with eight."""
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i: one; done\n")
    listing.chmod(0o755)
    ours = ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "RANKS", "JOBS", "MAKEFLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    kept |= {"PATH": f"{tmp_path}:{kept['PATH']}", **variables}
    for target, words in (("train", train), ("compare", jobs)):
        command = ["make", "-n", "-o", ".venv/.installed", target]
        done = subprocess.run(command, cwd=REPOSITORY, env=kept, capture_output=True, text=True, check=False)
        assert f"{words} " in f"{done.stdout}{done.stderr}".replace("\n", " "), done


def test_a_launcher_is_told_which_gpus() -> None:
    assert launcher_options(2, []) == launcher_options(2, ["0", "1"]) == ["--num_accelerators", "2"]
    assert launcher_options(2, ["2", "5"]) == ["--include", "localhost:2,5"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_runs_that_are_at_work_at_once_have_gpus_of_their_own(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "uses_cuda", lambda device: True)
    script = request_.output.parent / "command.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "mark = pathlib.Path(sys.argv[2] + '.gpus')\n"
        "mark.write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "deadline = time.monotonic() + 30\n"
        "while len(list(mark.parent.glob('*.gpus'))) < 2 and time.monotonic() < deadline:\n    time.sleep(0.02)\n"
    )
    runs = plan(request_)[:2]
    with locked(request_.output) as lock:
        Runner(script, environment() | {"CUDA_VISIBLE_DEVICES": "4,7"}, no_note, jobs=2).run(runs, lock)
    assert [Path(f"{run.folder}.yaml.gpus").read_text() for run in runs] == ["4", "7"]
    assert gpus_of(runs[0], 2, {"CUDA_VISIBLE_DEVICES": "4,7"}) == ["4"], "a third one shares"
    three = replace(runs[0], ranks=3)
    assert gpus_of(three, 1, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}) == ["3", "4", "5"]
    assert gpus_of(three, 0, {"CUDA_VISIBLE_DEVICES": "4,7"}) == [], "which its ranks say themselves"
