"""Ceilings: what one step of training may cost on a GPU, counted on the stand-in, so that a regression shows without a GPU.

The workload is `bench/wave`'s own trainer (four clients of unequal caps in one pass, bfloat16) on a model of 16 experts, hidden
64, feed-forward 32, vocabulary 512. A figure per layer, per step or per logit is the difference of two runs that differ in that
alone.

A ceiling is what was counted when it was written. How to lower one: `python tests/fake_cuda/ceilings.py` prints the figures of
now beside them; who makes one smaller writes it down in the same commit. Who has to raise one says why beside it.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

CEILINGS: dict[str, float] = {
    "waits per layer": 0,
    "waits per step": 13,
    "uploads per step": 8,
    "kernels per layer": 337,
    "kernels per step": 285,
    "bytes kept per token and layer": 3076,
    "bytes kept per logit": 16,
    "bytes moved per token and layer": 204_000,
}
"""Per layer: of one step, forward and backward. Per step: what is left of it without the layers, such as the optimizer's."""

CAPS = (8, 4, 2, 1)
LENGTH = 32
TOKENS = len(CAPS) * LENGTH


@dataclass(frozen=True)
class Cost:
    """What a wave has cost; `peak` in bytes over what was held before."""

    kernels: int
    waits: int
    uploads: int
    peak: int
    moved: int


def cost(layers: int, steps: int, vocab: int) -> Cost:
    """Train the wave once on the device."""
    from fake_cuda.counters import COUNT
    from fedmoe_ds.bench.harness.shapes import Shape, write_model
    from fedmoe_ds.bench.harness.workload import Workload
    from fedmoe_ds.bench.wave.fused import Fused

    load = Workload(Shape("small", 16, 64, 32, layers, 2, vocab), 1, 1, LENGTH, 0, caps=CAPS, dtype="bfloat16", device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        write_model(load.shape, 0, Path(folder), "5GB", load.dtype)
        system = Fused(Path(folder), replace(load, steps=steps), bitwise=False)
        held = COUNT.now
        COUNT.reset()
        system.train("timed")
    return Cost(COUNT.kernels, COUNT.total_waits, sum(COUNT.uploads.values()), COUNT.peak - held, sum(COUNT.bytes.values()))


def figures() -> dict[str, float]:
    """Now, by the names of the ceilings."""
    base, deeper, longer, wider = cost(2, 1, 512), cost(3, 1, 512), cost(2, 2, 512), cost(2, 1, 1024)
    waits, kernels = deeper.waits - base.waits, deeper.kernels - base.kernels
    return {
        "waits per layer": waits,
        "waits per step": longer.waits - base.waits - 2 * waits,
        "uploads per step": longer.uploads - base.uploads - 2 * (deeper.uploads - base.uploads),
        "kernels per layer": kernels,
        "kernels per step": longer.kernels - base.kernels - 2 * kernels,
        "bytes kept per token and layer": (deeper.peak - base.peak) / TOKENS,
        "bytes kept per logit": (wider.peak - base.peak) / (TOKENS * 512),
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
