"""Ceilings: what one step of training may cost on a GPU, counted on the stand-in, so that a regression shows without a GPU.

The workload is `bench/wave`'s own trainer (four clients of unequal caps in one pass, bfloat16) on a model of 16 experts, hidden
64, feed-forward 32, vocabulary 512. A figure per layer, per step or per logit is the difference of two runs that differ in that
alone.

A ceiling is what was counted when it was written. How to lower one: `python tests/fake_cuda/ceilings.py` prints the figures of
now beside them; who makes one smaller writes it down in the same commit. Who has to raise one says why beside it.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

CEILINGS: dict[str, float] = {
    "waits per layer": 0,
    "waits per step": 1,
    "uploads per step": 3,
    "kernels per layer": 282,
    "kernels per step": 121,
    "bytes kept per token and layer": 3_000,  # from 2272 to 2900, by the process: two differences of two runs
    "bytes kept per layer": 290_000,  # from 219_136 to 283_136
    "bytes kept per logit": 11.65,
    "bytes of the optimizer per layer": 0,
    "bytes moved per token and layer": 204_800,
}
"""Per layer: of one step, forward and backward. Per step: what is left of it without the layers, such as the optimizer's."""

CAPS = (8, 4, 2, 1)
LENGTH = 32
TOKENS = len(CAPS) * LENGTH


@dataclass(frozen=True)
class Cost:
    """What a wave has cost. In bytes over what is held before: `kept` for the backward pass, peaks of passes and of steps."""

    kernels: int
    waits: int
    uploads: int
    moved: int
    kept: int
    passes: int
    optimizer: int


def cost(layers: int = 2, steps: int = 1, vocab: int = 512, length: int = LENGTH) -> Cost:
    """Train the wave once on the device."""
    from fake_cuda.counters import COUNT
    from fedmoe_ds.bench.harness.shapes import Shape, write_model
    from fedmoe_ds.bench.harness.workload import Workload
    from fedmoe_ds.bench.wave.fused import Fused

    load = Workload(Shape("small", 16, 64, 32, layers, 2, vocab), 1, 1, length, 0, caps=CAPS, dtype="bfloat16", device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        write_model(load.shape, 0, Path(folder), "5GB", load.dtype)
        system = Fused(Path(folder), replace(load, steps=steps), bitwise=False)
        COUNT.reset()
        gc.collect()
        gc.freeze()  # so that collecting below is quick
        held = COUNT.now
        with kept_for_backward() as kept, peak_in("_forward_backward") as passes, peak_in("_optimize") as optimizer:
            system.train("timed")
    uploads, moved = sum(COUNT.uploads.values()), sum(COUNT.bytes.values())
    return Cost(COUNT.kernels, COUNT.total_waits, uploads, moved, max(kept) - held, max(passes), max(optimizer))


@contextmanager
def kept_for_backward() -> Iterator[list[int]]:
    """Bytes that are held whenever a backward pass begins."""
    import torch

    from fake_cuda.counters import COUNT

    real, found = torch.Tensor.backward, list[int]()

    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        gc.collect()  # what lies in cycles goes at any moment: counted, it would make the figure a matter of luck
        found.append(COUNT.now)
        real(self, *args, **kwargs)

    torch.Tensor.backward = backward  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.Tensor.backward = real  # type: ignore[method-assign]


@contextmanager
def peak_in(name: str) -> Iterator[list[int]]:
    """Bytes over what was held before, in every call of a phase of the wave trainer."""
    from fake_cuda.counters import COUNT
    from fedmoe_ds.clients.local_training import WaveTrainer

    real, found = getattr(WaveTrainer, name), list[int]()

    def phase(self: Any, *args: Any) -> Any:
        COUNT.reset_peak()
        before = COUNT.now
        outcome = real(self, *args)
        found.append(COUNT.peak - before)
        return outcome

    setattr(WaveTrainer, name, phase)
    try:
        yield found
    finally:
        setattr(WaveTrainer, name, real)


def figures() -> dict[str, float]:
    """Now, by the names of the ceilings."""
    base, deeper, longer, wider = cost(), cost(layers=3), cost(steps=2), cost(vocab=1024)
    longest, deepest = cost(length=2 * LENGTH), cost(layers=3, length=2 * LENGTH)
    by_layer, by_token = deeper.kept - base.kept, (deepest.kept - longest.kept - deeper.kept + base.kept) / TOKENS
    waits, kernels = deeper.waits - base.waits, deeper.kernels - base.kernels
    return {
        "waits per layer": waits,
        "waits per step": longer.waits - base.waits - 2 * waits,
        "uploads per step": longer.uploads - base.uploads - 2 * (deeper.uploads - base.uploads),
        "kernels per layer": kernels,
        "kernels per step": longer.kernels - base.kernels - 2 * kernels,
        "bytes kept per token and layer": by_token,
        "bytes kept per layer": by_layer - by_token * TOKENS,
        "bytes kept per logit": (wider.passes - base.passes) / (TOKENS * 512),
        "bytes of the optimizer per layer": deeper.optimizer - base.optimizer,
        "bytes moved per token and layer": (deeper.moved - base.moved) / TOKENS,
    }


def main() -> None:
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
    sys.path.remove(str(Path(__file__).resolve().parent))
    import fake_cuda

    fake_cuda.enable()
    import torch

    torch.set_num_threads(1)
    print("| figure | now | ceiling |\n|---|---|---|")
    for name, value in figures().items():
        print(f"| {name} | {value:.4g} | {CEILINGS[name]:.4g} |")


if __name__ == "__main__":
    main()
