"""A source distribution, the wheel built from it, an environment with that wheel alone, a folder elsewhere: the tool works.

The environment shares the libraries of this one, and of this package it has the wheel: whatever is found, is found in it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from every import every
from launching import REPOSITORY, changed

from fedmoe_ds.distributed.launcher import free_port

pytestmark = pytest.mark.timeout(900)

PARTS = ("fedmoe_ds", "configs", "slurm", "launch", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
LEFT = {"fedmoe_ds/slurm/README.md", "fedmoe_ds/bench/baselines/flower/requirements.txt"}
"""For people in the repository."""
BUILD = "from setuptools import build_meta as build; print(build.build_{}('dist'))"


def run(folder: Path, *words: str | Path, **variables: str) -> str:
    """What a command says on standard output, in a folder and without this test's own paths."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "FEDMOE_CACHE")
    }
    environment = kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("build")
    tree = root / "tree"
    tree.mkdir()
    for part in PARTS:
        if (REPOSITORY / part).is_dir():
            shutil.copytree(REPOSITORY / part, tree / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / part, tree / part)
    archive = tree / "dist" / run(tree, sys.executable, "-c", BUILD.format("sdist")).splitlines()[-1]
    with tarfile.open(archive) as file:
        # Python knows the filter (no link, no file of somebody else) from 3.11.4 on, and we have made the archive.
        known: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        file.extractall(root, **known)  # noqa: S202
    source = root / archive.name.removesuffix(".tar.gz")
    return source / "dist" / run(source, sys.executable, "-c", BUILD.format("wheel")).splitlines()[-1]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder of programs."""
    root = tmp_path_factory.mktemp("environment")
    run(root, sys.executable, "-m", "venv", "--without-pip", root)
    programs = root / "bin"
    # First the wheel, then the libraries: pip sees no other installation of it.
    run(root, sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps", "--no-index", wheel)
    (site_of(programs) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


@pytest.mark.cluster
def test_the_wheel_has_every_file_that_is_no_code(wheel: Path) -> None:
    package = REPOSITORY / "fedmoe_ds"
    folders = [package, package / "configs", package / "slurm"]  # links are not followed
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    wanted = {path.relative_to(REPOSITORY).as_posix() for path in files} - LEFT
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if name.startswith("fedmoe_ds/")}
        assert b"fedmoe = fedmoe_ds.commands.program:main" in content.read(
            next(n for n in content.namelist() if "entry_points" in n)
        )
    assert wanted - names == set() and len(wanted) > 400


@pytest.mark.cluster
def test_it_runs_elsewhere(environment: Path, nano: dict[str, Any], tmp_path: Path) -> None:
    """List, path, plan, two ranks of the deepspeed launcher, and pages: in an empty folder."""
    fedmoe, python, site = environment / "fedmoe", environment / "python", site_of(environment)
    before = files_of(site / "fedmoe_ds")
    assert "fine-tune a federation" in run(tmp_path, fedmoe, "--help")
    script = Path(run(tmp_path, fedmoe, "launch-path", "train").strip())
    assert script == site / "fedmoe_ds" / "commands" / "train.py" and script.is_file()
    assert "rank" in run(tmp_path, fedmoe, "train", "--config", "quickstart", "--dry-run")
    launcher = (python, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--log_level", "error")
    assert trained(tmp_path, nano, (*launcher, "--master_port", str(free_port()), script)) == 2
    assert run(tmp_path, fedmoe, "report", "runs/nano") == "runs/nano/report.html\n"
    assert files_of(site / "fedmoe_ds") == before, "an installed package is nobody's to write to"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "runs"]


@pytest.mark.sweep
def test_it_starts_itself_elsewhere(environment: Path, nano: dict[str, Any], tmp_path: Path) -> None:
    """The supervisor's ranks, the runs of a study, and the batch script that will be in a job."""
    fedmoe, site = environment / "fedmoe", site_of(environment)
    assert trained(tmp_path, nano, (fedmoe, "train", "--ranks", "2")) == 2
    batch = run(tmp_path, fedmoe, "submit", "--config", "methods/flame", "--dry-run")
    assert f"export FEDMOE_LAUNCH={site}/fedmoe_ds/commands\n" in batch
    assert f"--config {site}/fedmoe_ds/configs/methods/flame.yaml" in batch
    words = ("--methods", "flame", "--seeds", "1", "--config", "config.yaml", "--output", "study")
    assert "report: study/" in run(tmp_path, fedmoe, "compare", *words)
    assert read(tmp_path / "study" / "flame-seed0")[-1]["event"] == "end"


def trained(folder: Path, nano: dict[str, Any], command: Sequence[str | Path]) -> int:
    """Train the small federation for a round; the size of its world."""
    (folder / "config.yaml").write_text(json.dumps(changed(nano, output="runs", federation={"rounds": 1})))
    lines = run(folder, *command, "--config", "config.yaml").splitlines()
    assert "run: runs/nano" in lines and any(line.startswith("digest: ") for line in lines)
    (start,) = [event for event in read(folder / "runs" / "nano") if event["event"] == "run"]
    return int(start["world_size"])


def site_of(environment: Path) -> Path:
    (site,) = environment.parent.glob("lib/python*/site-packages")
    return site


def files_of(folder: Path) -> set[Path]:
    found = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert found and every(not path.is_symlink() for path in found)
    return found


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
