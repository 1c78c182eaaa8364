"""Every method, one round in strict mode: everything that a kernel is given lies on its device."""

from __future__ import annotations

from typing import Any

from fake_cuda.runs import root, run_on_device
from method_variants import variant_config

ROUND: dict[str, Any] = {"execution": {"reproducible": "fast"}, "federation": {"rounds": 1}, "evaluation": {"every": 1}}


def case_flame(fake: Any) -> None:
    run_on_device(variant_config(root(), "flame", "round", ROUND))


def case_scaffold(fake: Any) -> None:
    run_on_device(variant_config(root(), "scaffold", "round", ROUND))
