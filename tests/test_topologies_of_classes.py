"""Equal bits on every topology in each processor class that this machine has, with weights in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import run_distributed
from federations import joined, make_config, run_alone, run_joined, write_inputs

from fedmoe_ds.kernels import matrix, processor_class

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(900)]

SHORT: dict[str, Any] = {"foundation": {"dtype": "bfloat16"}, "federation": {"rounds": 1, "participation": 0.8}}
NATIVE = "native"
"""Whatever the compiler takes this machine for: one of the others here."""
CLASSES = [one.name for one in processor_class.CLASSES if one.name != NATIVE and matrix.kernel_of(one.name) is not None]
JOBS = [(1, 8), (2, 8), (2, 1)]
"""Expert-parallel sizes and clients in flight."""


def run(root: Path, name: str, ep_size: int, in_flight: int) -> Any:
    return make_config(root, name, SHORT, {"topology": {"ep_size": ep_size}, "execution": {"clients_in_flight": in_flight}})


def force(processor: str) -> None:
    """As on a machine whose best class this is."""
    kernel = matrix.kernel_of(processor)
    matrix.best = lambda: kernel  # type: ignore[assignment]


def on_two(rank: int, root: Path, processor: str) -> list[tuple[str, Any]]:
    force(processor)
    runtime, found = joined(rank), []
    for ep_size, in_flight in JOBS:
        result = run_joined(run(root, f"{processor}-{ep_size}-{in_flight}", ep_size, in_flight), runtime)
        found.append((result.digest, result.scores()))
    assert matrix.kernel().processor == processor
    return found


def test_each_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "best", matrix.best)  # put back at the end
    assert CLASSES, "there is a compiler"
    write_inputs(tmp_path)
    digests = {}
    for processor in CLASSES:
        force(processor)
        alone = run_alone(run(tmp_path, f"{processor}-alone", 1, 3))
        expected = (alone.digest, alone.scores())
        assert run_distributed(on_two, 2, tmp_path, processor) == [[expected] * len(JOBS)] * 2, processor
        digests[processor] = alone.digest
    # The two that widen weights compute the same; the two that round rows differ from them and from each other.
    widening = [digests[name] for name in ("AVX512", "AVX2") if name in digests]
    rounding = [digests[name] for name in ("AMX-BF16", "AVX512-BF16") if name in digests]
    assert len({*widening}) <= 1 and len({*widening, *rounding}) == len({*widening}) + len(rounding)
