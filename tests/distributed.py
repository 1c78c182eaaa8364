"""Processes for tests: `run_distributed(fn, world_size, *args)` calls `fn(rank, *args)` on every rank, over gloo."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.multiprocessing as multiprocessing


class RankError(Exception):
    """A rank failed; the message holds its number and its traceback."""

    def __init__(self, rank: int, report: str) -> None:
        super().__init__(f"rank {rank} failed:\n{report}")
        self.rank = rank


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Run `fn(rank, *args)` in fresh processes that have joined one gloo world; return the results by rank.

    `fn` must be a module-level function. The first rank that fails ends all of them. The time limit leaves room for the
    one-off compilation of DeepSpeed's shared-memory operator.

    Raises:
        RankError: a rank raised or died.
        TimeoutError: some ranks were still running after `timeout_s`.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[Any] = []
    pipes: dict[Connection, int] = {}
    port = _free_port()
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            with _environment(rank, world_size, port):
                process = context.Process(target=_worker, args=(fn, rank, args, timeout_s, sender), daemon=True)
                process.start()
            sender.close()  # the child holds the only sending end now: its death ends the pipe
            processes.append(process)
            pipes[receiver] = rank
        return _collect(pipes, processes, timeout_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _collect(pipes: dict[Connection, int], processes: list[Any], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(pipes.values())} were still running after {timeout_s} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.pop(pipe)
            try:
                ok, content = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                raise RankError(rank, f"died with exit code {processes[rank].exitcode}") from None
            if not ok:
                raise RankError(rank, content)
            results[rank] = content
    return [results[rank] for rank in range(len(results))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _environment(rank: int, world_size: int, port: int) -> Iterator[None]:
    """What a launcher would set. The child inherits it, so it holds before the child imports anything."""
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        "DS_ACCELERATOR": "cpu",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _worker(fn: Callable[..., Any], rank: int, args: tuple[Any, ...], timeout_s: float, pipe: Connection) -> None:
    import torch

    from fedmoe_ds.distributed import process_groups

    try:
        torch.set_num_threads(1)
        timeout = datetime.timedelta(seconds=timeout_s)
        process_groups.join_world(timeout, torch.device("cpu"))
        # Plain pickle, not the connection's: that one would share tensor memory which ends with this process.
        message = pickle.dumps((True, fn(rank, *args)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(message)
