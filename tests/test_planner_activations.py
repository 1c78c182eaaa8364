"""What a training pass keeps, counted in real passes of every family, and what the planner takes for it.

The models have the ratios of the five whose configurations are in configs/models, at a sixteenth of their widths: heads that do
not divide the model width, fewer heads for keys, latent attention, shared experts and layers without experts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import MODELS, projections, write_small
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmoe_ds.bench.calibration.waves import Bench
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.planner.activations import kept_bytes

# Nothing below the first experts is trained there: with dense layers first, and without.
UNADAPTED = ("deepseek-v3", "olmoe-1b-7b")
SEQUENCES, LENGTH = 4, 48
TOLERANCE = 0.05


class Alive(TorchDispatchMode):
    """Storages that operations made while it was on, and which of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    @property
    def bytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def kept(bench: Bench, monkeypatch: pytest.MonkeyPatch, cap: int) -> int:
    """Bytes that the forward pass of a local step leaves behind."""
    found: list[int] = []
    real = AdaptedModel.loss

    def counted(*arguments: Any, **rest: Any) -> Any:
        with Alive() as alive:
            result = real(*arguments, **rest)
            found.append(alive.bytes)
        return result

    monkeypatch.setattr(AdaptedModel, "loss", counted)
    bench.train(SEQUENCES, LENGTH, cap)
    return found[-1]


@pytest.mark.parametrize(("name", "adapted"), [*((name, "all") for name in MODELS), *((name, "none") for name in UNADAPTED)])
def test_kept_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, adapted: str) -> None:
    shape = write_small(name, tmp_path / "model")
    bench = Bench(shape, projections(name) if adapted == "all" else [], tmp_path / "model")
    found = kept(bench, monkeypatch, cap=2)
    local = bench.job.config.local.model_copy(update={"batch_size": SEQUENCES})
    job = replace(bench.job, config=bench.job.config.model_copy(update={"local": local}))
    planned = SEQUENCES * LENGTH * kept_bytes(job, LENGTH, active=2)
    assert planned == pytest.approx(found, rel=TOLERANCE), (planned / (SEQUENCES * LENGTH), found / (SEQUENCES * LENGTH))
