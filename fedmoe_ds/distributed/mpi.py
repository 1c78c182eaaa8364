"""MPI: bytes between ranks. Nothing is pickled, as mpi4py's lower-case calls would do, and nobody spins while waiting."""

from __future__ import annotations

import itertools
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

_SPIN_S = 1e-4  # how long to look at a pending MPI call without a pause: a nap takes about as long
_NAP_S = (2e-5, 2e-3)  # first and longest pause between two later looks
_left_alone = threading.Event()


def gather(comm: MPI.Comm, payload: bytes) -> list[bytes]:
    """Every rank's bytes, in rank order, on every rank."""
    sizes = np.zeros(comm.size, dtype=np.int64)
    wait(comm.Iallgather(np.array([len(payload)], dtype=np.int64), sizes))
    everything = np.empty(int(sizes.sum()), dtype=np.uint8)
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    mine = np.array(bytearray(payload), dtype=np.uint8)
    wait(comm.Iallgatherv(mine, (everything, (sizes.tolist(), starts[:-1]))))
    return [everything[start:stop].tobytes() for start, stop in itertools.pairwise(starts)]


def broadcast(comm: MPI.Comm, payload: bytes) -> bytes:
    """Rank 0's bytes, on every rank."""
    size = np.array([len(payload)], dtype=np.int64)
    wait(comm.Ibcast(size, 0))
    content = np.array(bytearray(payload), dtype=np.uint8) if comm.rank == 0 else np.empty(int(size[0]), dtype=np.uint8)
    wait(comm.Ibcast(content, 0))
    return content.tobytes()


def gather_json(comm: MPI.Comm, value: Any) -> list[Any]:
    """Every rank's JSON value, in rank order, on every rank."""
    return [json.loads(payload) for payload in gather(comm, json.dumps(value).encode())]


def wait(request: Any) -> None:
    """Wait for a pending MPI call with naps between looks: most MPI libraries would spin and take a core.

    Waits for ever once the process has left MPI alone.
    """
    nap, longest = _NAP_S
    awake_until = time.monotonic() + _SPIN_S
    while _left_alone.is_set() or not request.Test():
        if time.monotonic() > awake_until:
            time.sleep(nap)
            nap = min(1.5 * nap, longest)


def leave_alone() -> None:
    """No waiting thread looks at MPI again: the job is over, and this process is about to end with the job's code.

    Open MPI aborts a rank that finds a connection closed by the end of another one. The launcher's code would be MPI's (14)
    then, and nobody would know that the job may be started again.
    """
    _left_alone.set()
