"""launch/submit.py: what it writes for SLURM, and what it refuses before anything is submitted."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from every import every
from federations import make_config, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import REPOSITORY

from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.out_of_memory import OutOfMemory
from fedmoe_ds.commands import submit as submit_command
from fedmoe_ds.config import Config
from fedmoe_ds.distributed.stop_request import MAX_REQUEUES
from fedmoe_ds.errors import EXIT_LOST, EXIT_STOPPED, UserError
from fedmoe_ds.federation.shortage import for_next_start
from fedmoe_ds.planner.allocation import asked_gpus, check_gpus, hardware_of, limit_s
from fedmoe_ds.planner.batch_job import Checked, Request, check
from fedmoe_ds.planner.hardware import load_hardware
from fedmoe_ds.planner.slurm import compose, log_folder, submit
from fedmoe_ds.shell import command_line, quoted

COMMAND = REPOSITORY / "launch" / "submit.py"


AUTO = {"execution": {"reproducible": "auto"}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file with everything that it names; for jobs on any device, so without `bitwise`."""
    root = tmp_path_factory.mktemp("submit")
    write_inputs(root)
    path = root / "config.yaml"
    path.write_text(json.dumps(make_config(root, "study-7", AUTO).model_dump(mode="json")))
    return path


def stand_ins(folder: Path, **tools: str) -> str:
    """A search path that begins with tools of this name, whose programs in bash these are; they are in `folder/bin`."""
    (folder / "bin").mkdir()
    for tool, body in tools.items():
        (folder / "bin" / tool).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / tool).chmod(0o755)
    return f"{folder / 'bin'}:{os.environ['PATH']}"


