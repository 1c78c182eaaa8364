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
from fedmoe_ds.bench.gpu.request import PROFILE, WAVE, Request, Tell
from fedmoe_ds.bench.harness import table
from fedmoe_ds.bench.harness.shapes import write_model
from fedmoe_ds.bench.harness.system import OURS, PEER_PREFIX, Clock
from fedmoe_ds.bench.wave.measure import run_wave
from fedmoe_ds.clients.out_of_memory import OutOfMemory, is_out_of_memory
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
    table.write_json(document, Path(request.output) / WAVE.format(tokens=sequences * load.length))


def memory(request: Request, tell: Tell) -> None:
    """The peak of one step beside what the planner expects of it, for growing steps, until one does not fit."""
    for sequences in (1, 4, 8, 16):
        found: dict[str, Any] = {"tokens": sequences * request.length}
        try:
            _peak(request, sequences, found)
        except (RuntimeError, MemoryError, OutOfMemory) as error:
            # Of a pass the trainer says it; the model, or adapters and their gradients, may not fit by themselves.
            if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
                raise
            tell(**found, out_of_memory=str(error).partition("\n")[0])
            return
        tell(**found)
        gc.collect()
        torch.cuda.empty_cache()


def _peak(request: Request, sequences: int, found: dict[str, Any]) -> None:
    """Train one step of so many sequences, and put into `found` what is known as soon as it is."""
    from fedmoe_ds.planner.memory import estimate  # brings what a run needs

    load, system = request.workload(sequences), _fused(request, sequences)
    counted = estimate(system.spec, len(load.caps), load.length, len(load.caps), statistics.fmean(load.caps))
    del counted["round sums"]  # a wave by itself sums nothing
    planned = sum(counted.values())
    torch.cuda.synchronize()
    found.update(held_gib=torch.cuda.memory_allocated() / _GIB, planned_gib=planned / _GIB)
    torch.cuda.reset_peak_memory_stats()
    system.train("timed")
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    found.update(peak_gib=peak / _GIB, reserved_gib=torch.cuda.max_memory_reserved() / _GIB, planned_over_peak=planned / peak)


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
    # Kernels are events of their own: an operator's device time is that of its kernels, once more.
    on_device = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    on_device.sort(key=lambda event: -event.self_device_time_total)
    tell(
        kernels=kernels,
        device_ms=sum(event.self_device_time_total for event in on_device) / 1e3,
        launches=sum(event.count for event in events if "LaunchKernel" in event.key),
        waits=sum(event.count for event in events if event.key in _WAITS),
    )
    for event in on_device[:_TOP]:
        tell(kernels=kernels, kernel=event.key[:90], ms=event.self_device_time_total / 1e3, calls=event.count)
    rows = [
        [event.key, event.count, event.self_device_time_total, event.self_cpu_time_total, event.device_type.name]
        for event in events
    ]
    lines = map(json.dumps, rows)
    (output / PROFILE.format(kernels=kernels)).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _fused(request: Request, sequences: int, kernels: Kernels = "auto") -> Any:
    from fedmoe_ds.bench.wave.fused import Fused  # brings DeepSpeed, which no other step here needs

    return Fused(request.folder(), request.workload(sequences, kernels), bitwise=False)
