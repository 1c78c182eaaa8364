"""One command, any launcher: plain python, torchrun, mpirun and srun's variables end with the same digest."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from federations import make_config, read_events, write_inputs
from launching import SCRIPT, changed

from fedmoe_ds.distributed.launcher import Launch, detect_launch, slurm_port
from fedmoe_ds.errors import EXIT_LOST, EXIT_USER_ERROR, UserError

pytestmark = pytest.mark.timeout(600)

BIN = Path(sys.executable).parent
SHORT: dict[str, Any] = {"federation": {"rounds": 1}, "local": {"max_steps": 2}, "evaluation": {"client_sequences": 0}}
PREFIXES = ("SLURM_", "OMPI_", "PMI", "PRTE_", "TORCHELASTIC_")
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any launcher's variables."""
    for name in list(os.environ):
        if name in NAMES or name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A short run, as a configuration file would say it."""
    root = tmp_path_factory.mktemp("launchers")
    write_inputs(root)
    (root / "runs").mkdir()
    return make_config(root, "launchers", SHORT).model_dump(mode="json")


def environment(**variables: Any) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in NAMES and not name.startswith(PREFIXES)}
    path = f"{BIN}{os.pathsep}{kept.get('PATH', os.defpath)}"
    fixed = {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return kept | fixed | {name: str(value) for name, value in variables.items()}


def command(tree: dict[str, Any], name: str, ep_size: int) -> list[str]:
    """The script with a configuration of its own; it is YAML, since JSON is."""
    path = Path(tree["output"]) / f"{name}.yaml"
    path.write_text(json.dumps(changed(tree, name=name, topology={"ep_size": ep_size})))
    return [str(SCRIPT), "--config", str(path)]


def digest_of(tree: dict[str, Any], name: str, launcher: str, world_size: int, *processes: subprocess.Popen[str]) -> str:
    """Wait for all ranks; the digest that the first one printed, if the run says it was what was asked for."""
    outputs = []
    try:
        outputs = [process.communicate(timeout=540) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    (event,) = [event for event in read_events(Path(tree["output"]) / name) if event["event"] == "run"]
    assert (event["launcher"], event["world_size"]) == (launcher, world_size)
    (line,) = [line for out, _ in outputs for line in out.splitlines() if line.startswith("digest: ")]
    return line


def start(arguments: list[str], **variables: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, env=environment(**variables))


@pytest.fixture(scope="module")
def plain(tree: dict[str, Any]) -> str:
    """The digest under plain python."""
    return digest_of(tree, "plain", "python", 1, start([sys.executable, *command(tree, "plain", 1)]))


def free_port(first: int = 1024, last: int = 65535) -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if first <= port <= last:
            return port


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.cluster
def test_torchrun(tree: dict[str, Any], plain: str) -> None:
    launcher = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]
    assert digest_of(tree, "torchrun", "torchrun", 2, start([*launcher, *command(tree, "torchrun", 1)])) == plain


@pytest.mark.cluster
def test_mpirun(tree: dict[str, Any], plain: str) -> None:
    launcher = [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable]
    assert digest_of(tree, "mpirun", "mpirun", 2, start([*launcher, *command(tree, "mpirun", 2)])) == plain


@pytest.mark.cluster
def test_srun(tree: dict[str, Any], plain: str) -> None:
    """srun starts one process per task and says who is who; the rendezvous port follows from the job number."""
    job = next(job for job in itertools.count(int(time.time())) if is_free(slurm_port(job, 0)))
    step = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": 0, "SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2, "SLURM_NNODES": 1}
    arguments = [sys.executable, *command(tree, "srun", 1)]
    tasks = [start(arguments, **step, SLURM_PROCID=task, SLURM_LOCALID=task) for task in range(2)]
    assert digest_of(tree, "srun", "srun", 2, *tasks) == plain


def test_a_port_that_another_job_has_is_one_line_with_a_way_out(tree: dict[str, Any]) -> None:
    """Two commands of `deepspeed` on one machine meet like that: both take 29500 unless they are told another."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        rank = start([sys.executable, *command(tree, "taken", 1)], **place)
        out, err = rank.communicate(timeout=120)
    assert (rank.returncode, out) == (EXIT_LOST, "")
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert f"could not join 2 ranks at 127.0.0.1:{port}: " in line and "address already in use" in line
    assert line.endswith(
        "; another job is there: wait for its end, or give this one a port of its own, as --master_port or MASTER_PORT"
    )