def header(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def written(request: Request) -> str:
    found = check(request)
    return compose(request, found, REPOSITORY, log_folder(found.config))


def test_the_script(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logs = config.parent / "runs" / "slurm"
    script = written(
        Request(
            config,
            ("federation.rounds=20", "data.columns={instruction: instruction}"),
            nodes=4,
            gpus_per_node=2,
            mem="0",
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
        "--cpus-per-task=4",
        "--mem=0",
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
    assert f"export FEDMOE_LAUNCH={REPOSITORY / 'fedmoe_ds' / 'commands'}" in script.splitlines()
    template = (REPOSITORY / "slurm" / "train.sbatch").read_text()
    assert script.partition("# --- end of header ---")[2] == template.partition("# --- end of header ---")[2]
    assert not logs.exists()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_dry_run_prints_the_script_and_writes_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(config), "--nodes", "2", "seed=3", "--tasks-per-node", "2", "topology.ep_size=4", "--dry-run"]
    assert submit_command.main(words) == 0
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
        ({"gpus_per_node": 1, "overrides": ["execution.reproducible=bitwise"]}, r"reproducible: bitwise: on cuda "),
        ({"overrides": ["topology.device=cuda"]}, r"topology.device: cuda: the job asks for no GPU; add --gpus-per-node"),
        *(
            ({"overrides": ["topology.device=cuda"], "sbatch": [option]}, r"topology.device: cuda: the job asks for no GPU; ")
            for option in ("gpus=0", "--gres=gpu:0", "gres=gpu:a100:0", "gres=gpumem:1", "tres-bind=gres/gpu:closest")
        ),
        ({"nodes": 0}, r"--nodes: 0: is no number of them; give at least 1"),
        ({"gpus_per_node": -1}, r"--gpus-per-node: -1: "),
        ({"partition": "a\n#SBATCH --wrap=x"}, r"--partition: 'a.*': is empty or no line of text"),
        ({"sbatch": ["nodes=4"]}, r"--sbatch: nodes=4: has a flag of its own; use --nodes"),
        ({"sbatch": ["requeue"]}, r"--sbatch: requeue: the script relies on it; leave it out"),
        ({"sbatch": ["Q os=1"]}, r"--sbatch: Q os=1: is no option of sbatch; write key=value"),
        ({"sbatch": ["qos="]}, r"--sbatch: qos: '': is empty"),
        ({"sbatch": ["mem=3G"]}, r"--sbatch: mem=3G: has a flag of its own; use --mem"),
        *(({"sbatch": [word]}, rf"--sbatch: {word}: a heterogeneous job; ") for word in (":", "hetjob", "het-group=1")),
        ({"gpus_per_node": 2, "overrides": ["topology.device=cpu"]}, r"device: cpu: the job asks for GPUs \(gpus-per-node=2\)"),
        ({"tasks_per_node": 4, "sbatch": ["gres=gpu:a100:2"]}, r"--tasks-per-node: 4: a node has 4 tasks and 2 GPUs \(gres="),
        ({"nodes": 2, "tasks_per_node": 2, "sbatch": ["gpus=3"]}, r"-node: 2: the job has 4 tasks and 3 GPUs \(gpus=3\)"),
        (
            {"nodes": 2, "tasks_per_node": 5, "sbatch": ["gpus=a100:4,h100:5"]},
            r"-node: 5: the job has 10 tasks and 9 GPUs \(gpus=a1",
        ),
        ({"cpus_per_gpu": 8}, r"--cpus-per-gpu: 8: the job asks for no GPU; use --cpus-per-task"),
        ({"cpus_per_task": 0}, r"--cpus-per-task: 0: is no number of them"),
        ({"hardware": "h100"}, r"--hardware: h100: is cuda, and the job's ranks are on cpu"),
        ({"overrides": ["data.source=/no/such/file.jsonl"]}, r"data.source: /no/such/file.jsonl: no such file"),
    ],
)
def test_refusals(config: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        written(Request(config, **changes))


@pytest.mark.parametrize(
    "option", ["gpus-per-task=1", "gres=gpu:2", "--gpus=2", "gres=nvme:1,gpu:a100", "tres-per-task=cpu=4,gres/gpu:1"]
)
def test_gpus_are_asked_for_in_several_ways(config: Path, option: str) -> None:
    """One GPU for each task is number 0 to every rank, which `devices` takes."""
    text = written(Request(config, overrides=["topology.device=cuda"], sbatch=[option]))
    assert f"#SBATCH --{option.removeprefix('--')}" in text


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ("gpus-per-node=2", [("node", 2, None)]),
        ("--gpus-per-task=a100:2", [("task", 2, "a100")]),
        ("gpus=h100:4,a100:2", [("job", 4, "h100"), ("job", 2, "a100")]),
        ("gres=gpu", [("node", 1, None)]),
        ("gres=nvme:1,gpu:a100_80gb:8", [("node", 8, "a100_80gb")]),
        ("tres-per-task=cpu=4,gres/gpu:1", [("task", 1, None)]),
        ("gres=gpu:0", []),
        ("gres=gpumem:4", []),
        ("qos=gpu", []),
    ],
)
def test_what_options_ask_for(option: str, found: list[tuple[str, int, str | None]]) -> None:
    assert [(gpus.per, gpus.count, gpus.type) for gpus in asked_gpus([option])] == found


@pytest.mark.parametrize(
    ("type_", "hardware"),
    [("a100", "a100"), ("nvidia_h100_80gb_hbm3", "h100"), ("A100-SXM4-80GB", "a100"), ("a100_40gb", None),
     ("a100_1g.5gb", None), ("v100", None), (None, None)],
)  # fmt: skip
def test_the_type_of_a_gpu_names_the_hardware(type_: str | None, hardware: str | None) -> None:
    """A type with another memory than the table's is another machine, and a part of a GPU is none."""
    found = hardware_of(None, asked_gpus([f"gres=gpu:{type_}:1" if type_ else "gres=gpu:1"]))
    assert (found.name if found else None) == hardware


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("10:30", 630), ("24:00:00", 86400), ("1-12", 129600), ("1-00:30", 88200), ("2-01:00:05", 176405),
     ("UNLIMITED", None), ("0", None), ("0:00", None), ("00:00:00", None), ("soon", None), (None, None)],
)  # fmt: skip
def test_limits_as_sbatch_takes_them(text: str | None, seconds: int | None) -> None:
    assert limit_s(text) == seconds


