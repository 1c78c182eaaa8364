"""Steps of `launch/bench.py gpu` in this process: they run on the stand-in, and their figures mean nothing there."""

from __future__ import annotations

import atexit
import tempfile
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.gpu import checks, speeds
from fedmoe_ds.bench.gpu.request import Request, Tell

_folder = tempfile.TemporaryDirectory(prefix="gpu-visit-")
atexit.register(_folder.cleanup)
FOLDER = Path(_folder.name)
REQUEST = Request("tiny", str(FOLDER / "model"), str(FOLDER))


def told(step: Any) -> list[dict[str, Any]]:
    tell = Tell(FOLDER / f"{step.__name__}.jsonl")
    step(REQUEST, tell)
    return tell.told()


def case_facts(fake: Any) -> None:
    found = told(checks.facts)
    assert found[0]["device"] == "Stand-in for CUDA" and found[-1]["missing"] == []


def case_the_floor(fake: Any) -> None:
    fake.COUNT.reset()
    copy, product = told(speeds.floor)
    assert copy["copy_tb_s"] > 0 and product["bf16_tflops"] > 0 and product["side"] == 256
    assert fake.COUNT.kernels >= 24, "twelve copies and twelve products at least"


def case_grouped_products(fake: Any) -> None:
    found = told(checks.grouped)
    assert [one.pop("groups") for one in found] == list(checks.GROUPS)
    assert [set(one.values()) for one in found] == [{True}] * 3


def case_the_model_is_drawn_on_the_device(fake: Any) -> None:
    fake.COUNT.reset()
    (found,) = told(speeds.model)
    assert fake.COUNT.kernels > 0 and found["gib"] > 0
    assert {path.suffix for path in REQUEST.folder().iterdir()} >= {".json", ".safetensors"}


def case_memory_is_measured_until_a_step_does_not_fit(fake: Any) -> None:
    """In a pass, of which the trainer has an error of its own, or before there is one."""
    if not Path(REQUEST.model).exists():  # where this case runs by itself
        told(speeds.model)
    real = speeds._fused

    def fused(room: int, before: bool) -> Any:
        def build(request: Request, sequences: int) -> Any:
            fake.COUNT.limit = fake.COUNT.now + room if before and sequences == 4 else None
            system = real(request, sequences)
            fake.COUNT.limit = fake.COUNT.now + room if sequences == 4 else None
            return system

        return build

    for before in (False, True):
        speeds._fused = fused(4096, before)
        try:
            (FOLDER / "memory.jsonl").unlink(missing_ok=True)
            first, last = told(speeds.memory)
        finally:
            speeds._fused, fake.COUNT.limit = real, None
        assert first["tokens"] == 24 and first["peak_gib"] > 0 and last["tokens"] == 96, (first, last)
        assert last["out_of_memory"] and "peak_gib" not in last and ("held_gib" in last) != before, last
