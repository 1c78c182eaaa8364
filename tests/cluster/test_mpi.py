"""MPI: mpirun with 1, 2 and 4 ranks ends as deepspeed and torchrun do; control plane and aggregation over MPI equal gloo's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from federations import make_config, write_inputs
from test_launchers import BIN, SHORT, command, digest_of, environment, free_port, start

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
MPIRUN = [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("mpi")
    write_inputs(root)
    (root / "runs").mkdir()
    return make_config(root, "mpi", SHORT).model_dump(mode="json")


def over_mpi(tree: dict[str, Any], name: str, ranks: int, ep_size: int, *overrides: str) -> str:
    program = [sys.executable, *command(tree, name, ep_size), *overrides]
    return digest_of(tree, name, "mpirun", ranks, start([*MPIRUN, "-n", str(ranks), *program]))


def test_every_launcher_ends_with_the_same_digest(tree: dict[str, Any]) -> None:
    port = ["--master_port", str(free_port())]
    deepspeed = [str(BIN / "deepspeed"), "--log_level", "error", "--num_accelerators", "2", *port]
    expected = digest_of(tree, "deepspeed", "deepspeed", 2, start([*deepspeed, *command(tree, "deepspeed", 1)]))
    torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]
    assert digest_of(tree, "torchrun", "torchrun", 2, start([*torchrun, *command(tree, "torchrun", 2)])) == expected
    for ranks, ep_size in ((1, 1), (2, 1), (4, 2)):
        assert over_mpi(tree, f"mpirun-{ranks}", ranks, ep_size) == expected
    assert over_mpi(tree, "aggregated", 2, 1, "topology.aggregation=mpi") == expected
    # dense sums meet inside a cluster, expert sums across clusters: both over MPI
    assert over_mpi(tree, "aggregated-4", 4, 2, "topology.aggregation=mpi", "topology.control=torch") == expected


def test_control_over_mpi_equals_gloo(tmp_path: Path) -> None:
    program = [sys.executable, str(Path(__file__).parent / "control_program.py"), str(tmp_path)]
    done = subprocess.run([*MPIRUN, "-n", "4", *program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(4):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        mpi, gloo = found["mpi"], found["torch"]
        assert (found["own"], mpi.pop("class"), gloo.pop("class")) == ("MpiControl", "MpiControl", "FlatControl")
        assert mpi == gloo
        assert mpi["place"] == [rank, 4, rank % 2, 2]
        assert mpi["gather"] == [(bytes([r]) * 1000 * r).hex() for r in range(4)]
        assert mpi["broadcast"] == ["", "010101", "01" * 100_000]
        assert mpi["inside"] == [f"{rank - rank % 2}!", f"{rank - rank % 2 + 1}!"]


def test_mpi_is_refused_where_there_is_none(tree: dict[str, Any]) -> None:
    for key in ("control", "aggregation"):
        torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]
        process = start([*torchrun, *command(tree, f"refused-{key}", 1), f"topology.{key}=mpi"])
        _, errors = process.communicate()
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: topology.{key}: mpi: the 2 ranks were started without MPI: each would be alone; start ")
