"""A real SLURM on this machine: slurmctld and one slurmd per virtual node, without systemd and cgroups.

    with Slurm(folder, nodes=4) as slurm:
        job = slurm.submit("slurm/train.sbatch", "--config", "...")
        slurm.finish(job)

Daemons stay in the foreground as children of this process, so their pids are known and they die with it; tasks of jobs are
recognised by the `SLURM_CONF` that only this cluster's processes carry. Ports and job numbers are drawn at random:
two clusters on one machine do not meet. Needs root and the Debian packages slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

BINARIES = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "munged", "setpriv")
NODES = "fedmoe-n"
"""Names of virtual nodes begin so; no resolver knows them."""
UP_S = 60.0
"""Daemons are there and registered by then."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
_NO_STEP = 0xFFFFFFF0
"""Numbers of steps that are none (the batch script, the allocation) begin here."""
_LAUNCHER_PREFIXES = ("SLURM_", "SBATCH_", "OMPI_", "PMI", "TORCHELASTIC_")
_LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "MASTER_ADDR", "MASTER_PORT")

_CONF = """\
ClusterName=fedmoe
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired; the default is two minutes.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
FirstJobId={first_job}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preempt_parameters}
JobRequeue=1
KillWait=5
MinJobAge=3600
InactiveLimit=0
ReturnToService=2
SlurmdTimeout=60
MessageTimeout=20
SlurmdParameters=config_overrides
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """A running cluster; leaving the block ends its jobs and its daemons.

    Args:
        folder: where everything lies that it writes; short, since unix sockets are among it.
        nodes: virtual nodes, named `fedmoe-n1` and so on.
        cpus: CPUs that each node claims to have.
        gpus: whether each node claims to have two GPUs, which are none.
        announces_preemption: whether a preempted job gets the signal that it asked for (`--signal`) or only SIGTERM.
    """

    def __init__(
        self, folder: Path, nodes: int = 4, cpus: int = 4, announces_preemption: bool = True, gpus: bool = False
    ) -> None:
        self.folder, self.nodes, self.cpus, self.gpus = folder, nodes, cpus, gpus
        self.address = _own_address()  # daemons that do not listen everywhere listen there
        self.environment = _clean_environment() | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._announces = announces_preemption
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        missing = [name for name in BINARIES if shutil.which(name) is None]
        assert not missing, f"SLURM tests need {', '.join(missing)}: install slurmctld slurmd slurm-client munge util-linux"
        assert os.geteuid() == 0, "SLURM tests start their own slurmd, which needs root"
        try:
            self._write_conf()
            self._start_daemons()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def call(self, *command: str | Path, cwd: Path | None = None, timeout_s: float = 60.0, **env: str) -> str:
        """Run a client command; its standard output without the last newline."""
        done = self.attempt(*command, cwd=cwd, timeout_s=timeout_s, **env)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def attempt(
        self, *command: str | Path, cwd: Path | None = None, timeout_s: float = 60.0, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a client command to whatever end."""
        return subprocess.run(
            [str(word) for word in command],
            env=self.environment | env,
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def submit(self, *arguments: str | Path, cwd: Path | None = None, **env: str) -> int:
        """`sbatch` with these arguments; the number of the job."""
        return int(self.call("sbatch", "--parsable", *arguments, cwd=cwd, **env).split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` says, key by key."""
        words = self.call("scontrol", "-o", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = 120.0, poll_s: float = 0.2) -> Any:
        """The first true value of `condition`."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{self.call('squeue', '-a')}"
            time.sleep(poll_s)
        return value

    def finish(self, number: int | str, timeout_s: float = 150.0) -> int:
        """Wait for the end of a job; its exit code. A job that was ended by a signal gives 128 + its number."""
        self.until(lambda: self.job(number)["JobState"] in ENDED, f"job {number}", timeout_s)
        code, signal = map(int, self.job(number)["ExitCode"].split(":"))
        return 128 + signal if signal else code

    def tasks(self, number: int) -> dict[int, psutil.Process]:
        """The living ranks of a job's steps by task number: the training processes that slurmd started."""
        return {
            int(variables["SLURM_PROCID"]): process
            for process, variables in self._processes()
            if variables.get("SLURM_JOB_ID") == str(number) and _is_rank(process, variables)
        }

    def _write_conf(self) -> None:
        draw = random.Random()  # from the operating system: another run must not draw the same
        for name in ("state", "log", *(f"spool/{node}" for node in self._names())):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        address = self.address
        ports = _free_ports(draw, address, self.nodes + 1)
        conf = _CONF.format(
            host=host,
            address=address,
            port=ports[0],
            folder=self.folder,
            first_job=draw.randint(1000, 60_000_000),
            grace_s=40,
            preempt_parameters="SlurmctldParameters=preempt_send_user_signal" if self._announces else "",
        )
        for name, port in zip(self._names(), ports[1:], strict=True):
            size = f"CPUs={self.cpus} RealMemory=64000 {'Gres=gpu:2' if self.gpus else ''}"
            conf += f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} {size} State=UNKNOWN\n"
        if self.gpus:
            conf += "GresTypes=gpu\n"
            for place in range(2):
                os.mknod(self.folder / f"gpu{place}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
            nodes = ",".join(self._names())
            (self.folder / "gres.conf").write_text(f"NodeName={nodes} Name=gpu File={self.folder}/gpu[0-1]\n")
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)

    def _names(self) -> list[str]:
        return [f"{NODES}{index}" for index in range(1, self.nodes + 1)]

    def _start_daemons(self) -> None:
        here = self.folder
        munge = [f"--{name}={here}/munge.{end}" for name, end in (("key-file", "key"), ("socket", "sock"), ("pid-file", "pid"))]
        self._start("munged", "--foreground", "--force", *munge, f"--seed-file={here}/munge.seed")
        self._until_up((here / "munge.sock").exists, "munged")
        self._start("slurmctld", "-D", "-i", "-f", str(here / "slurm.conf"))
        for name in self._names():
            self._start("slurmd", "-D", "-N", name, "-f", str(here / "slurm.conf"), log=name)
        self._until_up(self._all_idle, "sinfo")

    def _all_idle(self) -> bool:
        done = self.attempt("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D")
        return done.returncode == 0 and done.stdout.strip() == str(self.nodes)

    def _until_up(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for the cluster to come up; a daemon that has ended meanwhile is the reason why it does not."""
        deadline = time.monotonic() + UP_S
        while not condition():
            ended = [daemon for daemon in self._daemons if daemon.poll() is not None]
            assert not ended, f"{ended[0].args} ended:\n{self._logs()}"
            assert time.monotonic() < deadline, f"{what}: not ready\n{self._logs()}"
            time.sleep(0.05)

    def _logs(self) -> str:
        """The ends of all daemons' logs."""
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted((self.folder / "log").iterdir()))

    def _start(self, *command: str, log: str | None = None) -> None:
        """A daemon in the foreground; the kernel ends it should this process vanish."""
        with (self.folder / "log" / f"{log or command[0]}.log").open("wb") as out:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _end(self) -> None:
        """End jobs, daemons and whatever outlived both."""
        if len(self._daemons) > 1 and self._daemons[1].poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.attempt("scancel", "--signal=KILL", "--full", "--user=root", timeout_s=20)
                self.attempt("scancel", "--user=root", timeout_s=20)
        mine = {daemon.pid for daemon in self._daemons}
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(process.pid not in mine for process, _ in self._processes()):
            time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process, _ in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._daemons.clear()

    def _processes(self) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        """Every living process that carries this cluster's configuration, with its environment."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                    variables = process.environ()
                    if variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                        yield process, variables


def _is_rank(process: psutil.Process, variables: dict[str, str]) -> bool:
    """Whether slurmd started it, in a step that srun made, and it has become the training script."""
    step = variables.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" not in variables or not step.isdecimal() or int(step) >= _NO_STEP:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        parent, words = process.parent(), process.cmdline()
        return parent is not None and parent.name() == "slurmstepd" and any(Path(word).name == "train.py" for word in words)
    return False


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:  # no resolver knows this machine's name
        return "127.0.0.1"


def _clean_environment() -> dict[str, str]:
    """This process's environment without what a launcher above it may have left."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    }


def _free_ports(draw: random.Random, address: str, count: int) -> list[int]:
    """Ports of this address that nobody listens on, below those that the kernel hands to outgoing connections."""
    found: set[int] = set()
    while len(found) < count:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port := draw.randint(5000, 9999)))
            found.add(port)
    return sorted(found)
