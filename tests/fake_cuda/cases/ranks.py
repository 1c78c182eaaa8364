"""Two ranks and their GPUs: each sees its own alone, number 0, as srun --gpus-per-task shows them."""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cuda"  # before anything imports DeepSpeed, which asks once

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist

from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed import collectives
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.launcher import detect_launch
from fedmoe_ds.distributed.runtime import Runtime, init_runtime
from fedmoe_ds.distributed.topology import build_topology
from fedmoe_ds.distributed.watchdog.start import stop_watchdog
from fedmoe_ds.errors import UserError

RANKS = 2
CUDA = TopologyConfig(device="cuda", ep_size=2)


def start() -> Runtime:
    os.environ["LOCAL_RANK"] = os.environ["RANK"]  # as every launcher on one host
    return init_runtime(detect_launch(), CUDA)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def case_a_shared_gpu_is_refused_before_any_group(fake: Any) -> None:
    with environment(FAKE_GPU="0"):
        try:
            start()
        except UserError as error:
            assert "2 ranks on" in str(error) and "1 GPU: ranks 0 and 1 would share one" in str(error), error
        else:
            raise AssertionError("not refused")
    assert not dist.is_initialized()


def case_a_gpu_of_its_own_for_each_rank(fake: Any) -> None:
    """Number 0 to both, whatever LOCAL_RANK says; without a warning of DeepSpeed about CUDA_HOME."""
    said = StringIO()
    with redirect_stdout(said):
        runtime = start()
    try:
        assert (runtime.device, torch.cuda.current_device(), dist.get_backend()) == (torch.device("cuda", 0), 0, "nccl")
        assert "WARNING" not in said.getvalue(), said.getvalue()
        topology = build_topology(CUDA, runtime)
        fake.COUNT.reset()
        rows = torch.full((2, 3), float(runtime.rank), device=runtime.device)
        received = torch.empty_like(rows)
        collectives.all_to_all(received, rows, topology.ep_group)
        assert fake.COUNT.total_waits == 0, fake.COUNT.summary("a collective waits for nothing")
        assert activity.state()["waiting"] is None and not activity.queue._queued, "asked, and found to be done"
        assert received[:, 0].tolist() == [0.0, 1.0]
    finally:
        runtime.barrier()
        stop_watchdog(0, "")