@pytest.mark.parametrize(
    ("changes", "expected", "gone"),
    [
        ({}, ["--cpus-per-task=1", "--signal=B:USR1@120"], []),
        ({"cpus_per_task": 6, "mem": "9G"}, ["--cpus-per-task=6", "--mem=9G"], []),
        ({"gpus_per_node": 2, "cpus_per_gpu": 8}, ["--cpus-per-gpu=8"], ["--cpus-per-task"]),
        ({"gpus_per_node": 2, "gpu_type": "h100"}, ["--gpus-per-node=h100:2", "--cpus-per-task=4"], []),
        ({"sbatch": ["mem-per-cpu=3G"]}, ["--mem-per-cpu=3G"], ["--mem="]),
        ({"sbatch": ["mem-per-gpu=9G"], "gpus_per_node": 1}, ["--mem-per-gpu=9G"], ["--mem=", "--mem-per-cpu"]),
    ],
)
def test_cores_and_memory_are_asked_for(config: Path, changes: dict[str, Any], expected: list[str], gone: list[str]) -> None:
    """By default as the configuration needs them; sbatch takes one way of counting each."""
    lines = header(written(Request(config, **changes)))
    assert set(expected) <= set(lines)
    assert not [line for line in lines if line.startswith(tuple(gone))]
    assert sum(line.startswith("--mem") for line in lines) == 1


@pytest.mark.parametrize(("option", "nodes"), [("gpus=a100:4,h100:4", 2), ("gres=gpu:a100:2,gpu:h100:2", 2)])
def test_gpus_of_several_types_add_up(option: str, nodes: int) -> None:
    check_gpus(asked_gpus([option]), nodes, 4)
    with pytest.raises(UserError, match=r"^--tasks-per-node: 5: .* tasks and [48] GPUs "):
        check_gpus(asked_gpus([option]), nodes, 5)


def test_memory_follows_the_ranks(config: Path) -> None:
    """Every rank of a node has its own; whole GiB."""
    one, four = (check(Request(config, tasks_per_node=tasks)).mem for tasks in (1, 4))
    assert 1024 <= one < four <= 4 * one and one % 1024 == 0


