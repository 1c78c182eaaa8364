"""Learning-rate schedule: of a client's local steps, begun anew in every round."""

from __future__ import annotations

import math

from fedmoe_ds.config import LocalConfig


def learning_rate(config: LocalConfig, step: int, steps: int) -> float:
    """Learning rate of a client's step 0 <= step < steps: linear warm-up, then constant, linear or cosine decay."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        # step + 1: a first step at rate zero would be a step for nothing.
        return config.lr * (step + 1) / warmup
    # Below 1 at the last step, so the last step still moves the weights.
    progress = (step - warmup) / max(steps - warmup, 1)
    if config.schedule == "linear":
        return config.lr * (1.0 - progress)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr
