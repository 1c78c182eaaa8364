"""One start of a run on several hosts, without a launcher: its ranks, one fault, and how it ended.

with Start(hosts, config, folder, fault, late_clock, left) as start:
    start.reach(pace)
    start.strike()
    seconds = start.end()
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from faults import Fault
from hosts import Hosts
from killing import Aim, program, seconds_into
from launching import SCRIPT, changed

from fedmoe_ds.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR

ENDS_S = 100.0
"""All ranks are gone so long after a fault at the latest: 6 s of silence, and the rest for a busy machine."""
BEGINS_S = 120.0


class Start:
    """The ranks of one start, one per host; leaving the block ends what is left of them.

    `left` rounds of the run are not saved yet: near its end no fault waits until some are.
    """

    def __init__(self, hosts: Hosts, config: dict[str, Any], folder: Path, fault: Fault, late_clock: Path, left: int) -> None:
        self.hosts, self.fault, self.folder = hosts, fault, folder
        self.run = Path(config["output"]) / config["name"]
        self.aim = None if fault.last else Aim(fault.phase, fault.after if left > 4 else 0, fault.place)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(json.dumps(changed(config, topology={"ep_size": fault.ep_size})))
        script = [str(SCRIPT)] if self.aim is None else program(self.aim, folder)
        command = [sys.executable, *script, "--config", str(folder / "config.yaml"), "--resume", "auto"]
        port, self._errors, self._outputs, self.ranks = _free_port(), [], [], []
        for rank in range(fault.ranks):
            world = {"RANK": rank, "WORLD_SIZE": fault.ranks, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
            world |= {"MASTER_ADDR": hosts.address(1), "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1}
            if fault.kind == "clock" and rank == fault.rank:
                world["LD_PRELOAD"] = late_clock
            self._outputs.append(folder / f"stdout-{rank}")
            self._errors.append(folder / f"stderr-{rank}")
            with self._outputs[-1].open("wb") as out, self._errors[-1].open("wb") as err:
                environment = os.environ | {name: str(value) for name, value in world.items()}
                inside = hosts.command(rank + 1, command)
                self.ranks.append(subprocess.Popen(inside, stdout=out, stderr=err, env=environment))

    def __enter__(self) -> Start:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for rank in self.ranks:
            if rank.poll() is None:  # nsenter stops itself when its child is stopped, and stays so when the child is killed
                rank.send_signal(signal.SIGCONT)
                rank.kill()
                rank.wait(10)
        for host in range(1, self.hosts.count + 1):
            self.hosts.link_up(host)
            self.hosts.sweep(host)

    @property
    def words(self) -> str:
        """What all ranks wrote."""
        return "\n".join(path.read_text(errors="replace") for path in [*self._outputs, *self._errors])

    def process(self, rank: int) -> psutil.Process:
        """The rank itself: the only child of the process that went into the host."""
        (child,) = psutil.Process(self.ranks[rank].pid).children()
        return child

    def until(self, condition: Callable[[], Any], poll_s: float = 0.02) -> None:
        """Wait for something that must happen while all ranks are there."""
        deadline = time.monotonic() + BEGINS_S
        while not condition():
            codes = [rank.poll() for rank in self.ranks]
            assert not any(code is not None for code in codes), f"{self.fault}: it ended before its time: {codes}\n{self.words}"
            assert time.monotonic() < deadline, f"{self.fault}: nothing happened in {BEGINS_S:.0f} s\n{self.words}"
            time.sleep(poll_s)

    def reach(self, pace: dict[str, float]) -> None:
        """Wait for the moment of the fault, in which rank 0 stays; `pace` as `killing.seconds_into` has it, of one rank."""
        assert self.aim is not None
        self.until((self.folder / "begun").exists, poll_s=0.001)
        if self.aim.phase == "checkpoint":
            time.sleep(0.01 * self.aim.place)
            return
        first, held = self.process(0), self.folder / "held"
        goal = first.cpu_times().user + seconds_into(self.aim, pace | {"train": pace["train"] / self.fault.ranks})
        self.until(lambda: held.exists() or first.cpu_times().user >= goal)

    def strike(self) -> None:
        """Do it."""
        kind, victim = self.fault.kind, self.process(self.fault.rank)
        if kind in ("kill", "stop"):
            victim.send_signal(signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        elif kind == "link":
            self.hosts.link_down(self.fault.rank + 1)
        elif kind == "disk":  # no file of this process may grow any more
            size = (self.run / "metrics.jsonl").stat().st_size if self.fault.rank == 0 else 1024
            victim.rlimit(resource.RLIMIT_FSIZE, (size, size))
        else:
            for rank in range(self.fault.ranks):
                self.process(rank).send_signal(signal.SIGTERM)
        (self.folder / "free").touch()

    def end(self) -> float:
        """Wait until all ranks are gone, each by itself, and check their exit codes; seconds that it took."""
        began, fault = time.monotonic(), self.fault
        stopped = [fault.rank] if fault.kind == "stop" else []
        self._wait([rank for rank in range(fault.ranks) if rank not in stopped])
        for rank in stopped:  # it wakes up in a world that is over
            with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                self.process(rank).send_signal(signal.SIGCONT)
            self.ranks[rank].send_signal(signal.SIGCONT)
        self._wait(stopped)
        seconds = time.monotonic() - began
        codes = [rank.returncode for rank in self.ranks]
        expected = {"kill": EXIT_LOST, "stop": EXIT_LOST, "link": EXIT_LOST, "disk": EXIT_USER_ERROR}.get(
            fault.kind, EXIT_STOPPED
        )
        wanted = [expected] * fault.ranks
        if fault.kind == "kill":
            wanted[fault.rank] = -signal.SIGKILL
        assert codes == wanted, f"{fault}: exit codes {codes}\n{self.words}"
        return seconds

    def _wait(self, ranks: list[int]) -> None:
        deadline = time.monotonic() + ENDS_S
        for rank in ranks:
            try:
                self.ranks[rank].wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{self.fault}: rank {rank} is still there after {ENDS_S:.0f} s\n{self.words}") from None

    def finish(self) -> str:
        """Wait for the end of the run; its digest."""
        for rank in self.ranks:
            code = rank.wait(BEGINS_S)
            assert code == 0, f"{self.fault}: exit code {code}\n{self.words}"
        digest, _ = self._outputs[0].read_text().splitlines()[-2:]
        return digest.removeprefix("digest: ")

    def resumed_from(self) -> str | None:
        """The checkpoint that this start says it continues."""
        for line in self._errors[0].read_text(errors="replace").splitlines():
            if "resumed from " in line:
                return line.rpartition("resumed from ")[2].strip()
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
