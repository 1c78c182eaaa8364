"""Runs that were never trained: adapters, personal blocks and merged weights drawn at random, saved as a checkpoint of round 1.

A distinct change per expert, two experts that nobody has trained, and the logits of every tier as evaluation computes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from federations import alone, build, own_values

from fedmoe_ds.checkpoint import state
from fedmoe_ds.checkpoint.writer import CheckpointWriter
from fedmoe_ds.config import Config
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.model.batch import Rows
from fedmoe_ds.results import Selection

UNTRAINED = (1, 5)
"""Experts without an update of their own."""
IDS = np.random.default_rng(3).integers(2, 300, size=(2, 20))


def run_folder(config: Config) -> Path:
    return Path(config.output) / config.name


def random_run(config: Config, spread: float = 0.05) -> Parts:
    """The parts of a run whose folder holds a checkpoint of round 1; `spread` is the standard deviation of what is drawn."""
    parts, journal = build(config, *alone())
    draw = torch.Generator().manual_seed(1)
    own, bank = parts.state.personal, parts.state.adapters
    merged = [server.values for name, server in parts.state.server.items() if name == "base"]
    shared = {name: value for name, value in own_values(parts).items() if name in bank}
    for values in (bank.values, shared, *merged):
        for name, value in values.items():
            drawn = spread * torch.randn(value.shape, generator=draw)
            if name.startswith("experts") and name.endswith(("lora_B", "base")):
                drawn.movedim(2 if values is shared else 1, 0)[list(UNTRAINED)] = 0.0
            value.add_(drawn)
    for index in range(own.clients):
        for name, value in shared.items():
            own.store(index, name, value[index])
    own.share(parts.runtime, parts.topology.control)
    for base in (server for name, server in parts.state.server.items() if name == "base"):
        # The others' weights are the foundation's own, and no part of a checkpoint.
        for key, _, value in base.items(0):
            if not any(f".experts.{expert}." in key for expert in UNTRAINED):
                base.note_change(key, torch.zeros_like(value), value)
    parts.server.load_base(parts.state.server)
    save(parts, journal.position())
    journal.close()
    return parts


def save(parts: Parts, position: int) -> None:
    """A checkpoint of the state as it is, as round 1."""
    writer = CheckpointWriter(parts.checkpoints, parts.runtime, 1, background=False)
    parts.state.round = 1
    names = [client.name for client in parts.clients]
    state.save(writer, parts.topology, parts.state, parts.identity, parts.config_text, position, names)
    writer.finish()


@torch.no_grad()
def own_logits(parts: Parts, selection: Selection) -> torch.Tensor:
    """[N, V] of `IDS`, position by position but the last, or of the images of `pixels`; by the run's own engine."""
    evaluator, member = parts.evaluator, selection.members[0]
    how = evaluator.assigned(member, parts.state.personal, False)
    if selection.client is None:
        evaluator.load_mean(list(selection.members), parts.state.personal, False)
    else:
        evaluator.load_own(member, parts.state.personal)
    with evaluator.receiving(how):
        if parts.foundation.images is None:
            rows = Rows(0, how.cap, list(IDS), [np.arange(len(ids)) > 0 for ids in IDS])
        else:
            held = parts.data.global_holdout()
            rows = Rows.of(0, how.cap, held, range(len(held)), images=parts.foundation.images)
        rescale = None if how.rescale is None else [how.rescale]
        return evaluator.model.forward(evaluator.model.batch([rows]), 0, rescale).logits_NV.clone()


@torch.no_grad()
def their_logits(model: Any, parts: Parts) -> torch.Tensor:
    """The same of a Hugging Face model."""
    if parts.foundation.images is None:
        logits_BSV = model(torch.from_numpy(IDS)).logits.float()
        return logits_BSV[:, :-1].flatten(0, 1)
    held = parts.data.global_holdout()
    return model(pixel_values=torch.from_numpy(np.array(held.select(range(len(held))).pixels))).logits.float()
