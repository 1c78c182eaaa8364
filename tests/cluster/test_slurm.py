"""slurm/train.sbatch on a real SLURM, signals, lost ranks and mistakes included; always the digest of a local run."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from federations import make_config, run_alone, write_inputs
from launching import REPOSITORY, read_events

from fedmoe_ds.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR
from slurm import NODES, Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

SCRIPT = REPOSITORY / "slurm" / "train.sbatch"
SHORT: dict[str, Any] = {"federation": {"rounds": 1}, "local": {"max_steps": 2}, "evaluation": {"client_sequences": 0}}
# One client at a time, and rounds that consist of training: a signal hits in the middle of a round, not between two.
LONG: dict[str, Any] = {
    "federation": {"rounds": 3},
    "local": {"max_steps": None, "steps": 60},
    "execution": {"clients_in_flight": 1},
    "evaluation": {"every": 9, "client_sequences": 0},
}
# A stop is asked for once more between a checkpoint's begin and the next round; a round of LONG trains for four seconds.
SECOND_ROUND_BEGINS_S = 1.0
TWO = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and data of all runs here."""
    root = tmp_path_factory.mktemp("federation")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def short(root: Path) -> str:
    """The digest of the short run, on one rank, without SLURM."""
    return run_alone(make_config(root, "short", SHORT)).digest


@pytest.fixture(scope="module")
def long(root: Path) -> str:
    """The digest of the long run that nobody disturbs."""
    return run_alone(make_config(root, "long", LONG)).digest


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster of four nodes; a job goes back to the queue when one of partition `high` wants its nodes."""
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def terse_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster of two nodes that does not tell the batch script about preemption."""
    with Slurm(tmp_path_factory.mktemp("terse"), nodes=2, announces_preemption=False) as cluster:
        yield cluster


@dataclass(frozen=True)
class Run:
    """One job with its own folder; the run is <folder>/run."""

    slurm: Slurm
    folder: Path
    number: int

    @property
    def output(self) -> str:
        """The job's own output."""
        return (self.folder / "job.out").read_text()

    @property
    def digest(self) -> str:
        (line,) = [line for line in self.output.splitlines()[-8:] if line.startswith("digest: ")]
        return line.removeprefix("digest: ")

    def events(self, kind: str) -> list[dict[str, Any]]:
        return read_events(self.folder / "run", kind)

    def finish(self) -> int:
        """Exit code of the job."""
        return self.slurm.finish(self.number)

    def restarts(self) -> int:
        return int(self.slurm.job(self.number)["Restarts"])

    def round_done(self) -> None:
        """Wait until the second round trains: the first one's checkpoint is begun between its event and the next round."""
        self.slurm.until(lambda: self.events("round"), "first round")
        self.slurm.until(lambda: list((self.folder / "run" / "checkpoints").glob("*round-00001")), "its checkpoint")
        time.sleep(SECOND_ROUND_BEGINS_S)

    def assert_resumed_in_the_middle_of_a_round(self) -> None:
        (event,) = self.events("resume")
        assert event["checkpoint"].endswith("-partial"), event

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / str(self.number) / f"rank-{rank}.log").read_text()


