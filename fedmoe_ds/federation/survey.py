"""Survey: one more pass over the data of a round's clients, which trains nothing, by the adapters that the round has made.

Methods ask for it whose statistics are those of the new model (`Method.surveys`). Clients are dealt to ranks by their order;
what one of them has summed up does not depend on where. Every rank runs as many passes as the one with most, because a layer's
all-to-all needs all ranks of a cluster.

Legend: N targets, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.methods import LocalStep, Targets
from fedmoe_ds.model.batch import Rows
from fedmoe_ds.model.objective import Sums, add_sums
from fedmoe_ds.model.upload import upload

if TYPE_CHECKING:
    from fedmoe_ds.federation.build import Parts


@torch.no_grad()
def survey(parts: Parts, round_index: int, clients: Sequence[Client]) -> None:
    """Make the statistics of the next round, where the method asks for it. Collective."""
    server, topology, method = parts.server, parts.topology, parts.spec.method
    sums = server.averaged.sums(server.exact, parts.runtime.device) if method.surveys else None
    if sums is None:
        return
    world, rank, found = parts.runtime.world_size, parts.runtime.rank, dict[Client, Sums]()
    # As many samples as a pass of training has: a key of the evaluation must not decide what is trained.
    step = parts.config.local.batch_size
    size = min(parts.config.execution.micro_batch_size or step, step)
    most = max(sum(-(-client.sequences // size) for client in clients[first::world]) for first in range(world))
    # What belongs to a client, which `assign` may ask for, is at home in a cluster that need not be this one.
    clusters = [topology.layout.cluster_ranks(cluster) for cluster in range(topology.layout.clusters)]
    wanted = [[client.index for first in ranks for client in clients[first::world]] for ranks in clusters]
    parts.state.personal.fetch(wanted, parts.runtime)
    passes = _passes(parts, round_index, clients[rank::world], size)
    # All LoRA rows: clients that have something of their own are refused (`contradictions`).
    with parts.evaluator.receiving(Assignment(1)):
        for _ in range(most):
            client, told, rows, chosen = next(passes, (None, Assignment(1), [], []))
            seen = _seen(parts, told, rows, chosen)
            if client is not None:
                add_sums(found.setdefault(client, {}), method.survey(seen))
    for client, own in found.items():
        server.averaged.add(sums, method.summary(client, {name: value.cpu().numpy() for name, value in own.items()}))
    sums.reduce(topology.sum_cluster, topology.sum_shard)
    server.averaged.step(sums, parts.state.server)


def _passes(
    parts: Parts, round_index: int, clients: Sequence[Client], size: int
) -> Iterator[tuple[Client | None, Assignment, list[Rows], list[int]]]:
    """This rank's passes: samples of one client each, what it is told, and which of its samples these are."""
    images = parts.evaluator.model.foundation.images
    for client in clients:
        told, data = parts.trainer.hooks.assign(client, round_index), parts.training_data.train(client.index)
        for first in range(0, client.sequences, size):
            chosen = list(range(first, min(first + size, client.sequences)))
            yield client, told, [Rows.of(0, told.cap, data, chosen, told.allowed_LE, images)], chosen


def _seen(parts: Parts, told: Assignment, rows: list[Rows], chosen: list[int]) -> Targets:
    """One pass; without rows that of the stand-in, which takes part in the all-to-alls."""
    model = parts.evaluator.model
    batch = model.batch(rows)
    result = model.forward(batch, 0, None if told.rescale is None else [told.rescale])
    samples = np.repeat(np.array(chosen, dtype=np.int64), rows[0].targets_of_samples if rows else [])
    (sample_N,) = upload([samples], result.nll_N.device)
    places = (sample_N, batch.predict_N, result.run.routed)
    (hidden_ND,) = result.members
    return Targets(batch.labels_N, result.nll_N, hidden_ND, *places, LocalStep(len(samples)))
