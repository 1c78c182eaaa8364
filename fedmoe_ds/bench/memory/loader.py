"""Loader: one rank loads its part of a model and reports what that took."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.models.olmoe import modeling_olmoe  # noqa: F401  (its modules are no weights)

from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed import process_groups
from fedmoe_ds.distributed.launcher import detect_launch
from fedmoe_ds.distributed.runtime import init_runtime
from fedmoe_ds.foundation.loading import load_model
from fedmoe_ds.machine import peak_mib, resident_mib


def measure(folder: Path, ep_size: int) -> dict[str, float]:
    """Join the world, load, and return MiB: resident before, peak, dense part, own experts and whole model."""
    runtime = init_runtime(detect_launch(), TopologyConfig(device="cpu", timeout_s=300.0))
    process_groups.create_groups(ep_size)
    runtime.barrier()
    before = resident_mib()
    model, layers = load_model(folder, torch.float32, ep_size, runtime.rank % ep_size, runtime.device)
    peak = peak_mib()
    own = sum(layer.w13.nbytes + layer.w2.nbytes for layer in layers)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    runtime.barrier()
    return {
        "before_mib": before,
        "peak_mib": peak,
        "dense_mib": (held - own) / 2**20,
        "own_experts_mib": own / 2**20,
        "model_mib": (held - own + own * ep_size) / 2**20,
    }
