"""launch/submit.py: what it writes for SLURM, and what it refuses before anything is submitted."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federations import make_config, write_inputs
from launching import REPOSITORY

from fedmoe_ds.errors import UserError
from fedmoe_ds.submission import Request, check, compose, log_folder, submit

COMMAND = REPOSITORY / "launch" / "submit.py"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file with everything that it names."""
    root = tmp_path_factory.mktemp("submit")
    write_inputs(root)
    path = root / "config.yaml"
    path.write_text(json.dumps(make_config(root, "study-7").model_dump(mode="json")))
    return path


def header(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def written(request: Request) -> str:
    config = check(request)
    return compose(request, config, REPOSITORY, log_folder(config))


def test_the_script(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logs = config.parent / "runs" / "slurm"
    script = written(
        Request(
            config,
            ("federation.rounds=20", "data.columns={instruction: instruction}"),
            nodes=4,
            gpus_per_node=2,
            partition="gpu",
            time="24:00:00",
            account="p1",
            sbatch=("qos=high", "exclusive", "comment=two words", "signal=B:USR1@600"),
        )
    )
    assert header(script) == [
        "--job-name=study-7",
        "--nodes=4",
        "--ntasks-per-node=2",
        "--time=24:00:00",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@600",
        f"--chdir={tmp_path}",
        f"--output={logs}/%j.out",
        "--gpus-per-node=2",
        "--partition=gpu",
        "--account=p1",
        "--qos=high",
        "--exclusive",
        "--comment='two words'",
    ]
    (words,) = [line for line in script.splitlines() if line.startswith("set -- ")]
    assert shlex.split(words)[2:-1] == [
        "--config",
        str(config),
        "federation.rounds=20",
        "data.columns={instruction: instruction}",
    ]
    assert f"export FEDMOE_LOGS={logs}" in script.splitlines()
    template = (REPOSITORY / "slurm" / "train.sbatch").read_text()
    assert script.partition("# --- end of header ---")[2] == template.partition("# --- end of header ---")[2]
    assert not logs.exists()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_dry_run_prints_the_script_and_writes_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(config), "--nodes", "2", "seed=3", "--tasks-per-node", "2", "topology.ep_size=4", "--dry-run"]
    monkeypatch.setattr(sys, "argv", [str(COMMAND), *words])
    assert runpy.run_path(str(COMMAND))["main"]() == 0
    said = capsys.readouterr().out
    assert said.startswith("#!/bin/bash\n") and "seed=3 topology.ep_size=4" in said
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line(config: Path) -> None:
    command = [sys.executable, COMMAND, "--config", config, "a=1"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: a: unknown key") and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"nodes": 3, "overrides": ["topology.ep_size=2"]}, r"topology.ep_size: 2: the world of 3 ranks is not divisible"),
        ({"nodes": 3, "overrides": ["topology.ep_size=3"]}, r"topology.ep_size: 3: the model's 16 experts do not divide"),
        ({"overrides": ["method.name=flamme"]}, r"method.name: flamme: .*did you mean 'flame'"),
        ({"overrides": ["topology.device=cuda"]}, r"topology.device: cuda: the job asks for no GPU; add --gpus-per-node"),
        ({"nodes": 0}, r"--nodes: 0: is no number of them; give at least 1"),
        ({"gpus_per_node": -1}, r"--gpus-per-node: -1: "),
        ({"partition": "a\n#SBATCH --wrap=x"}, r"--partition: 'a.*': is empty or no line of text"),
        ({"sbatch": ["nodes=4"]}, r"--sbatch: nodes=4: has a flag of its own; use --nodes"),
        ({"sbatch": ["requeue"]}, r"--sbatch: requeue: the script relies on it; leave it out"),
        ({"sbatch": ["Q os=1"]}, r"--sbatch: Q os=1: is no option of sbatch; write key=value"),
        ({"sbatch": ["qos="]}, r"--sbatch: qos: '': is empty"),
    ],
)
def test_refusals(config: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        written(Request(config, **changes))


def test_a_machine_without_slurm(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^sbatch: not found: this machine is no client of SLURM; "):
        submit(Request(config), REPOSITORY, dict(os.environ))
    assert (config.parent / "runs" / "slurm" / "study-7.sbatch").exists()


@pytest.mark.parametrize("name", ["train", "scaling"])
def test_scripts_say_what_is_missing(name: str, tmp_path: Path, bash: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Submitted from a folder that is not the repository: one line and 2, before anything is started."""
    done = bash(REPOSITORY / "slurm" / f"{name}.sbatch", SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: FEDMOE_HOME: {tmp_path}: has no launch/") and done.stderr.count("\n") == 1


@pytest.fixture
def bash(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a batch script outside of any job."""

    def run(script: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {"PATH": os.environ["PATH"]} | variables
        return subprocess.run(["bash", script], env=kept, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run
