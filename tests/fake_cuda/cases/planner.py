"""The planner's counts of a pass on a GPU, counted again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from small_models import projections, write_small

from fedmoe_ds.bench.calibration.waves import REPEATS, Bench
from fedmoe_ds.bench.harness.shapes import Shape
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.planner.activations import activations, kept_bytes

NAMES = {
    "case_counts_of_a_pass": ["two-layers", "no-attention"],
    "case_kept_tensors": ["deepseek-v3", "qwen3-30b-a3b"],
}
SHAPES = {
    "two-layers": (Shape("two", experts=8, hidden=64, ffn=32, layers=2, heads=2, vocab=320, top_k=4), ["q_proj", "v_proj"]),
    "no-attention": (Shape("three", experts=16, hidden=96, ffn=64, layers=3, heads=4, vocab=768, top_k=2), []),
}
SEQUENCES, LENGTH, CAP = 4, 48, 2
TOLERANCE, KEPT_TOLERANCE = 0.1, 0.05


def moved(fake: Any) -> int:
    """Bytes of kernels that are no matrix products."""
    return sum(count for kind, count in fake.COUNT.bytes.items() if kind != "products")


def case_counts_of_a_pass(fake: Any, name: str) -> None:
    shape, attention = SHAPES[name]
    with TemporaryDirectory() as folder:
        bench = Bench(shape, attention, Path(folder), device=torch.device("cuda", 0), dtype="bfloat16")
        inner, found = bench.trainer._pass, []

        def counted(*arguments: Any) -> None:
            fake.COUNT.reset()
            before = fake.COUNT.now
            inner(*arguments)
            found.append((fake.COUNT.kernels, moved(fake), fake.COUNT.peak - before))

        bench.trainer._pass = counted
        work = bench.train(SEQUENCES, LENGTH, CAP).work
        fake.COUNT.reset()
        forward = bench.forward(SEQUENCES, LENGTH, CAP).work
    kernels, bytes_, peak = found[-1]
    assert float(work.calls) == pytest.approx(kernels, rel=TOLERANCE)
    assert float(work.bytes) == pytest.approx(bytes_, rel=TOLERANCE)
    assert float(forward.calls) == pytest.approx(fake.COUNT.kernels / REPEATS, rel=TOLERANCE)
    assert float(forward.bytes) == pytest.approx(moved(fake) / REPEATS, rel=2 * TOLERANCE)
    local = bench.job.config.local.model_copy(update={"batch_size": SEQUENCES})
    job = replace(bench.job, config=bench.job.config.model_copy(update={"local": local}))
    planned = activations(job, 1, LENGTH, active=CAP)
    assert planned == pytest.approx(peak, rel=TOLERANCE), (planned, peak)


def case_kept_tensors(fake: Any, name: str) -> None:
    """What attention keeps on a GPU: keys as wide as values or not, of all heads or of few."""
    found: list[int] = []
    real = AdaptedModel.loss

    def counted(*arguments: Any, **rest: Any) -> Any:
        before = fake.COUNT.now
        result = real(*arguments, **rest)
        found.append(fake.COUNT.now - before)
        return result

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        shape = write_small(name, Path(folder) / "model")
        device = torch.device("cuda", 0)
        bench = Bench(shape, projections(name), Path(folder) / "model", device=device, dtype="bfloat16")
        patch.setattr(AdaptedModel, "loss", counted)
        bench.train(SEQUENCES, LENGTH, CAP)
    planned = SEQUENCES * LENGTH * kept_bytes(bench.job, LENGTH, active=CAP)
    assert planned == pytest.approx(found[-1], rel=KEPT_TOLERANCE), (planned, found[-1])