def test_the_job_is_checked_where_it_will_run(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fits into the GPUs of the type that is asked for, and their waves into the time; no data are read for it."""
    monkeypatch.setattr("fedmoe_ds.planner.workload.prepare", None)
    found = check(Request(config, gpus_per_node=4, gpu_type="h100"))
    assert found.config.topology.device == "auto" and found.lead == 120
    assert found.notes[0].startswith("assumed: ") and "per rank on h100, which has 74.5 GiB" in found.notes[1]
    assert "--hardware says it" in check(Request(config, gpus_per_node=4)).notes[1], "nobody knows what GPUs these are"
    with pytest.raises(UserError, match=r"^memory: \d+\.\d GiB per rank at ep_size 1 .*a rank has 0\.\d GiB; .* more memory"):
        small = make_hardware(config.parent / "small.json", memory_bytes=2**28)
        check(Request(config, gpus_per_node=4, hardware=str(small)))


def make_hardware(path: Path, **changes: Any) -> Path:
    """A calibration file of a GPU like h100, but for `changes`."""
    path.write_text(load_hardware("h100").model_copy(update=changes).model_dump_json())
    return path


def test_the_signal_comes_a_wave_before_the_limit(config: Path) -> None:
    """On slower hardware earlier; where that leaves too little of the job, it is refused."""
    fast = load_hardware("h100").compute
    leads = [
        check(Request(config, gpus_per_node=1, hardware=str(make_hardware(config.parent / "h.json", compute=slow)))).lead
        for slow in (fast, fast.slower(1e4), fast.slower(2e4))
    ]
    assert leads[0] == 120 < leads[1] < leads[2] <= 2 * leads[1] and all(lead % 10 == 0 for lead in leads)
    slow = str(make_hardware(config.parent / "h.json", compute=fast.slower(1e4)))
    request = Request(config, gpus_per_node=1, hardware=slow, time="10-00:00:00")
    assert f"--signal=B:USR1@{leads[1]}" in header(written(request))
    check(replace(request, time="0"))
    with pytest.raises(UserError, match=rf"^--time: 5: the ranks need {leads[1]} s of it to finish a wave and save, more than"):
        check(replace(request, time="5"))


@pytest.mark.parametrize(
    ("accelerator", "changes", "text"),
    [
        ("cpu", {"gpus_per_node": 1}, r"^DS_ACCELERATOR: cpu: sbatch passes it on to the job, which asks for GPUs; unset it"),
        ("cuda", {}, r"^DS_ACCELERATOR: cuda: sbatch passes it on to the job, which asks for no GPU; unset it"),
    ],
)
def test_what_the_environment_would_do_to_the_job(accelerator: str, changes: dict[str, Any], text: str, config: Path) -> None:
    with pytest.raises(UserError, match=text):
        check(Request(config, **changes), {"DS_ACCELERATOR": accelerator})
    check(Request(config), {"DS_ACCELERATOR": "cpu"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4", {"gpus_per_node": 4, "gpu_type": None}), ("a100:4", {"gpus_per_node": 4, "gpu_type": "a100"}), (None, {})],
)
def test_gpus_of_a_node_may_have_a_type(text: str | None, expected: dict[str, Any]) -> None:
    assert submit_command.gpus_asked(text) == expected
    with pytest.raises(UserError, match=r"^--gpus-per-node: a100: is no number of them; write 4, or with a type a100:4"):
        submit_command.gpus_asked("a100")


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
    done = bash(REPOSITORY / "slurm" / f"{name}.sbatch", SLURM_SUBMIT_DIR=str(tmp_path), FEDMOE_LAUNCH="/elsewhere")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: FEDMOE_LAUNCH: /elsewhere: has no {name}.py; ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["train", "scaling"])
def test_scripts_refuse_heterogeneous_jobs(name: str, bash: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """srun would start the ranks of the first component alone."""
    done = bash(REPOSITORY / "slurm" / f"{name}.sbatch", FEDMOE_HOME=str(REPOSITORY), SLURM_HET_SIZE="2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: SLURM_HET_SIZE: 2: a heterogeneous job; ")


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "6"}, "6"),
        ({"SLURM_CPUS_ON_NODE": "64", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16"}, "8"),
        ({"SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "4"}, "1"),
        ({}, "1"),
        ({"SLURM_CPUS_PER_GPU": "7", "SLURM_CPUS_ON_NODE": "56"}, None),
    ],
)
@pytest.mark.parametrize("name", ["train", "scaling"])
def test_ranks_get_the_cores_of_the_job(
    name: str,
    variables: dict[str, str],
    cores: str | None,
    tmp_path: Path,
    bash: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """What was asked for, or all that the job has; with cores by GPU srun finds them itself, and takes no other word."""
    path = stand_ins(
        tmp_path,
        scontrol="echo n1",
        srun=f'echo "$@" > {tmp_path}/said',
        python=f'echo "$SRUN_CPUS_PER_TASK" > {tmp_path}/said',
    )
    fixed = {
        "FEDMOE_HOME": str(REPOSITORY),
        "FEDMOE_LOGS": str(tmp_path / "logs"),
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "7",
    }
    fixed |= {"FEDMOE_PYTHON": str(tmp_path / "bin" / "python"), "SLURM_ARRAY_TASK_ID": "0"}
    assert bash(REPOSITORY / "slurm" / f"{name}.sbatch", PATH=path, **fixed, **variables).returncode == 0
    said = (tmp_path / "said").read_text().split()
    if name == "train":
        said = [word.partition("=")[2] for word in said if word.startswith("--cpus-per-task")]
    assert said == ([cores] if cores else [])


@pytest.fixture
def bash(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a batch script outside of any job."""

    def run(script: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {"PATH": os.environ["PATH"]} | variables
        return subprocess.run(["bash", script], env=kept, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("name", ["train", "scaling"])
def test_requeues_that_bring_smaller_passes_are_not_counted(
    name: str, tmp_path: Path, bash: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Each start says another shortage, until one says the same again."""
    client = Client(0, "c", 1, 9, 9, 9)
    for number, sequences in enumerate([128, 64, 32, 32, 32]):
        words = f"error: rank 0 on n{number}, round 1: {for_next_start(OutOfMemory(client, sequences), 'smaller')}"
        (tmp_path / f"said-{number}").write_text(f"{words}\n")
    # The ranks under srun write into their logs, scaling.py to its own output.
    path = stand_ins(
        tmp_path,
        scontrol="echo n1",
        srun=f'cat "{tmp_path}/said-$SLURM_RESTART_COUNT" >> "{tmp_path}/logs/7/rank-1.log"; exit 76',
        python=f'cat "{tmp_path}/said-$SLURM_RESTART_COUNT" >&2; exit 76',
    )
    said = []
    for start in range(5):
        variables = {"FEDMOE_HOME": str(REPOSITORY), "FEDMOE_LOGS": str(tmp_path / "logs"), "MAX_RESTARTS": "1"}
        variables |= {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7"}
        variables |= {"FEDMOE_PYTHON": str(tmp_path / "bin" / "python"), "SLURM_RESTART_COUNT": str(start)}
        done = bash(REPOSITORY / "slurm" / f"{name}.sbatch", PATH=path, **variables)
        assert done.returncode == 76, done.stderr
        assert name == "train" or "do not fit into memory" in done.stdout, "the log is in the job's output, too"
        said.append([line[20:] for line in done.stdout.splitlines() if "requeueing" in line or "ends with" in line])
    smaller = ["memory ran out, passes get smaller; requeueing"]
    assert said == [smaller, smaller, smaller, ["a rank was lost (1 of at most 1 restarts); requeueing"], ["ends with 76"]]


@pytest.mark.parametrize("name", ["train", "scaling"])
def test_a_job_that_brings_nothing_is_not_queued_again(
    name: str, tmp_path: Path, bash: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """What counts is the run (test_requeue_guard.py); the script says how many it takes, and leaves a mistake's code alone."""
    counts = f'echo >> "{tmp_path}/stops"; [ "$(wc -l < "{tmp_path}/stops")" -gt "$FEDMOE_MAX_REQUEUES" ] && exit 2; exit 75'
    path = stand_ins(tmp_path, srun=counts, python=counts, scontrol="echo n1")
    ends = []
    for start in range(3):
        variables = {"FEDMOE_HOME": str(REPOSITORY), "FEDMOE_LOGS": str(tmp_path / "logs"), "MAX_REQUEUES": "2"}
        variables |= {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7"}
        variables |= {"FEDMOE_PYTHON": str(tmp_path / "bin" / "python"), "SLURM_RESTART_COUNT": str(start)}
        done = bash(REPOSITORY / "slurm" / f"{name}.sbatch", PATH=path, **variables)
        said = [line[20:] for line in done.stdout.splitlines() if "requeueing" in line or "ends with" in line]
        ends.append((done.returncode, said))
    assert ends == [(75, ["stopped, to be continued; requeueing"])] * 2 + [(2, ["ends with 2"])], ends


@pytest.mark.parametrize("counted", [False, True])
def test_a_start_that_cannot_count_its_stop_ends_as_a_loss(counted: bool) -> None:
    """Stopped while it imports: the script counts losses; without one that counts, it is a stop as any other."""
    program = (
        "import os, signal, time; from fedmoe_ds.distributed.stop_request import StopRequest\n"
        "StopRequest().install(); os.kill(os.getpid(), signal.SIGUSR1); time.sleep(60)"
    )
    given = {name: value for name, value in os.environ.items() if name != MAX_REQUEUES}
    given |= {MAX_REQUEUES: "3"} if counted else {}
    done = subprocess.run([sys.executable, "-c", program], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == (EXIT_LOST if counted else EXIT_STOPPED)
    assert done.stderr == "stopped by SIGUSR1 before anything was begun; start the same command again\n"


# What somebody may have in a name, a path or a value.
HOSTILE = {
    "newline": "a\n#SBATCH --wrap=touch${IFS}forged",
    "command": "a\ntouch forged\n",
    "carriage return": "a\rb",
    "line separator": "a\u2028touch forged",
    "escape": "a\x1b[2Jb",
    "override": "a\u202eb",
    "undecodable": "a\udcffb",
    "quotes": "a'; touch forged; '",
    "double quotes": 'a"; touch forged; "',
    "substitution": "$(touch forged)`touch forged`",
    "percent": "a%j%u",
    "backslash": "a\\nb\\",
    "comment": "a # b",
    "tab": "a\tb",
}


def test_a_configuration_of_the_package_is_submitted_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job may start in another folder than the one in which it was asked for by name."""
    monkeypatch.chdir(tmp_path)
    script = compose(Request(Path("quickstart")), Checked(Config()), tmp_path, tmp_path)
    assert f"set -- --config {REPOSITORY / 'configs' / 'quickstart.yaml'} " in script


@pytest.fixture(scope="module")
def planned(config: Path) -> Checked:
    return check(Request(config))


def lines_of(script: str) -> list[str]:
    """What was written before the template."""
    written, marker, _ = script.partition("# --- end of header ---\n")
    assert marker
    return written.split("\n")[:-1]


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize(
    "place", ["output", "working folder", "partition", "account", "time", "comment", "override", "config", "home"]
)
def test_nothing_becomes_a_line_of_the_script(
    place: str, kind: str, planned: Checked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every place of the script, every hostile value: refused in one line, or there as one word on one line that prints."""
    text = HOSTILE[kind]
    folder, home = tmp_path, REPOSITORY
    keys: dict[str, Any] = {"config": tmp_path / "config.yaml"}
    if place == "output":
        folder = tmp_path / text
    elif place == "working folder":
        (tmp_path / text).mkdir(parents=True)
        monkeypatch.chdir(tmp_path / text)
    elif place == "home":
        home = tmp_path / text
        (home / "slurm").mkdir(parents=True)
        (home / "slurm" / "train.sbatch").write_text((REPOSITORY / "slurm" / "train.sbatch").read_text())
    else:
        value: Any = [f"comment={text}"] if place == "comment" else [f"name={text}"] if place == "override" else text
        keys |= {
            {"comment": "sbatch", "override": "overrides"}.get(place, place): tmp_path / text if place == "config" else value
        }
    in_header = place not in ("override", "config", "home")
    try:
        script = compose(Request(**keys), planned, home, folder)
    except UserError as error:
        assert in_header and not text.isprintable() and str(error).isprintable()
        return
    assert text.isprintable() or not in_header
    lines = lines_of(script)
    assert every(line.isprintable() for line in lines), "one line, and a terminal shows it"
    assert [line.split("=")[0].split(" ")[0] for line in lines].count("set") == 1
    heads = [line for line in lines if line.startswith("#SBATCH")]
    assert len(heads) == len(header(script)) and not any(line.startswith(("touch", "forged")) for line in lines)
    told = run_bash("\n".join([*lines, 'printf "%s\\0" "$FEDMOE_HOME" "$FEDMOE_LOGS" "$@"']), tmp_path)
    expected = [str(home), str(folder), "--config", str(keys["config"]), *keys.get("overrides", ())]
    assert told == expected, "and bash reads what was meant"
    assert not list(tmp_path.rglob("forged"))


def run_bash(script: str, folder: Path) -> list[str]:
    done = subprocess.run(["bash"], input=os.fsencode(script), cwd=folder, capture_output=True, check=True)
    return [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@settings(max_examples=60, deadline=None)
def test_bash_reads_a_word_as_it_was(word: str) -> None:
    shown = quoted(word)
    assert shown.isprintable()
    done = subprocess.run(["bash"], input=f"printf %s {shown}".encode(), capture_output=True, check=True)
    assert done.stdout.decode() == word
    assert command_line(["a", word]) == f"a {shown}"


def test_percent_signs_stand_for_themselves(planned: Checked, tmp_path: Path) -> None:
    script = compose(Request(tmp_path / "c.yaml"), planned, REPOSITORY, tmp_path / "100%j")
    assert f"--output={tmp_path}/100%%j/%j.out" in header(script)


def test_logs_are_not_written_through_links(tmp_path: Path, bash: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Of the job, and of the ranks."""
    tools = stand_ins(tmp_path, scontrol="echo n1", srun="echo n1")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for script, job in (("train", "SLURM_JOB_ID"), ("scaling", "SLURM_ARRAY_JOB_ID")):
        for place in (f"{script}/7", f"{script}/8/rank-0.log", f"{script}/8/rank-3.log"):
            path = tmp_path / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(victim if path.suffix else victim.parent)
            variables = {"FEDMOE_HOME": str(REPOSITORY), "FEDMOE_LOGS": str(tmp_path / script), "SLURM_ARRAY_TASK_ID": "0"}
            variables[job] = place.split("/")[1]
            done = bash(REPOSITORY / "slurm" / f"{script}.sbatch", PATH=tools, **variables)
            assert done.returncode == 2 and "there is a symbolic link" in done.stderr and victim.read_text() == "mine", place
            path.unlink()


@pytest.mark.parametrize("name", ["train", "scaling"])
def test_losses_count_since_the_newest_checkpoint(
    name: str, tmp_path: Path, bash: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Each start is lost: before it had the run folder, then with it, then after each of two checkpoints of one round."""
    run = tmp_path / "runs" / "study 7"
    (run / "checkpoints").mkdir(parents=True)
    has = f'echo "{run}" > "$FEDMOE_RUN_FILE"'
    saves = f'rm -rf "{run}/checkpoints/round-00000-partial"; mkdir "{run}/checkpoints/round-00000-partial"'
    starts = [":", has, f"{has}; {saves}", ":", f"{has}; {saves}", has, ":"]
    body = f'case "$SLURM_RESTART_COUNT" in {" ".join(f"{n}) {do};;" for n, do in enumerate(starts))} esac; exit 76'
    path = stand_ins(tmp_path, srun=body, python=body, scontrol="echo n1")
    ends = []
    for start in range(len(starts)):
        variables = {"FEDMOE_HOME": str(REPOSITORY), "FEDMOE_LOGS": "logs", "MAX_RESTARTS": "2"}
        variables |= {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7"}
        variables |= {"FEDMOE_PYTHON": str(tmp_path / "bin" / "python"), "SLURM_RESTART_COUNT": str(start)}
        done = bash(REPOSITORY / "slurm" / f"{name}.sbatch", PATH=path, **variables)
        assert done.returncode == 76 and not done.stderr, done.stderr
        ends += [line[20:] for line in done.stdout.splitlines() if "requeueing" in line or "ends with" in line]
    counted = [1, 2, 1, 2, 1, 2]
    assert ends == [*(f"a rank was lost ({lost} of at most 2 restarts); requeueing" for lost in counted), "ends with 76"]
    (listed,) = (tmp_path / "logs" / "7").glob("lost*")
    assert len(listed.read_text().splitlines()) == len(starts), "all losses stay listed"
