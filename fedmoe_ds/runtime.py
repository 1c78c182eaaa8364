"""Runtime: one process of the world, whoever started it.

The same script runs under plain `python`, `deepspeed`, `torchrun`, `mpirun` and `srun`. `init_runtime` reads what the launcher
promised, joins the world through DeepSpeed, and refuses a world that is smaller than the promise. Small control messages travel
as JSON over a gloo group, so nothing is ever pickled.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as torch_dist

from fedmoe_ds.errors import EXIT_USER_ERROR, UserError
from fedmoe_ds.launcher import Launch, free_port, known_rank

T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
# How much later than the others rank 0 may get to a user's mistake, on a machine that is starved of CPU.
_SAY_S = 10.0


@dataclass(frozen=True)
class Runtime:
    """This process in its world. `control` is a gloo group for host-side messages (None in a world of one)."""

    launch: Launch
    device: torch.device
    control: torch_dist.ProcessGroup | None

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
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy()
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(payload)
        torch_dist.all_reduce(sizes, group=self.control)
        mine = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        mine[: len(payload)] = torch.from_numpy(payload)
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        torch_dist.all_gather(parts, mine, group=self.control)
        return [json.loads(bytes(part[:size].numpy()).decode()) for part, size in zip(parts, sizes.tolist(), strict=True)]

    def barrier(self) -> None:
        if self.world_size > 1:
            torch_dist.barrier(group=self.control)

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; a UserError on any rank becomes the same UserError on all of them."""
        result, failure = _attempt(action)
        failures = [text for text in self.gather(failure) if text is not None]
        if failures:
            raise UserError(failures[0])
        return result  # type: ignore[return-value]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 only; its JSON result, or its UserError, reaches every rank."""
        outcome = _attempt(action) if self.is_main else (None, None)
        result, failure = self.gather(list(outcome))[0]
        if failure is not None:
            raise UserError(failure)
        return result


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return action(), None
    except UserError as error:
        return None, str(error)


def init_runtime(launch: Launch, device: str = "auto", threads: int = 1, timeout_s: float = 1800.0) -> Runtime:
    """Join the world. `device` is auto, cpu or cuda; `threads` are CPU threads of this rank.

    Raises:
        UserError: cuda is asked for but absent, or the launcher's promise does not hold.
    """
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise UserError("topology.device: cuda: no CUDA device is visible; use cpu or auto")
    if not use_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(threads)
    keep_freed_memory()
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
    os.environ.setdefault("LOCAL_SIZE", str(launch.world_size))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()) if launch.world_size == 1 else "29500")
    from fedmoe_ds.foundation import hosting  # imports DeepSpeed, which reads the choice of accelerator that was made above

    timeout = datetime.timedelta(seconds=timeout_s)
    place = torch.device("cuda", launch.local_rank % torch.cuda.device_count()) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(place)
    hosting.join_world("nccl" if use_cuda else "gloo", timeout)
    control = torch_dist.new_group(backend="gloo", timeout=timeout) if launch.world_size > 1 else None
    return Runtime(launch, place, control)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next pass: a wave frees and allocates the same large buffers thousands of times, and
    asking the kernel for zeroed pages each time costs about a tenth of the CPU time. Peak memory is the same."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def run_entry(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point: UserError becomes one line on rank 0 and exit code 2 everywhere; other errors keep their traceback.

    The exit is immediate after a failure, so that no atexit handler can wait for peers that are gone. A launcher ends all ranks
    as soon as one has failed; the others therefore hold back until rank 0 has had its say.
    """
    code = 1
    try:
        code = main() or 0
    except UserError as error:
        code = EXIT_USER_ERROR
        if known_rank() == 0:
            sys.stderr.write(f"error: {error}\n")
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's: no longer a request to stop after the wave
            time.sleep(_SAY_S)
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else 1
    except BaseException:
        sys.stderr.write(f"[rank {known_rank()}] {traceback.format_exc()}")
    if code == 0 and torch_dist.is_initialized():
        torch_dist.destroy_process_group()
    if code == 0 and "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].Finalize()  # mpirun takes a rank that ends without it for one that has failed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
