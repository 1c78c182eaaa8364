"""Two ranks over NCCL, each with a GPU of its own that it sees alone: one start for all cases."""

from __future__ import annotations

import functools
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from every import every
from federations import Result, run_alone, run_joined
from method_variants import variant_config

from fake_cuda.runs import losses, passes_of, root
from fedmoe_ds.bench.calibration.waves import REPEATS, Bench
from fedmoe_ds.bench.harness.shapes import Shape, write_model
from fedmoe_ds.clients.local_training import WaveTrainer
from fedmoe_ds.config import Config
from fedmoe_ds.config.schema import TopologyConfig
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.collectives import all_to_all
from fedmoe_ds.distributed.launcher import detect_launch
from fedmoe_ds.distributed.runtime import Runtime, init_runtime, run_entry
from fedmoe_ds.errors import UserError

RANKS = 2
HALVED = Shape("halved", experts=8, hidden=64, ffn=32, layers=3, heads=2, vocab=320, top_k=4)
ENDS = {"case_a_lost_rank_ends_the_others": [-9, 76]}

HALVES: dict[str, Any] = {"execution": {"expert_halves": True}}
ROUND: dict[str, Any] = {
    "execution": {"reproducible": "fast", "clients_in_flight": 4},
    "federation": {"rounds": 1},
    "local": {"max_steps": 2},
    "evaluation": {"every": 1, "max_sequences": 2, "client_sequences": 0},
}


@functools.cache
def world() -> Runtime:
    """This rank in its world, as `launch/train.py` joins it; the inputs are there when it returns."""
    runtime = init_runtime(detect_launch(), TopologyConfig(device="cuda", silence_s=5.0, timeout_s=60.0))
    if runtime.is_main:
        root()
    runtime.barrier()
    return runtime


def config_of(name: str, ep_size: int, *changes: dict[str, Any]) -> Config:
    return variant_config(root(), name, f"{ep_size}", ROUND, {"topology": {"ep_size": ep_size, "device": "cuda"}}, *changes)


def run_here(config: Config) -> Result:
    result = run_joined(config, world())
    if world().is_main:
        assert [event for event in result.events if event.get("status") not in (None, "ok")] == []
    return result


@functools.cache
def cpu_losses(name: str) -> list[float]:
    """Of a variant by one rank on the CPU. Every rank runs it: DeepSpeed makes groups there, too."""
    return losses(run_alone(variant_config(root(), name, f"cpu-{world().rank}", ROUND)))


def assert_as_on_the_cpu(result: Result, name: str) -> None:
    expected = cpu_losses(name)
    if world().is_main:
        found = losses(result)
        assert len(found) == len(expected)
        assert every(abs(ours - theirs) <= 1e-4 * max(1.0, theirs) for ours, theirs in zip(found, expected, strict=True))


def case_a_shared_gpu_is_refused_before_any_group(fake: Any) -> None:
    """First, because a world that has been joined is taken as it is."""
    own, os.environ["FAKE_GPU"] = os.environ.get("FAKE_GPU", "0"), "0"
    try:
        with pytest.raises(UserError, match=r"2 ranks on .* and 1 GPU: ranks 0 and 1 would share one; "):
            init_runtime(detect_launch(), TopologyConfig(device="cuda"))
    finally:
        os.environ["FAKE_GPU"] = own
    assert not dist.is_initialized()


def case_each_takes_the_gpu_that_it_sees(fake: Any) -> None:
    runtime = world()
    assert runtime.device == torch.device("cuda", 0) and runtime.world_size == RANKS
    assert dist.get_backend() == "nccl"
    assert os.environ["LOCAL_RANK"] == os.environ["RANK"]


def case_nccl_refuses(fake: Any) -> None:
    device = world().device
    with fake.refuses("No backend type associated with device type cpu"):
        dist.all_reduce(torch.ones(2))
    with fake.refuses("Tensors must be contiguous"):
        dist.all_reduce(torch.ones(4, 4, device=device)[:, :2])
    gloo = dist.new_group(backend="gloo")
    with fake.refuses("a CUDA tensor over gloo"):
        dist.all_reduce(torch.ones(2, device=device), group=gloo)


