"""Server training: the server as one more client, which trains on the public split after its step.

Cluster 0 trains it, as a wave of one client, with the settings of clients but for its own rate and epochs, and with plain
cross-entropy: of what a method observes, decides or minimises it does nothing. A router before the layers, which has its
gradient from its method's loss alone, stays as it is. The server is in no mean. What it has trained reaches all ranks through
sums of their own in which it is alone, and becomes the global adapters. Batches are drawn by its index, the one behind the
clients'; a round draws as that round, `warm_up` as round 0. A start that was stopped before its first round warms up again.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedmoe_ds.aggregation.postprocessors import OK, keep_out_non_finite, postprocess
from fedmoe_ds.aggregation.round_sums import RoundSums
from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client, richest
from fedmoe_ds.clients.hooks import LocalTrainingHooks
from fedmoe_ds.clients.local_training import WaveTrainer
from fedmoe_ds.clients.out_of_memory import OutOfMemory
from fedmoe_ds.config import Config
from fedmoe_ds.data import FederatedData
from fedmoe_ds.distributed.phase_timer import PhaseTimer
from fedmoe_ds.errors import LostError
from fedmoe_ds.model.adapter_bank import shared_blocks

if TYPE_CHECKING:
    from fedmoe_ds.federation.build import Parts

NAME = "the server"


def epochs_of(config: Config, round_index: int) -> float:
    """How often the server goes over the public split after a round; before the first for round 0."""
    told = config.server.training
    if told is None:
        return 0.0
    return told.epochs if round_index else told.warm_up


def server_client(clients: Sequence[Client], data: FederatedData, top_k: int) -> Client:
    """The server as a client of no budget."""
    own, index = data.train(len(clients)), len(clients)
    counts = {"samples": len(own), "sequences": len(own), "targets": own.target_count(), "rows": own.row_count()}
    return replace(richest(clients), index=index, name=NAME, cap=top_k, layers=None, tier="", **counts)


def train_server(parts: Parts, round_index: int) -> dict[str, Any]:
    """Train on the public split, in place of the global adapters. Collective.

    Returns:
        What the record says of it, on every rank; nothing where the server does not train.
    """
    epochs = epochs_of(parts.config, round_index)
    if epochs == 0:
        return {}
    adapters, sums, found = parts.state.adapters, _sums(parts), dict[str, Any]()
    if parts.topology.cluster == 0:
        found = _trained(parts, round_index, epochs, sums)
    # The other clusters wait here, and not in the sums: a message may take as long as a slow cluster's waves.
    told: dict[str, Any] = parts.runtime.gather(found)[0]
    sums.reduce(parts.topology)
    with torch.no_grad():
        # Without a weight, of an update that was kept out, the mean is the present value.
        for name, value in sums.average(adapters, lambda tallies: 1.0).items():
            adapters.client(name, 0).copy_(value)
    return told


def _sums(parts: Parts) -> RoundSums:
    experts = len(parts.spec.expert_layout.held)
    return RoundSums(parts.spec.blocks, experts, parts.spec.bitwise, device=parts.runtime.device)


def _trained(parts: Parts, round_index: int, epochs: float, sums: RoundSums) -> dict[str, Any]:
    """Train on this cluster's ranks, and put the outcome into this rank's sums."""
    client = server_client(parts.clients, parts.data, parts.spec.method.facts.top_k)
    # Its home is the first rank, where the record is written.
    wave = [[client], *([] for _ in range(1, parts.config.topology.ep_size))]
    trainer, limits = _trainer(parts, epochs), parts.skipped.limits(max(round_index, 1))
    try:
        ((view, update),) = trainer.train(wave, round_index, parts.state.adapters, lambda _: {}, parts.data.train, limits)
    except OutOfMemory as error:
        raise LostError(
            f"server.training: {error}; set execution.micro_batch_size below {error.sequences}, under another name"
        ) from None
    status = postprocess([keep_out_non_finite], view, update)
    if status == OK:
        with torch.no_grad():
            for spec in shared_blocks(view.blocks()):
                value = view.value(spec)
                sums.add(0, spec, value, [np.ones(value.shape[: 2 if spec.expert else 1])])
    first, last = update.losses or (None, None)
    told = {"steps": update.steps, "tokens": update.tokens, "loss_first": first, "loss_last": last, "status": status}
    return {f"server_{name}": value for name, value in told.items()}


def _trainer(parts: Parts, epochs: float) -> WaveTrainer:
    """The clients' trainer with their buffers, under the server's settings."""
    told, trainer = parts.config.server.training, copy(parts.trainer)
    assert told is not None
    own = {"epochs": epochs, "steps": None, "max_steps": None, "lr": told.lr, "rounds_schedule": "constant"}
    # No more: a method, and a correction of drift, are about clients. The optimizer is the same one, and begins anew.
    # Without a gradient decay would move a router before the layers, which is all that is common to them.
    common = not parts.spec.method.pre_gated
    hooks = LocalTrainingHooks(assign=lambda client, _: Assignment(client.cap, trains_common=common))
    trainer.local, trainer.hooks, trainer.timer = trainer.local.model_copy(update=own), hooks, PhaseTimer()
    return trainer
