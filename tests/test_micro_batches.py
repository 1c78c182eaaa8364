"""Micro-batches are the same mathematics: they change nothing beyond rounding, or are refused in one line.

Every method and every loss that a step has beside the task's, with passes of one sequence against passes of whole steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense_inputs import dense_config, write_dense
from federations import make_config, run_alone, write_inputs
from method_variants import SMALL, VARIANTS

from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import method_for

GATE: dict[str, Any] = {"adapters": {"router": "train"}}
# SGD: what Adam makes of gradients that are nearly zero is the rounding itself.
PLAIN: dict[str, Any] = {"local": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05, "weight_decay": 0.01}}
SPARSE: dict[str, list[dict[str, Any]]] = {
    **{name: [variant, PLAIN] for name, variant in VARIANTS.items() if name != "moments" and not name.startswith("scaffold")},
    **{name: [VARIANTS[name], PLAIN, {"local": {"momentum": 0.0}}] for name in ("scaffold", "scaffold-rows")},
    "clip": [VARIANTS["flame"], GATE, {"local": {**PLAIN["local"], "clip": 0.05}}],
    "z-loss": [VARIANTS["flame"], GATE, PLAIN, {"local": {"z_loss": 0.3}, "adapters": {"dropout": 0.2}}],
    "balance": [VARIANTS["flame"], GATE, PLAIN, {"local": {"balance_loss": 0.3}}],
    "recomputed": [VARIANTS["flame"], GATE, PLAIN, {"execution": {"activation_checkpointing": True}}],
    "full": [VARIANTS["fedit"], PLAIN, {"adapters": {"expert_training": "full"}}],
}
DENSE: dict[str, list[dict[str, Any]]] = {
    auxiliary: [{"method": {"auxiliary": auxiliary, **({} if auxiliary == "none" else {"coefficient": 0.3})}}, PLAIN]
    for auxiliary in ("none", "switch", "adaptive", "global")
}
REFUSED = {"flood", "hfedmoe", "hfedmoe-full", "balance", "switch", "adaptive", "global"}
QUICK = {"fedit", "z-loss", "none"}
"""What `make test` runs; the rest, with `make test-sweep`."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("micro")
    write_inputs(folder)
    write_dense(folder)
    return folder


def config_of(root: Path, case: str, micro: int | None) -> Config:
    change = {"execution": {"micro_batch_size": micro}, "federation": {"rounds": 1}, "evaluation": {"client_sequences": 0}}
    if case in DENSE:
        return dense_config(root, "llama", f"{case}-{micro}", *DENSE[case], change)
    return make_config(root, f"{case}-{micro}", SMALL, *SPARSE[case], change)


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_needs_a_whole_step_refuses_parts_of_it(root: Path, case: str) -> None:
    with pytest.raises(UserError, match=r"^execution.micro_batch_size: 1: .*; use null"):
        method_for(config_of(root, case, 1))
    method_for(config_of(root, case, None))


def trained(config: Config) -> dict[str, np.ndarray]:
    """Global adapters, and clients' own models where the method has some."""
    return {key: value.cpu().numpy().copy() for key, value in run_alone(config).parts.result_tensors()}


def check(root: Path, case: str) -> None:
    whole, parts = (trained(config_of(root, case, micro)) for micro in (None, 1))
    assert whole.keys() == parts.keys() and len(whole) > 0
    for key, value in whole.items():
        np.testing.assert_allclose(parts[key], value, rtol=2e-4, atol=2e-6 * max(1.0, float(np.abs(value).max())), err_msg=key)


@pytest.mark.parametrize("case", sorted(QUICK))
def test_micro_batches_change_nothing(root: Path, case: str) -> None:
    check(root, case)


@pytest.mark.sweep
@pytest.mark.timeout(600)
def test_micro_batches_change_nothing_in_any_method(root: Path) -> None:
    for case in sorted({*SPARSE, *DENSE} - REFUSED - QUICK):
        check(root, case)