def case_collectives_do_not_hold_the_host(fake: Any) -> None:
    """They return before they have run; the host waits where it reads a result."""
    rank, device = world().rank, world().device
    rows, received = torch.full((4, 2), float(rank), device=device), torch.empty(4, 2, device=device)
    begun, done = torch.cuda.Event(), torch.cuda.Event()
    begun.record()
    all_to_all(received, rows, dist.group.WORLD)
    done.record()
    assert fake.COUNT.total_waits == 0 and begun.query()
    assert received[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert fake.COUNT.total_waits == 1 and done.query()


def case_a_peer_that_comes_late_is_waited_for_on_the_device(fake: Any) -> None:
    """The host has gone on; heartbeats tell it all the same, and their thread is on the device of the rank."""
    runtime, group = world(), dist.group.WORLD
    rows, received = torch.ones(2, 2, device=runtime.device), torch.empty(2, 2, device=runtime.device)
    received.tolist()
    runtime.barrier()
    if runtime.rank == 1:
        time.sleep(2.0)
    all_to_all(received, rows, group)
    said = activity.state()["waiting"]
    assert fake.COUNT.total_waits == 1, "that of the line above, and none to find out"
    assert runtime.rank == 1 or said == "all_to_all over a group"
    received.tolist()
    assert activity.state()["waiting"] is None and fake.COUNT.errors == []


def case_collectives_are_timed_by_the_device(fake: Any) -> None:
    """What the host takes to queue them says nothing; to find out, nobody waits."""
    runtime, group = world(), dist.group.WORLD
    activity.take()
    rows, received = torch.ones(2, 2, device=runtime.device), torch.empty(2, 2, device=runtime.device)
    for _ in range(3):
        all_to_all(received, rows, group)
    received.tolist()
    waits = fake.COUNT.total_waits
    assert activity.take()["all_to_all"] == {"calls": 3, "seconds": 0.375, "bytes": 48}
    assert fake.COUNT.total_waits == waits and fake.COUNT.errors == []


def case_one_pool(fake: Any) -> None:
    """Ranks tell each other how many rows come, and the host waits for these numbers once in every layer; for no rows."""
    with passes_of(fake) as passes:
        result = run_here(config_of("flame", 2))
    for found in passes:
        assert found.waits["model/dispatcher.py"] == found.layers > 1
        assert not found.waits.keys() & {"model/expert_pass.py", "model/routed_forward.py", "distributed/collectives.py"}
    assert passes
    assert_as_on_the_cpu(result, "flame")


@dataclass(frozen=True)
class Counted:
    """One training pass of a rank: `moved` are bytes that it hands over, `forward` the kernels of an evaluation's pass.

    Attributes:
        planned, planned_forward: all-to-alls, and kernels, as the planner counts them.
    """

    kernels: int
    forward: int
    waits: int
    exchanges: int
    moved: int
    peak: int
    planned: tuple[float, float]
    planned_forward: float


def counted_pass(fake: Any, folder: Path, in_halves: bool) -> Counted:
    place = (dist.group.WORLD, RANKS, world().rank, world().device)
    bench = Bench(HALVED, ["q_proj", "v_proj"], folder, *place, "bfloat16", in_halves)
    inner, found = bench.trainer._pass, dict[str, int]()

    def counted(*arguments: Any) -> None:
        fake.COUNT.reset()
        before = fake.COUNT.now
        activity.take()
        inner(*arguments)
        found.update(kernels=fake.COUNT.kernels, waits=fake.COUNT.total_waits, peak=fake.COUNT.peak - before)
        sent = activity.take()["all_to_all"]
        found.update(exchanges=sent["calls"], moved=sent["bytes"])

    bench.trainer._pass = counted  # type: ignore[method-assign]
    sample = bench.train(4, 48, 2)
    fake.COUNT.reset()
    forward = bench.forward(4, 48, 2)
    found["forward"] = fake.COUNT.kernels // REPEATS
    return Counted(**found, planned=(sample.exchanges, sample.work.calls), planned_forward=forward.work.calls)


def case_a_pass_in_halves(fake: Any) -> None:
    """Rows of one half travel while the other's are computed: the same bytes and waits in twice as many exchanges."""
    folder = root() / "halved"
    if world().is_main:
        write_model(HALVED, 0, folder)
    world().barrier()
    whole, halves = (counted_pass(fake, folder, in_halves) for in_halves in (False, True))
    assert (halves.waits, halves.moved) == (whole.waits, whole.moved) and halves.peak <= 1.01 * whole.peak
    assert [one.exchanges for one in (whole, halves)] == [one.planned[0] for one in (whole, halves)]
    assert halves.planned[1] - whole.planned[1] == pytest.approx(halves.kernels - whole.kernels, rel=0.1)
    assert halves.planned_forward - whole.planned_forward == pytest.approx(halves.forward - whole.forward, rel=0.1)


def case_two_clusters(fake: Any) -> None:
    assert_as_on_the_cpu(run_here(config_of("flame", 1)), "flame")


def case_state_of_clients(fake: Any) -> None:
    """Where rows travel in halves, too."""
    assert_as_on_the_cpu(run_here(config_of("scaffold", 2, HALVES)), "scaffold")


def case_garbage_in_empty_groups(fake: Any) -> None:
    """As sm_100 leaves it, in the type that GPUs multiply; one client trains, so that a rank has no rows of its own. That rank
    waits for no more than the other, forward and backward, though rows travel in halves."""
    fake.COUNT.empty_groups = "garbage"
    few: dict[str, Any] = {"federation": {"participation": 0.1}, "foundation": {"dtype": "bfloat16"}, "adapters": {"rank": 8}}
    few["execution"] = HALVES["execution"]
    with passes_of(fake) as passes:
        result = run_here(config_of("flame", 2, few))
    assert not world().is_main or every(loss < 100.0 for loss in losses(result))
    for found in passes:
        # Of backward there is no line of the project where autograd itself moves a gradient.
        assert found.waits.pop("model/dispatcher.py") == found.layers and found.waits.total() <= 1, found.waits
    assert passes


def case_a_lost_rank_ends_the_others(fake: Any) -> NoReturn:
    """Its loss shows late, as NCCL's errors do; the code is the one after which a supervisor starts again, and not SIGABRT of
    torch's own watchdog, which would come first."""
    real = WaveTrainer._optimize

    def optimize(self: WaveTrainer, *args: Any) -> None:
        if world().rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, *args)

    WaveTrainer._optimize = optimize  # type: ignore[method-assign]
    run_entry(lambda: bool(run_here(config_of("flame", 2, {"name": "lost"}))))
