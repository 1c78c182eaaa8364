"""Learning-rate schedules: one across the rounds of a run, and one over a client's local steps, begun anew in every round.

Across rounds as in Flower's FlowerTune (`cosine_annealing(current_round, total_round, lrate_max, lrate_min)`): round t of T,
counted from 1, starts from final_lr + (lr - final_lr) d(t / T) with d(p) = (1 + cos(pi p)) / 2, or 1 - p. The last round has
`final_lr`. OpenFedLLM counts from 0: each of its rounds has the rate that FlowerTune's has one round earlier.
"""

from __future__ import annotations

import math

from fedmoe_ds.config import LocalConfig


def round_rate(config: LocalConfig, round_index: int, rounds: int) -> float:
    """What the local schedule of round 1 <= round_index <= rounds starts from: its peak learning rate."""
    if config.rounds_schedule == "constant":
        return config.lr
    return config.final_lr + (config.lr - config.final_lr) * _decay(config.rounds_schedule, round_index / rounds)


def learning_rate(config: LocalConfig, peak: float, step: int, steps: int) -> float:
    """Learning rate of a client's step 0 <= step < steps: linear warm-up to `peak`, then constant, linear or cosine decay."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        # step + 1: a first step at rate zero would be a step for nothing.
        return peak * (step + 1) / warmup
    # Below 1 at the last step, so the last step still moves the weights.
    return peak * _decay(config.schedule, (step - warmup) / max(steps - warmup, 1))


def _decay(schedule: str, progress: float) -> float:
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
