"""One rank of the aggregation benchmark, started by mpirun, see `bench.harness.ranks`.

Every backend reduces the same exact statistics in the same processes; beside it
its library adds up one tensor of the same bytes, in place: the bandwidth that there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fedmoe_ds.aggregation.weighted_average import Statistics
from fedmoe_ds.bench.harness.ranks import leave_answer, read_request
from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed.collectives import Summing, TorchSumming
from fedmoe_ds.distributed.launcher import detect_launch
from fedmoe_ds.distributed.runtime import Runtime, init_runtime, run_entry
from fedmoe_ds.distributed.topology import build_topology
from fedmoe_ds.model.adapter_bank import BlockSpec

BACKENDS = ("torch", "mpi")
Action = Callable[[], object]
_LAYERS, _RANK = tuple(range(8)), 8
_BYTES = 16  # of a number in exact statistics


def main() -> int:
    request = read_request()
    config = TopologyConfig(device="cpu", timeout_s=300.0)
    runtime = init_runtime(detect_launch(), config)
    summings = {name: build_topology(config.model_copy(update={"aggregation": name}), runtime).sum_shard for name in BACKENDS}
    leave_answer([row for mib in request["mib"] for row in measure(runtime, summings, mib, request["rounds"])], runtime.rank)
    return 0


def blocks(mib: int) -> list[BlockSpec]:
    """LoRA pairs of one expert and of a dense projection whose exact sums take about `mib` MiB."""
    width = mib * 2**20 // (_BYTES * len(_LAYERS) * _RANK * 4)
    pairs = (("experts.down", True), ("attention.q_proj", False))
    halves = (("lora_A", (_RANK, width)), ("lora_B", (width, _RANK)))
    return [BlockSpec(f"{stem}.{half}", _LAYERS, item, expert) for stem, expert in pairs for half, item in halves]


def measure(runtime: Runtime, summings: dict[str, Summing], mib: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of the slowest rank, per backend, repeat by repeat: the library's sum of one tensor, and the whole reduction."""
    statistics, alone = Statistics(blocks(mib), 1, exact=True), TorchSumming(None, 1)
    # Zeros stay zeros: what is summed in place again and again must not overflow.
    flat = torch.zeros_like(statistics.flat.memory)
    into = torch.empty_like(flat)
    actions: dict[str, Action] = {"copy": lambda: into.copy_(flat)}
    for name, summing in summings.items():
        actions[f"raw {name}"] = library_sum(name, flat)
        actions[name] = lambda summing=summing: statistics.reduce(alone, summing)  # type: ignore[misc]
        check(runtime, actions[name], [statistics.flat.memory])
        check(runtime, actions[f"raw {name}"], [flat])
    seconds = alternating(runtime, actions, rounds)
    common = {"bytes": flat.nbytes, "copy_seconds": seconds["copy"]}
    return [
        {"backend": name, **common, "raw_seconds": seconds[f"raw {name}"], "reduce_seconds": seconds[name]} for name in summings
    ]


def library_sum(backend: str, flat: Tensor) -> Action:
    """The sum over all ranks as the library itself does it, in place."""
    if backend == "torch":
        return lambda: torch_dist.all_reduce(flat)
    from mpi4py import MPI

    numbers = flat.numpy()
    return lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, numbers)


def check(runtime: Runtime, action: Action, tensors: list[Tensor]) -> None:
    """What is timed adds up: every rank ends with the sum of all ranks' numbers. Leaves zeros."""
    for tensor in tensors:
        tensor.fill_(runtime.rank + 1)
    action()
    expected = runtime.world_size * (runtime.world_size + 1) // 2
    assert all(bool((tensor == expected).all()) for tensor in tensors), "the sum over the ranks is wrong"
    for tensor in tensors:
        tensor.zero_()


def alternating(runtime: Runtime, actions: dict[str, Action], rounds: int) -> dict[str, list[float]]:
    """The slowest rank's seconds in every round, by action; every round runs all of them, all ranks at the same time."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            runtime.barrier()  # else the first rank's seconds hold its wait for the last one
            began = time.perf_counter()
            action()
            spent = max(runtime.gather(time.perf_counter() - began))
            if turn:  # the first round warms up
                seconds[name].append(spent)
    return seconds


if __name__ == "__main__":
    run_entry(main)
