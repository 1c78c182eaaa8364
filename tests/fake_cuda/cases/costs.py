"""What a step costs, under the ceilings of ceilings.py."""

from __future__ import annotations

from typing import Any

from fake_cuda.ceilings import CEILINGS, figures


def case_nothing_costs_more_than_it_did(fake: Any) -> None:
    found = figures()
    assert found.keys() == CEILINGS.keys()
    assert found["kernels per layer"] > 0 and found["bytes kept per logit"] > 0  # something was counted
    over = {name: (value, CEILINGS[name]) for name, value in found.items() if value > CEILINGS[name]}
    assert over == {}, f"figures over their ceilings: {over}"
