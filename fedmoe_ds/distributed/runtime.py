"""Runtime: one process of the world, whoever started it.

The same script runs under plain `python`, `deepspeed`, `torchrun`, `mpirun` and `srun`. `init_runtime` reads what the launcher
promised (`launcher.py`) and joins the world through DeepSpeed. Small control messages travel as JSON: nothing is ever pickled.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as torch_dist

from fedmoe_ds import terminal
from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed import open_files
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.control import Control
from fedmoe_ds.distributed.control_plane import make_control
from fedmoe_ds.distributed.devices import own_device
from fedmoe_ds.distributed.launcher import Launch, free_port, known_rank
from fedmoe_ds.distributed.mpi_control import check_mpi
from fedmoe_ds.distributed.stop_request import unwind_on_interrupt
from fedmoe_ds.distributed.watchdog.rank_health import Limits
from fedmoe_ds.distributed.watchdog.start import current_watchdog, start_watchdog
from fedmoe_ds.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR, LostError, UserError

T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
# How much later than the others rank 0 may get to a user's mistake, on a machine that is starved of CPU.
_SAY_S = 10.0
# How NCCL speaks of a peer or a network that is gone, and torch of the communicator that it has aborted for that.
_NETWORK = ("remote process exited", "network error", "communicator was aborted")


@dataclass(frozen=True)
class Runtime:
    """This process in its world. `control` carries host-side messages among all ranks; `notes` are lines about the start."""

    launch: Launch
    device: torch.device
    control: Control
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank."""
        return [json.loads(payload) for payload in self.control.gather(json.dumps(value).encode())]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag whether any rank has it, on every rank: a few numbers travel, however many ranks there are."""
        return [value > 0 for value in self.control.largest(torch.tensor(flags, dtype=torch.int64)).tolist()]

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; a UserError on any rank becomes the same UserError on all of them."""
        result, failure = attempt(action)
        if self.any(failure is not None)[0]:
            raise UserError(next(text for text in self.gather(failure) if text is not None))
        return result  # type: ignore[return-value]

    def run_on_rank0(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 only; its JSON result, or its UserError, reaches every rank."""
        outcome = json.dumps(attempt(action)) if self.is_main else ""
        result, failure = json.loads(self.control.broadcast(outcome.encode()))
        if failure is not None:
            raise UserError(failure)
        return result


def attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of `action`, or the text of its UserError."""
    try:
        return action(), None
    except UserError as error:
        return None, str(error)


def init_runtime(launch: Launch, topology: TopologyConfig, threads: int = 1) -> Runtime:
    """Join the world and start to watch it. `threads` are CPU threads of this rank.

    Raises:
        UserError: cuda is asked for but absent, ranks would share a GPU, MPI is asked for but does not know this world, the
            launcher's promise does not hold, or a host lets a process open too few files.
        LostError: the other ranks did not come.
    """
    limits = Limits(topology.silence_s, topology.timeout_s, launch.world_size)
    for name, carrier in (("control", topology.control), ("aggregation", topology.aggregation)):
        if carrier == "mpi":  # told before the ranks wait for each other
            check_mpi(launch.world_size, f"topology.{name}")
    device = own_device(topology.device, launch.local_rank)
    # Before any socket of the world exists: a rank that runs out of them later takes the job with it.
    files = open_files.allow(open_files.needed(launch, topology, device.type))
    torch.set_num_threads(threads)
    keep_freed_memory()
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
    os.environ.setdefault("LOCAL_SIZE", str(launch.world_size))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    # Runs of one rank share a machine, so each takes a free port; several ranks need one that all of them know.
    os.environ.setdefault("MASTER_PORT", str(free_port()) if launch.world_size == 1 else "29500")
    open_files.check_meeting(files, launch.rank, launch.world_size)
    # Longer than the watchdog's limits: the watchdog ends the job first, because it knows who is missing.
    timeout = datetime.timedelta(seconds=topology.timeout_s + 2 * topology.silence_s)
    control, network = _join(device, launch, topology, timeout, files)
    try:
        watch = start_watchdog(control, limits, launch.local_rank, device)
    except (OSError, RuntimeError) as error:
        here, there = f"rank {launch.rank} on {socket.gethostname()}", os.environ["MASTER_ADDR"]
        raise LostError(
            f"{here} lost the others at the start, or cannot reach the watchdog of rank 0 at {there}: {error}"
        ) from None
    return Runtime(launch, device, control, (*([network] if network else ()), *(() if watch is None else watch.notes)))


def _join(
    device: torch.device, launch: Launch, topology: TopologyConfig, timeout: datetime.timedelta, files: open_files.Allowance
) -> tuple[Control, str | None]:
    """The control plane, and a line about the network."""
    from fedmoe_ds.distributed import (
        process_groups,  # imports DeepSpeed, which reads the choice of accelerator that was made before
    )

    try:
        network = process_groups.join_world(timeout, device, topology.interface, files)
        return make_control(topology.control, launch.launcher, launch.rank, launch.world_size, timeout), network
    except RuntimeError as error:  # of torch's store, or of gloo
        if not isinstance(error, torch_dist.DistError) and "gloo" not in str(error).lower():
            raise
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        way = os.environ.get("GLOO_SOCKET_IFNAME")
        why = str(error).splitlines()[0]
        taken = "; another job is there: wait for its end, or give this one a port of its own, as --master_port or MASTER_PORT"
        raise LostError(
            f"rank {launch.rank} on {socket.gethostname()} could not join {launch.world_size} ranks at {where}"
            f"{f' (GLOO_SOCKET_IFNAME={way})' if way else ''}: {why}{taken if 'EADDRINUSE' in why else ''}"
        ) from None


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next pass: a wave frees and allocates the same large buffers thousands of times, and
    asking the kernel for zeroed pages each time costs about a tenth of the CPU time. Peak memory is the same."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def run_entry(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point: UserError becomes one line on rank 0 and exit code 2 everywhere, Ctrl-C one line and
    exit code 130; other errors keep their traceback.

    The exit is immediate after a failure, so that no atexit handler can wait for peers that are gone. A launcher ends all ranks
    as soon as one has failed, so the others wait until rank 0 has written its line.
    """
    code, words = 1, ""
    try:
        unwind_on_interrupt()
        code = main() or 0
    except (UserError, LostError) as error:
        code, words = error.exit_code, str(error)
        # Without a watchdog this rank has never met rank 0, which may not exist: it speaks for itself.
        if known_rank() == 0 or (current_watchdog() is None and isinstance(error, LostError)):
            terminal.note(f"error: {error}")
    except KeyboardInterrupt:
        code, words = EXIT_INTERRUPTED, "stopped by SIGINT"
        terminal.note(f"error: {words}")
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else 1
    except BaseException as error:
        code = EXIT_LOST if _hear_why(error) else 1
        words = f"rank {known_rank()} on {socket.gethostname()} failed: {type(error).__name__}: {error}; its traceback is above"
        terminal.show(f"[rank {known_rank()}] {traceback.format_exc().rstrip()}", sys.stderr)
    _leave(code, " ".join(words.split()))


def is_late(error: BaseException) -> bool:
    """Whether it may be of a collective that had returned long before: NCCL's errors show where the device is waited for, and
    the aborted kernel of one as an error of CUDA itself."""
    return isinstance(error, torch_dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("NCCL", "CUDA error"))
    )


def _hear_why(error: BaseException) -> bool:
    """A collective failed: usually a peer is gone, and the watchdog will say which and end this process. If it says nothing,
    whether the error itself speaks of a peer or of the network: then starting again may mend it."""
    watch = current_watchdog()
    if watch is not None and (activity.failed is not None or is_late(error)):
        # Rank 0 needs up to the limit on silence to notice the loss. Once the job is over, this process is ended by its
        # watchdog within the sleep; a traceback before that would hide the one line that says who is gone.
        watch.over.wait(watch.limits.silence + 5.0)
        if watch.over.is_set():
            time.sleep(60.0)
    return isinstance(error, torch_dist.DistBackendError) and any(words in str(error) for words in _NETWORK)


def _leave(code: int, words: str) -> NoReturn:
    # os._exit at the end flushes nothing.
    sys.stdout.flush()
    sys.stderr.flush()
    watch = current_watchdog()
    if watch is not None:
        watch.announce_exit(code, words)
    if known_rank() != 0 and (code == EXIT_USER_ERROR or (code == EXIT_LOST and watch is not None)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's: no longer a request to stop after the wave
        time.sleep(_SAY_S)  # the watchdog ends this process as soon as rank 0 has spoken, or the launcher does
        terminal.note(f"error: rank {known_rank()} on {socket.gethostname()}: {words}")  # rank 0 knows of nothing
    if watch is not None:
        watch.stop()
    if code in (0, EXIT_STOPPED) and torch_dist.is_initialized():
        # Never after a failure: this waits for peers, and they may be gone.
        torch_dist.destroy_process_group()
    if code in (0, EXIT_STOPPED) and "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].Finalize()  # mpirun takes a rank that ends without it for one that has failed
    os._exit(code)