@pytest.mark.cluster
def test_ranks_with_other_keys_end_before_anything_is_loaded(tree: dict[str, Any]) -> None:
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    keys = (["local.lr=0.25"], ["local.lr=0.5"])
    arguments = [sys.executable, *command(tree, "other-keys", 1)]
    ranks = [start([*arguments, *keys[rank]], **place, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]
    told = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT_USER_ERROR] * 2, told
    lines = [line for _, err in told for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: local.lr: 0.5: rank 1 on ") and "started with 0.25" in lines[0]
    assert not (Path(tree["output"]) / "other-keys").exists()


def test_a_broken_promise_of_slurm_is_refused(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("SLURM_JOB_ID", "7")
    bare.setenv("SLURM_NTASKS", "4")
    with pytest.raises(UserError, match=r"^SLURM_NTASKS: 4: SLURM promised 4 tasks but .* started alone; start it with srun"):
        detect_launch()
    bare.setenv("SLURM_NTASKS", "1")
    assert detect_launch() == Launch("python", 0, 1, 0)


def test_a_shell_within_an_allocation_is_no_step(bare: pytest.MonkeyPatch) -> None:
    """The shell that salloc opens on the first node has a task number, too."""
    interactive = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}
    for name, value in (interactive | {"SLURM_STEP_NUM_TASKS": "1"}).items():
        bare.setenv(name, value)
    with pytest.raises(UserError, match=r"^SLURM_NTASKS: 4: SLURM promised 4 tasks but .* started alone; start it with srun"):
        detect_launch()
    bare.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(
        UserError, match=r"^SLURM_NTASKS: 4: srun promised 4 tasks but this step has 1; start all with one srun"
    ):
        detect_launch()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.[1-3,7]", "127.0.0.1"),
        ("127.0.[0-1].[3,1-2],no-such-node[1-2]", "127.0.0.3"),
        ("localhost,no-such-node[1-2]", "localhost"),
    ],
)
def test_ranks_of_several_nodes_meet_on_the_first(nodes: str, first: str, bare: pytest.MonkeyPatch) -> None:
    """Not where srun was typed, which may be a login node, nor on the first node of the allocation."""
    step = {"SLURM_JOB_ID": 1251, "SLURM_STEP_ID": 3, "SLURM_PROCID": 1, "SLURM_NTASKS": 2, "SLURM_STEP_NUM_NODES": 2}
    elsewhere = {"SLURM_LAUNCH_NODE_IPADDR": "203.0.113.1", "SLURM_JOB_NODELIST": "no-such-node[0-9]"}
    for name, value in (step | elsewhere | {"SLURM_STEP_NODELIST": nodes}).items():
        bare.setenv(name, str(value))
    bare.setenv("GLOO_SOCKET_IFNAME", "lo")
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # set, so that nothing is left behind when the patch is undone
        bare.setenv(name, "")
        os.environ.pop(name)
    assert detect_launch() == Launch("srun", 1, 2, 0)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (first, "12019")


def test_a_first_node_that_nobody_knows_is_refused(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = {"SLURM_JOB_ID": 1, "SLURM_STEP_ID": 0, "SLURM_PROCID": 1, "SLURM_NTASKS": 2, "SLURM_STEP_NUM_NODES": 2}
    for name, value in (step | {"SLURM_STEP_NODELIST": "no-such-node[1-2]", "PATH": tmp_path}).items():
        bare.setenv(name, str(value))
    with pytest.raises(UserError, match=r"^MASTER_ADDR: scontrol -o show node no-such-node1: .*; export MASTER_ADDR and"):
        detect_launch()


def test_a_broken_promise_of_mpirun_is_refused(tree: dict[str, Any]) -> None:
    """mpirun of one MPI and mpi4py on another: every process believes to be alone."""
    arguments = [sys.executable, *command(tree, "alone", 1), "--print-config"]
    process = start(arguments, OMPI_COMM_WORLD_SIZE=3, OMPI_COMM_WORLD_RANK=0)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert "error: mpirun: 3: it promised 3 ranks but mpi4py sees 1; " in error and "Traceback" not in error + out


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch("python", 0, 1, 0)),
        ({"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "CROSS_RANK": 1}, Launch("deepspeed", 3, 4, 1)),
        ({"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3, "TORCHELASTIC_RUN_ID": "x"}, Launch("torchrun", 3, 4, 3)),
        ({"RANK": 0, "WORLD_SIZE": 2}, Launch("environment", 0, 2, 0)),
        (
            {"SLURM_JOB_ID": 5, "SLURM_STEP_ID": 0, "SLURM_PROCID": 6, "SLURM_NTASKS": 8, "SLURM_LOCALID": 2},
            Launch("srun", 6, 8, 2),
        ),
    ],
)
def test_who_is_who(bare: pytest.MonkeyPatch, variables: dict[str, Any], expected: Launch) -> None:
    for name, value in variables.items():
        bare.setenv(name, str(value))
    bare.setenv("MASTER_ADDR", "127.0.0.1")  # set, so that nothing is left behind when the patch is undone
    bare.setenv("MASTER_PORT", "29500")
    assert detect_launch() == expected