def submit(
    slurm: Slurm, root: Path, folder: Path, change: dict[str, Any], *options: str, words: tuple[str, ...] = (), **env: str
) -> Run:
    """Submit a run as a user would."""
    tree = make_config(root, "run", change, {"output": str(folder)}).model_dump(mode="json")
    (folder / "config.yaml").write_text(json.dumps(tree))  # YAML, since JSON is
    fixed = {"FEDMOE_LOGS": str(folder / "logs"), "FEDMOE_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    arguments = (*options, f"--output={folder}/job.out", SCRIPT, "--config", folder / "config.yaml", *words)
    return Run(slurm, folder, slurm.submit(*arguments, cwd=REPOSITORY, **fixed | env))


def test_four_nodes(slurm: Slurm, root: Path, short: str, tmp_path: Path) -> None:
    run = submit(slurm, root, tmp_path, SHORT, "--nodes=4", "--ntasks-per-node=1")
    assert run.finish() == 0, run.output
    assert run.digest == short
    (event,) = run.events("run")
    assert (event["launcher"], event["world_size"]) == ("srun", 4)
    assert sorted(path.name for path in (tmp_path / "logs" / str(run.number)).iterdir()) == [
        *(f"rank-{rank}.log" for rank in range(4)),
        "run",
    ]
    assert (tmp_path / "logs" / str(run.number) / "run").read_text() == f"{tmp_path / 'run'}\n"
    assert "digest: " in run.log(0) and "digest: " not in run.log(1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("announced", [True, False])
def test_a_preempted_job_continues_by_itself(
    announced: bool, root: Path, long: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A site may send the signal that the job asked for, to the script; or SIGTERM, to the ranks only."""
    slurm = request.getfixturevalue("slurm" if announced else "terse_slurm")
    run = submit(slurm, root, tmp_path, LONG, *TWO)
    run.round_done()
    nodes = slurm.job(run.number)["NodeList"]
    wanted = ("--partition=high", f"--nodelist={nodes}", "--nodes=2", "--exclusive", "--output=/dev/null")
    intruder = slurm.submit(*wanted, "--wrap=sleep 1", cwd=tmp_path)
    assert slurm.finish(intruder) == 0
    assert run.finish() == 0, run.output
    assert run.restarts() == 1
    assert ("asked to stop" in run.output) == announced
    assert "stopped, to be continued; requeueing" in run.output
    run.assert_resumed_in_the_middle_of_a_round()
    assert run.digest == long


def test_the_signal_before_the_time_limit(slurm: Slurm, root: Path, long: str, tmp_path: Path) -> None:
    """`scancel -b --signal=USR1` is what SLURM itself does `--signal` seconds before the limit."""
    run = submit(slurm, root, tmp_path, LONG, *TWO)
    run.round_done()
    slurm.call("scancel", "--batch", "--signal=USR1", str(run.number))
    assert run.finish() == 0, run.output
    assert run.restarts() == 1
    assert "stopped, to be continued; requeueing" in run.output
    run.assert_resumed_in_the_middle_of_a_round()
    assert run.digest == long


def test_a_lost_rank(slurm: Slurm, root: Path, long: str, tmp_path: Path) -> None:
    """The kernel kills one rank; the others notice, and the job starts again from the last checkpoint."""
    run = submit(slurm, root, tmp_path, LONG, *TWO)
    run.round_done()
    slurm.tasks(run.number)[1].send_signal(signal.SIGKILL)
    assert run.finish() == 0, run.output
    assert run.restarts() == 1
    assert "a rank was lost (1 of at most 5 restarts); requeueing" in run.output
    assert "error: rank 1 " in run.log(0)
    (lost,) = (tmp_path / "logs" / str(run.number) / "lost").read_text().splitlines()
    assert "start 0, newest checkpoint:\trun round-00001 " in lost
    assert run.digest == long


def test_lost_ranks_end_the_job_at_last(slurm: Slurm, root: Path, tmp_path: Path) -> None:
    run = submit(slurm, root, tmp_path, LONG, *TWO, MAX_RESTARTS="0")
    slurm.until(lambda: run.events("run"), "start")
    slurm.tasks(run.number)[0].send_signal(signal.SIGKILL)
    assert run.finish() == EXIT_LOST, run.output
    assert run.restarts() == 0


def test_a_cancelled_job_stays_cancelled(slurm: Slurm, root: Path, tmp_path: Path) -> None:
    run = submit(slurm, root, tmp_path, LONG, *TWO)
    slurm.until(lambda: run.events("run"), "start")
    slurm.call("scancel", str(run.number))
    assert run.finish() == EXIT_STOPPED, run.output
    assert slurm.job(run.number)["JobState"] == "CANCELLED"
    assert run.restarts() == 0
    assert "requeueing" not in run.output


def test_a_mistake_ends_the_job(slurm: Slurm, root: Path, tmp_path: Path) -> None:
    run = submit(slurm, root, tmp_path, SHORT, *TWO, words=("federation.roundz=3",))
    assert run.finish() == EXIT_USER_ERROR
    assert run.restarts() == 0
    assert [line for line in run.output.splitlines() if line.startswith("error: ")] == [
        "error: federation.roundz: unknown key; did you mean 'rounds'?"
    ]


WHO = "from fedmoe_ds.distributed.launcher import detect_launch as d; from os import environ as e; w = d()"
SAY = "print(w.rank, w.world_size, w.local_rank, e['MASTER_ADDR'], e['MASTER_PORT'])"


def who(*launcher: str) -> list[str]:
    return [*launcher, sys.executable, "-c", f"{WHO}; {SAY}"]


def test_who_is_who(slurm: Slurm) -> None:
    """From outside of an allocation, in a part of one, and in a heterogeneous step whose first component is on a later node."""
    address = slurm.address
    for command in (
        who("srun", "--nodes=2", "--ntasks-per-node=2"),
        who("salloc", "--quiet", "--nodes=3", "--ntasks-per-node=2", "srun", "--nodes=2", "--ntasks=4", "--relative=1"),
        who(*f"srun --nodes=1 --ntasks=1 --nodelist={NODES}3 : --nodes=1 --ntasks=3 --nodelist={NODES}1".split()),
    ):
        lines = sorted(line.split() for line in slurm.call(*command, PYTHONPATH=str(REPOSITORY)).splitlines())
        assert [line[:2] for line in lines] == [[str(rank), "4"] for rank in range(4)], command
        assert {line[3] for line in lines} == {address}
        assert len({line[4] for line in lines}) == 1


def test_a_batch_script_without_srun_is_refused(slurm: Slurm, tmp_path: Path) -> None:
    script = tmp_path / "alone.sh"
    script.write_text(f"#!/bin/bash\nexec {sys.executable} {REPOSITORY}/launch/train.py --config x.yaml\n")
    job = slurm.submit("--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/job.out", script)
    assert slurm.finish(job) == EXIT_USER_ERROR
    assert "SLURM_NTASKS: 2: SLURM promised 2 tasks but this process was started alone" in (tmp_path / "job.out").read_text()


def test_submit(slurm: Slurm, root: Path, short: str, tmp_path: Path) -> None:
    """launch/submit.py writes a script, submits it, and the job finishes; the script can be submitted again by hand."""
    tree = make_config(root, "run", SHORT, {"output": str(tmp_path)}).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    command = [sys.executable, str(REPOSITORY / "launch" / "submit.py"), "--config", "config.yaml", "--nodes", "2"]
    options = ["--tasks-per-node", "1", "--partition", "main", "--time", "10", "--sbatch", "comment=two words", "seed=0"]
    said = slurm.call(*command, *options, cwd=tmp_path, timeout_s=120)
    facts = dict(line.split(": ", 1) for line in said.splitlines())
    number = int(facts["job"])
    assert slurm.finish(number) == 0
    assert f"digest: {short}" in Path(facts["output"]).read_text()
    assert (Path(facts["logs"]) / "rank-1.log").exists()
    assert slurm.job(number)["JobName"] == "run"
    refused = slurm.attempt(*command, "--partition", "nowhere", cwd=tmp_path, timeout_s=120)
    assert refused.returncode == EXIT_USER_ERROR
    assert refused.stderr.count("\n") == 1 and "invalid partition specified: nowhere" in refused.stderr


PACKED = """
import os, subprocess, sys
from fedmoe_ds.studies.resources import step_options
kept = {name: value for name, value in os.environ.items() if name != "SLURM_NTASKS_PER_NODE"}
say = ["bash", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME"]
subprocess.run(["srun", *step_options(int(sys.argv[1]), os.environ), *say], env=kept, check=True)
"""


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 6])
def test_a_point_fills_nodes_one_by_one(ranks: int, slurm: Slurm) -> None:
    """Nodes of four cores that are the job's alone, for two tasks each: not one task on each node, nor four on the first."""
    alone = ("salloc", "--quiet", "--nodes=3", "--ntasks-per-node=2", "--exclusive", "--mem=0")
    said = slurm.call(*alone, sys.executable, "-c", PACKED, str(ranks), PYTHONPATH=str(REPOSITORY))
    placed = dict(line.split() for line in said.splitlines())
    nodes = sorted(set(placed.values()))  # of whichever three the job has got
    assert [placed[str(rank)] for rank in range(ranks)] == [nodes[rank // 2] for rank in range(ranks)]


def test_a_heterogeneous_job_is_refused(slurm: Slurm, tmp_path: Path) -> None:
    """By its script, of which srun would start the first component alone."""
    kinds = ("--nodes=1", f"--output={tmp_path}/job.out", ":", "--nodes=1")
    job = slurm.submit(*kinds, SCRIPT, "--config", "x.yaml", cwd=REPOSITORY)
    assert slurm.finish(job) == EXIT_USER_ERROR
    assert (tmp_path / "job.out").read_text().startswith("error: SLURM_HET_SIZE: 2: a heterogeneous job; ")


@pytest.fixture(scope="module")
def gpu_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes of eight cores and two GPUs, which are none."""
    with Slurm(tmp_path_factory.mktemp("gpus"), nodes=2, cpus=8, gpus=True) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("option", "cores"),
    [("--cpus-per-task=2", "2"), ("--exclusive", "4"), ("--cpus-per-gpu=3", "unset 6"), ("--cpus-per-gpu=1", "unset 2")],
)
def test_a_rank_gets_the_cores_that_its_job_has(option: str, cores: str, gpu_slurm: Slurm, tmp_path: Path) -> None:
    """Of a job with cores by GPU the step has all, and no rank is told to do with one."""
    fake = tmp_path / "python"  # stands for the ranks
    fake.write_text('#!/bin/bash\necho "cores ${SLURM_CPUS_PER_TASK:-unset $SLURM_CPUS_ON_NODE}"\n')
    fake.chmod(0o755)
    fixed = {"FEDMOE_LOGS": str(tmp_path / "logs"), "FEDMOE_PYTHON": str(fake)}
    wanted = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", option, f"--output={tmp_path}/job.out")
    script = tmp_path / "train.sbatch"  # without the template's own word on cores
    script.write_text(SCRIPT.read_text().replace("#SBATCH --cpus-per-task=2\n", ""))
    job = gpu_slurm.submit(*wanted, script, cwd=REPOSITORY, **fixed)
    assert gpu_slurm.finish(job) == 0, (tmp_path / "job.out").read_text()
    said = {path.read_text().strip() for path in (tmp_path / "logs" / str(job)).glob("rank-*.log")}
    assert said == {f"cores {cores}"}


@pytest.mark.parametrize("name", ["train", "scaling"])
def test_cores_by_gpu_need_another_header(name: str, gpu_slurm: Slurm) -> None:
    """As slurm/README.md says of the scripts as they are shipped; sbatch refuses the job, so none is started."""
    wanted = ("--nodes=1", "--gpus-per-node=2", "--cpus-per-gpu=3", "--test-only")
    done = gpu_slurm.attempt("sbatch", *wanted, REPOSITORY / "slurm" / f"{name}.sbatch", cwd=REPOSITORY)
    assert done.returncode != 0 and "--cpus-per-gpu is mutually exclusive with --cpus-per-task" in done.stderr


def test_an_array_of_scaling_points(slurm: Slurm, root: Path, tmp_path: Path) -> None:
    """Element i is point i; the smaller point starts one rank only in an allocation of two."""
    config = make_config(root, "local", SHORT, {"federation": {"rounds": 2}})  # a study does not time the first
    (tmp_path / "base.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    study = {"base": "base.yaml", "axis": "ranks", "values": [1, 2], "scaling": "strong", "repeats": 1}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    words = ["--config", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "study")]
    scale = [sys.executable, str(REPOSITORY / "launch" / "scaling.py"), *words]
    points = slurm.call(*scale, "--points").splitlines()
    assert [point.split()[2] for point in points] == ["1", "2"]
    env = {"FEDMOE_LOGS": str(tmp_path / "logs"), "FEDMOE_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    script = REPOSITORY / "slurm" / "scaling.sbatch"
    options = ("--array=0-1", *TWO, f"--output={tmp_path}/%a.out")
    number = slurm.submit(*options, script, *words, cwd=REPOSITORY, **env)
    for point in range(2):
        assert slurm.finish(f"{number}_{point}") == 0, (tmp_path / f"{point}.out").read_text()
    runs = [event for path in (tmp_path / "study").iterdir() if path.is_dir() for event in read_events(path, "run")]
    assert sorted((event["launcher"], event["world_size"]) for event in runs) == [("srun", 1), ("srun", 2)]
    digests = {event["digest"] for path in (tmp_path / "study").iterdir() for event in read_events(path, "end")}
    assert digests == {run_alone(config).digest}
    assert "ranks" in slurm.call(*scale, "--collect")
