"""One start of a run on several hosts, without a launcher: its ranks, one fault, and how it ended.

with Start(hosts, config, folder, fault, late_clock) as start:
    start.reach(pace, rounds)
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
from faults import Fault, newest_round
from hosts import Hosts
from launching import SCRIPT, changed

from fedmoe_ds.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR

ENDS_S = 40.0
"""All ranks are gone so long after a fault: 6 s of silence, and the rest for slow cores."""
BEGINS_S = 120.0


class Start:
    """The ranks of one start, one per host; leaving the block ends what is left of them."""

    def __init__(self, hosts: Hosts, config: dict[str, Any], folder: Path, fault: Fault, late_clock: Path) -> None:
        self.hosts, self.fault = hosts, fault
        self.run = Path(config["output"]) / config["name"]
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(json.dumps(changed(config, topology={"ep_size": fault.ep_size})))
        command = [sys.executable, str(SCRIPT), "--config", str(folder / "config.yaml"), "--resume", "auto"]
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

    def begun(self) -> bool:
        """Whether the state is there and the first round of this start begins."""
        words = self._errors[0].read_text(errors="replace")
        return "resumed from" in words or "foundation: perplexity" in words

    def until(self, condition: Callable[[], Any], poll_s: float = 0.02) -> None:
        """Wait for something that must happen while all ranks are there."""
        deadline = time.monotonic() + BEGINS_S
        while not condition():
            codes = [rank.poll() for rank in self.ranks]
            assert not any(code is not None for code in codes), f"{self.fault}: it ended before its time: {codes}\n{self.words}"
            assert time.monotonic() < deadline, f"{self.fault}: nothing happened in {BEGINS_S:.0f} s\n{self.words}"
            time.sleep(poll_s)

    def reach(self, pace: dict[str, float], rounds: int) -> None:
        """Wait for the moment of the fault; `pace` is the CPU time of the phases of a round on one rank."""
        self.until(self.begun)
        base = newest_round(self.run)
        if self.fault.after and base < rounds - 4:
            self.until(lambda: newest_round(self.run) >= base + self.fault.after)
        if self.fault.phase == "checkpoint":
            seen, folder = newest_round(self.run), self.run / "checkpoints"
            # It may have been written between two looks: then the fault comes right after it.
            self.until(lambda: any(folder.glob(".writing-*")) or newest_round(self.run) > seen, poll_s=0.0005)
            time.sleep(0.01 * self.fault.place)
            return
        train, first = pace["train"] / self.fault.ranks, self.process(0)
        work = self.fault.place * train if self.fault.phase == "train" else train + self.fault.place * pace["evaluate"]
        goal = first.cpu_times().user + work
        self.until(lambda: first.cpu_times().user >= goal)

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
