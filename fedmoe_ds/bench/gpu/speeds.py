"""Speeds: the steps of a visit that ask how fast it is, and how large: the device's ceilings, waves, memory, a profile."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedmoe_ds import shell
from fedmoe_ds.bench.gpu.request import Request, Tell
from fedmoe_ds.bench.harness import table
from fedmoe_ds.bench.harness.shapes import write_model
from fedmoe_ds.bench.harness.system import OURS, PEER_PREFIX, Clock
from fedmoe_ds.bench.wave.measure import run_wave
from fedmoe_ds.errors import UserError
from fedmoe_ds.kernels.lora_products import Kernels, check_kernels
from fedmoe_ds.terminal import note

_GIB = 2**30
_COPY_BYTES, _SMALL_COPY_BYTES = 2**32, 2**20
_ROUNDS = 3
_PEER = "grouped_mm"
_TOP = 12
"""Kernels of a profile that are told; the whole table is a file."""
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
PROFILED: tuple[Kernels, ...] = ("torch", "triton")


def floor(request: Request, tell: Tell) -> None:
    """The two ceilings: bytes per second of a copy, read and written, and FLOP/s of a large bfloat16 product."""
    source = torch.empty(_COPY_BYTES if request.large else _SMALL_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target, side = torch.empty_like(source), request.side
    tell(copy_tb_s=2 * source.numel() / _seconds(lambda: target.copy_(source)) / 1e12)
    left, right, out = (torch.randn(side, side, device="cuda").bfloat16() for _ in range(3))
    tell(bf16_tflops=2.0 * side**3 / _seconds(lambda: torch.mm(left, right, out=out)) / 1e12, side=side)


def _seconds(action: Callable[[], Any], repeats: int = 10) -> float:
    """Of one call, after two that warm up."""
    for _ in range(2):
        action()
    clock = Clock("cuda")
    for _ in range(repeats):
        action()
    return clock.stop().wall / repeats


def model(request: Request, tell: Tell) -> None:
    """The random model: drawn on the device, where that takes seconds, and saved."""
    began, folder = time.monotonic(), Path(request.model)
    draft = folder.with_name(f"{folder.name}.draft")
    write_model(request.sizes, request.seed, draft, "5GB", "bfloat16", device="cuda")
    # In one step: a step that was ended in between leaves no half of a model to be read.
    draft.rename(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    tell(seconds=time.monotonic() - began, gib=size / _GIB, folder=str(folder.parent))


def wave(request: Request, tell: Tell, sequences: int) -> None:
    """One step of every client beside PEFT. It is stored as the `wave` subcommand would, for the targets and their page."""
    load, folder = request.workload(sequences), request.folder()
    words = {
        "shape": request.shape,
        "steps": load.steps,
        "rounds": _ROUNDS,
        "mode": "fast",
        "peers": _PEER,
        "sequences": sequences,
    }
    words |= {"length": load.length, "dtype": load.dtype, "device": load.device, "seed": load.seed}
    options = [part for name, value in words.items() for part in (f"--{name}", str(value))]
    rows = run_wave([load], [OURS, PEER_PREFIX + _PEER], _ROUNDS, note, folder)
    for row in rows:
        told = ("system", "tokens_per_s", "ratio", "floor_share", "peak_mib", "wall_seconds")
        tell(tokens=sequences * load.length, **{name: row[name] for name in told})
    document = table.document("wave", shell.command_line(["python", "launch/bench.py", "wave", *options]), rows)
    table.write_json(document, Path(request.output) / f"gpu-wave-{sequences * load.length}.json")


def memory(request: Request, tell: Tell) -> None:
    """The peak of one step beside what the planner expects of it, for growing steps, until one does not fit."""
    from fedmoe_ds.planner.memory import estimate  # brings what a run needs

    for sequences in (1, 4, 8, 16):
        load = request.workload(sequences)
        system = _fused(request, sequences)
        counted = estimate(system.spec, len(load.caps), load.length, len(load.caps), statistics.fmean(load.caps))
        del counted["round sums"]  # a wave by itself sums nothing
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found: dict[str, Any] = {
            "tokens": sequences * load.length,
            "held_gib": held / _GIB,
            "planned_gib": sum(counted.values()) / _GIB,
        }
        try:
            system.train("timed")
        except torch.OutOfMemoryError as error:
            tell(**found, out_of_memory=str(error).splitlines()[0])
            return
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        reserved = torch.cuda.max_memory_reserved() / _GIB
        tell(**found, peak_gib=peak / _GIB, reserved_gib=reserved, planned_over_peak=sum(counted.values()) / peak)
        del system
        gc.collect()
        torch.cuda.empty_cache()


def profile(request: Request, tell: Tell) -> None:
    """One wave of one step, by itself and under the profiler: device time by kernel, launches, waits."""
    from torch.profiler import ProfilerActivity, supported_activities
    from torch.profiler import profile as profiler

    both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    for kernels in PROFILED:
        try:
            check_kernels(kernels, request.workload(1).rank, torch.device("cuda"))
        except UserError as error:
            tell(kernels=kernels, refused=str(error))
            continue
        system = _fused(request, 1, kernels)
        system.train("warm-up")
        spans = [system.train("timed").time.wall for _ in range(_ROUNDS)]
        tell(kernels=kernels, wall_seconds=spans)
        if supported_activities() >= set(both):  # type: ignore[no-untyped-call]
            with profiler(activities=both) as watched:
                system.train("timed")
            _tell_profile(kernels, watched.key_averages(), Path(request.output), tell)
        else:
            tell(kernels=kernels, device_times="not recorded: this build of torch sees no kernels")
        del system
        gc.collect()
        torch.cuda.empty_cache()


def _tell_profile(kernels: str, events: Any, output: Path, tell: Tell) -> None:
    on_device = [event for event in events if event.self_device_time_total]
    on_device.sort(key=lambda event: -event.self_device_time_total)
    tell(
        kernels=kernels,
        device_ms=sum(event.self_device_time_total for event in on_device) / 1e3,
        launches=sum(event.count for event in events if "LaunchKernel" in event.key),
        waits=sum(event.count for event in events if event.key in _WAITS),
    )
    for event in on_device[:_TOP]:
        tell(kernels=kernels, kernel=event.key[:90], ms=event.self_device_time_total / 1e3, calls=event.count)
    lines = [json.dumps([event.key, event.count, event.self_device_time_total, event.self_cpu_time_total]) for event in events]
    (output / f"profile-{kernels}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _fused(request: Request, sequences: int, kernels: Kernels = "auto") -> Any:
    from fedmoe_ds.bench.wave.fused import Fused  # brings DeepSpeed, which no other step here needs

    return Fused(request.folder(), request.workload(sequences, kernels), bitwise=False)
