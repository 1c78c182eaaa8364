"""Training loop of built-in foundations: AdamW, warm-up and cosine decay, batches by addressed draws, reproducible bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.config.foundation_section import PretrainConfig
from fedmoe_ds.distributed.stop_points import StopError, stop_point
from fedmoe_ds.foundation.builtin.loop_state import TrainingState
from fedmoe_ds.randomness import address_key, generator

_WARMUP_SHARE = 0.05
_REPORTS = 10

Progress = Callable[[str], None]
BatchLoss = Callable[[Any, Tensor], Tensor]
"""(model, row numbers [B]) -> mean loss of these samples."""


def train_new(
    create: Callable[[], Any],
    batch_loss: BatchLoss,
    samples: int,
    unit: tuple[int, str],
    config: PretrainConfig,
    seed: int,
    progress: Progress,
    state: TrainingState,
) -> tuple[Any, list[float]]:
    """Create a model with addressed initial weights and train it; return it with the loss of every step.

    Args:
        create: makes the model from torch's global generator, which is seeded before and restored after.
        samples: how many there are to draw from.
        unit: how many of what a sample is, for the reported speed: (128, "tokens").
        state: where the training goes on if it is found there, and is kept when it has to stop.

    Raises:
        StopError: asked to stop, between two steps; what was trained is in `state`.
    """
    # No devices: pre-training runs on the CPU, whatever the run uses, so its bits are the same.
    with isolated(config.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(address_key(seed, "pretrain-init") % 2**63)
        model = create()
        return model, _train(model, batch_loss, samples, unit, config, seed, progress, state)


def _train(
    model: Any,
    batch_loss: BatchLoss,
    samples: int,
    unit: tuple[int, str],
    config: PretrainConfig,
    seed: int,
    progress: Progress,
    state: TrainingState,
) -> list[float]:
    """AdamW with warm-up and cosine decay to zero; returns the loss of every step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    losses = state.restore(model, optimizer, config.steps)
    for group in optimizer.param_groups:
        group["initial_lr"] = config.lr  # what LambdaLR notes at a beginning, and asks for later
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config.steps), last_epoch=len(losses) - 1)
    start, done = time.monotonic(), len(losses)
    # Batches of steps already done are skipped, not kept: their order follows from the seed alone.
    for step, batch_B in enumerate(islice(_batches(samples, config, seed), done, None), start=done + 1):
        _stop_or_go_on(model, optimizer, losses, state)
        loss = batch_loss(model, torch.from_numpy(batch_B))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % max(1, config.steps // _REPORTS) == 0 or step == config.steps:
            speed = (step - done) * len(batch_B) * unit[0] / (time.monotonic() - start)
            progress(f"foundation: step {step}/{config.steps} loss {losses[-1]:.3f} ({speed:.0f} {unit[1]}/s)")
    return losses


def _stop_or_go_on(model: Any, optimizer: torch.optim.Optimizer, losses: list[float], state: TrainingState) -> None:
    try:
        stop_point()
    except StopError as stop:
        # Before the first step there is nothing that a new start would not make again at once.
        if losses:
            stop.kept = state.save(model, optimizer, losses)
        raise


def _rate(step: int, steps: int) -> float:
    warmup = max(1, round(_WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batches(samples: int, config: PretrainConfig, seed: int) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """Row numbers of each step: every sample once per epoch, in an order addressed by (seed, epoch)."""
    epoch = 0
    rows = np.empty(0, dtype=np.int64)
    for _ in range(config.steps):
        while len(rows) < config.batch_size:
            rows = np.concatenate([rows, generator(seed, "pretrain-order", epoch).permutation(samples)])
            epoch += 1
        batch_B, rows = rows[: config.batch_size], rows[config.batch_size :]
        yield batch_B


@contextmanager
def isolated(threads: int) -> Iterator[None]:
    """Run with this number of CPU threads and reproducible kernels only, then restore what the process had."""
    guard: Any = torch.utils.deterministic
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), guard.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    guard.fill_uninitialized_memory = False  # the guard against unwritten memory costs much time
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        guard.fill_uninitialized_memory = before[2]
