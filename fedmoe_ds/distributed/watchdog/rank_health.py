"""Rank health: what a rank knows about another one, and the verdict when something is wrong with it.

Everything is judged by this process's own monotonic clock: hosts' times of day may disagree.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_AGAIN = "start again with --resume auto"


@dataclass(frozen=True)
class Limits:
    """Seconds. `silence` without a sign of life, `waiting` in one collective."""

    silence: float
    waiting: float
    ranks: int = 2

    @property
    def beat(self) -> float:
        """Pause between two signs of life; in a large world longer, so that rank 0 reads no more than 400 a second."""
        return min(max(0.25, self.ranks / 400), self.silence / 5)  # five beats fit into the limit


@dataclass(frozen=True)
class Process:
    """A process as seen on its own host.

    Attributes:
        space: the host's boot and the process's PID namespace.
        started: when it began, in clock ticks since the boot: another process that has got its number later began later.
    """

    pid: int
    space: str
    started: int

    @classmethod
    def own(cls) -> Process:
        return cls(os.getpid(), _space(), _started(os.getpid()))

    def kill_here(self) -> None:
        """Kill it if it is on this host, still: a stopped process would keep its launcher waiting for it."""
        with contextlib.suppress(OSError):  # gone, or of somebody else
            if self.space == _space() and self.started == _started(self.pid):
                os.kill(self.pid, signal.SIGKILL)


def _space() -> str:
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> int:
    """Field 22 of proc_pid_stat(5); the second one is a name in brackets, which may hold anything."""
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])


@dataclass
class Peer:
    """What is known about another rank."""

    rank: int
    host: str
    process: Process | None = None
    heard: float = field(default_factory=time.monotonic)
    state: dict[str, Any] = field(default_factory=lambda: {"round": 0, "phase": "start", "waiting": None, "for_s": 0.0})
    left: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def where(self) -> str:
        return f"round {self.state['round']}, {self.state['phase']}"

    @property
    def doing(self) -> str:
        """Where it was in the run, and what it waited for, when it was heard last."""
        waiting = self.state["waiting"]
        return f"{self.where}, {f'waiting in {waiting}' if waiting else 'computing'}"

    def belongs(self, collective: str) -> bool:
        """Whether it takes part in a collective, as far as it has said which groups it is in."""
        group, groups = collective.partition(" over ")[2], self.state.get("groups") or []
        # A rank that has not told its groups yet may be a member of any.
        return not groups or group in groups or group == "the world"

    def hear(self, state: dict[str, Any]) -> None:
        self.heard, self.state = time.monotonic(), state


def died(peer: Peer) -> str:
    """The verdict on a connection that ended without an announced exit."""
    return f"{peer.name} died (last heard in {peer.doing}); {_AGAIN}"


def garbled(peer: Peer, what: str) -> str:
    """The verdict on a rank that says what nobody understands."""
    return f"{peer.name} sent the watchdog {what} (last heard in {peer.doing}): do all hosts run the same version? {_AGAIN}"


def silent(peers: list[Peer], limits: Limits) -> list[Peer]:
    """Ranks that have said nothing for too long."""
    now = time.monotonic()
    return [peer for peer in peers if not peer.left and now - peer.heard > limits.silence]


def silence_message(found: list[Peer], limits: Limits) -> str:
    """The verdict on them."""
    now = time.monotonic()
    others = f" (and {len(found) - 1} more: {', '.join(peer.name for peer in found[1:4])})" if len(found) > 1 else ""
    return (
        f"{found[0].name} has been silent for {now - found[0].heard:.0f} s (last heard in {found[0].doing}){others}: "
        f"it was stopped, hangs, or lost its network (topology.silence_s is {limits.silence:g}); {_AGAIN}"
    )


def stuck(peers: list[Peer], limits: Limits) -> str | None:
    """The verdict on ranks that wait in one collective for too long, naming those that are not in it."""
    here = [peer for peer in peers if not peer.left]
    # `for_s` was true when it was heard last; a rank that waited then may have gone on waiting since.
    late = [p for p in here if p.state["waiting"] and p.state["for_s"] + time.monotonic() - p.heard > limits.waiting]
    if not late:
        return None
    waiting = late[0].state["waiting"]
    absent = [peer for peer in here if peer.state["waiting"] != waiting and peer.belongs(waiting)]
    # Ranks that compute before ranks that wait elsewhere, which may be victims of the same one; the longest first.
    absent.sort(key=lambda peer: (peer.state["waiting"] is not None, -peer.state["for_s"]))
    missing = ", ".join(f"{p.name} ({p.doing} for {p.state['for_s']:.0f} s)" for p in absent[:4])
    more = f" and {len(absent) - 4} more" if len(absent) > 4 else ""
    blame = f"not in it: {missing}{more}" if absent else "all ranks are in it: the network between them does not carry it"
    return (
        f"{late[0].name} has waited for {late[0].state['for_s']:.0f} s in {waiting} ({late[0].where}; topology.timeout_s is "
        f"{limits.waiting:g}); {blame}; {_AGAIN}"
    )
