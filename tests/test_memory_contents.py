"""What memory held before is irrelevant: a run whose every fresh tensor is full of NaN has the same digest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import federations
import pytest
import torch
from every import every


@pytest.fixture
def memory_of_nan() -> Iterator[None]:
    guard = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), guard.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0])
    guard.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("reproducible", ["bitwise", "fast"])
@pytest.mark.usefixtures("memory_of_nan")
def test_a_run_in_memory_of_nan(reproducible: str, tmp_path: Path) -> None:
    """Two clients of a few rows: most of the experts get none in many a pass."""
    federations.write_inputs(tmp_path, samples=(4, 3), num_experts=64, num_experts_per_tok=2)
    digests = {}
    for fill in (False, True):
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        assert bool(torch.empty(3).isnan().all()) or not fill
        change = {"federation": {"rounds": 1}, "execution": {"reproducible": reproducible}}
        result = federations.run_alone(federations.make_config(tmp_path, f"nan-{fill}", change))
        assert every(bool(torch.from_numpy(value).isfinite().all()) for value in result.adapters.values())
        digests[fill] = result.digest
    assert digests[False] == digests[True]
