"""World: a run's place among processes, taken and left by a process that goes on.

A command may leave its process as it likes, because that ends. A program calls a run between other things, and then another
one. What a run changes in its process is therefore put back here: the launcher's variables, torch's threads, the process
groups, DeepSpeed's record of collectives, what the watchdog tells of it, and who hears signals.

Not put back: the allocator keeps freed memory (`runtime.keep_freed_memory`), and entries of the cache stay in use
(`storage/in_use.py`) until the process ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as torch_dist

from fedmoe_ds.config import Config, TopologyConfig
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.devices import uses_cuda
from fedmoe_ds.distributed.launcher import Launch, detect_launch
from fedmoe_ds.distributed.runtime import Runtime, init_runtime
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.distributed.watchdog.start import stop_watchdog
from fedmoe_ds.errors import LostError, UserError

_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "DS_ACCELERATOR",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_ENABLE_MONITORING",
    "TORCH_GLOO_LAZY_INIT",
    "WANDB_DIR",
    "WANDB_NAME",
)
"""What `detect_launch`, `init_runtime` and monitors set: a later program must not take itself for a rank of this run."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_busy = threading.Lock()


@contextmanager
def joined(config: Config, goes_on: bool = True) -> Iterator[Runtime]:
    """This process as a rank of the body: of the launcher's world where one has started it, else alone.

    Args:
        goes_on: whether the process lives on after a failure. If not, `run_entry` tells the others of it.
    Raises:
        UserError: another run works in this process, or it has joined a world or chosen a device that the run cannot use.
    """
    if not _busy.acquire(blocking=False):
        raise UserError("run: another run works in this process; wait for its end, or give ranks=1: a process of its own")
    try:
        with _kept_variables(), _kept_threads():
            launch = detect_launch()
            _check(launch, config.topology)
            activity.restart()
            with _world(launch):
                runtime = init_runtime(launch, config.topology, config.execution.threads)
                try:
                    yield runtime
                    runtime.barrier()  # rank 0 has written everything when the others look at it
                except BaseException as error:
                    if goes_on:
                        stop_watchdog(getattr(error, "exit_code", 1), _words(launch, error))
                    raise
                stop_watchdog(0, "")
    finally:
        _busy.release()


@contextmanager
def _world(launch: Launch) -> Iterator[None]:
    """End a world of one after the body, unless it was there before. That of a launcher's ranks lasts as long as they do."""
    before = torch_dist.is_initialized()
    try:
        yield
    finally:
        from fedmoe_ds.distributed import process_groups  # DeepSpeed, which by now has its accelerator

        process_groups.forget_communication()
        if launch.world_size == 1:
            process_groups.leave_world(end=not before)


def _words(launch: Launch, error: BaseException) -> str:
    """A failure in the words of `run_entry`: rank 0 repeats what another rank has met."""
    if isinstance(error, UserError | LostError):
        return str(error)
    return f"rank {launch.rank} failed: {type(error).__name__}: {' '.join(str(error).split())}"


def _check(launch: Launch, topology: TopologyConfig) -> None:
    if torch_dist.is_initialized() and (size := torch_dist.get_world_size()) != launch.world_size:
        raise UserError(
            f"run: this process has joined a world of {size} ranks by itself, and its launcher says {launch.world_size}; end "
            "that world first (torch.distributed.destroy_process_group), or give ranks=N: processes of their own"
        )
    # DeepSpeed looks for its accelerator once in a process: whoever imported it before has decided.
    if "deepspeed" in sys.modules:
        from deepspeed.accelerator import get_accelerator

        wanted, chosen = "cuda" if uses_cuda(topology.device) else "cpu", get_accelerator().device_name()
        if wanted != chosen:
            raise UserError(
                f"topology.device: {topology.device}: DeepSpeed works on {chosen} in this process already, and this run needs "
                f"{wanted}; give ranks=1: a process of its own"
            )


@contextmanager
def _kept_variables() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _kept_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def heard_signals() -> Iterator[StopRequest]:
    """Let the signals that stop a run ask for it while the body runs.

    A handler that somebody else has set stays. So do all of them outside of the main thread, where Python sets none: a run
    there goes to its end.
    """
    stop, before = StopRequest(), {}

    def receive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.name == "SIGINT":
            # Who asks again will not wait for the wave; the last checkpoint is intact.
            signal.default_int_handler(number, frame)
        stop.receive(number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, receive)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
