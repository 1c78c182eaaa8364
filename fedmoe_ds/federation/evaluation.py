"""Evaluation: perplexity and next-token accuracy of the global model at every budget tier.

Batches are cut before they are dealt to ranks, and per-batch sums are added in batch order, so the figures do not depend on the
topology. Every rank runs the same number of passes; one without a batch joins with a stand-in row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client, tiers_of
from fedmoe_ds.data import FederatedData, Sequences
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.methods import RoundContext
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.batch import Rows
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.moe_layer import RESCALER

ReadBatch = Callable[[], Sequences]


@dataclass(frozen=True)
class Score:
    """One evaluation row of the tier `label` (see `fedmoe_ds.clients.tiers`), whose top-k is `tier`.

    Loss is the mean negative log-likelihood per target, in nats; it and the accuracy are NaN where there is no target.
    """

    tier: int
    label: str
    split: str
    loss: float
    accuracy: float
    targets: int
    client: str | None = None

    @property
    def perplexity(self) -> float:
        # exp(709.8) is the largest that a float64 holds; a diverged run has a huge perplexity, not an error.
        return math.exp(min(self.loss, 700.0))


def pooled(member: Client, split: str, sums_3N: Tensor, client: str | None = None) -> Score:
    """Pool per-batch (nll, correct, targets) into one row of the tier that `member` is of."""
    nll, correct, targets = (float(value) for value in sums_3N.sum(1))
    loss, accuracy = (nll / targets, correct / targets) if targets else (math.nan, math.nan)
    return Score(member.top_k, member.tier, split, loss, accuracy, int(targets), client)


class Evaluator:
    """Scores the global adapters at each tier: as a client receives them whose budget is what the tier's clients began with.

    What clients changed about their budgets on the way (HetLoRA's pruned ranks) does not count: the tier stays what it was.

    Args:
        spec: method and evaluation settings.
        model: with the adapters of clients in flight.
        bank: the global adapters (one client slot, no gradients); in the model only while an evaluation runs.
        clients: all clients; a tier's personal state is the mean over its clients.
    """

    def __init__(
        self,
        spec: RunSpec,
        model: AdaptedModel,
        runtime: Runtime,
        bank: Bank,
        data: FederatedData,
        clients: list[Client],
    ) -> None:
        self.model, self.execution, self.runtime, self.bank = model, model.execution, runtime, bank
        self.data, self.clients, self.tiers = data, clients, tiers_of(clients)
        self.method, self.config = spec.method, spec.config.evaluation

    def scores(self, personal: Personal, per_client: bool, plain: bool) -> list[Score]:
        """Rows for every tier: split `global`, and with `per_client` also `client` (one per client) and `clients` (pooled).

        `plain` evaluates the foundation itself: no rescaler. Where clients keep models of their own, every client's model is
        scored, at its own tier: `global` pools those of a tier on the global hold-out, `clients` each on its own.
        """
        rows = []
        owners = [client for client in self.clients if len(self.data.holdout(client.index))] if per_client else []
        for members in self.tiers.values():
            how = self.method.assign(members[0], RoundContext(0, personal.dense(members[0].index)))
            how = how if not plain else replace(how, rows_R=None, rescale=None)
            if not self.method.personal_models:
                rows += self._tier_rows(members, how, personal, owners, plain)
                continue
            # A client's own model exists at its own tier only; the foundation is scored there for the same clients.
            own = [client for client in owners if client in members]
            if plain:
                rows += self._tier_rows(members, how, personal, own, plain)
            else:
                rows += self._personal_rows(members, how, personal, own)
        return rows

    def _tier_rows(
        self, members: list[Client], how: Assignment, personal: Personal, owners: list[Client], plain: bool
    ) -> list[Score]:
        """One model for the tier: global adapters, personal blocks at the mean over its clients."""
        for name in (name for name, spec in personal.specs.items() if name in self.bank):
            # float64, so that the mean of many equal float32 values is that value.
            mean = personal.values[name][[client.index for client in members]].double().mean(0)
            self.bank.client(name, 0).copy_(torch.ones_like(mean) if plain and name == RESCALER else mean)
        rows = [pooled(members[0], "global", self._run(self._global_batches(), how))]
        if owners:
            sums_3N = self._run([self._client_batch(client) for client in owners], how)
            rows.append(pooled(members[0], "clients", sums_3N))
            rows += [pooled(members[0], "client", sums_3N[:, i : i + 1], c.name) for i, c in enumerate(owners)]
        return rows

    def _personal_rows(self, members: list[Client], how: Assignment, personal: Personal, owners: list[Client]) -> list[Score]:
        """One model per client; each is scored on the global hold-out, and on its own client's."""
        shared, own = [], {}
        for client in members:
            for name in (name for name in personal.specs if name in self.bank):
                self.bank.client(name, 0).copy_(personal.values[name][client.index])
            shared.append(self._run(self._global_batches(), how))
            if client in owners:
                own[client.name] = self._run([self._client_batch(client)], how)
        rows = [pooled(members[0], "global", torch.cat(shared, 1))]
        if own:
            rows.append(pooled(members[0], "clients", torch.cat(list(own.values()), 1)))
            rows += [pooled(members[0], "client", sums_3N, name) for name, sums_3N in own.items()]
        return rows

    def _global_batches(self) -> list[ReadBatch]:
        held = self.data.global_holdout()
        count = len(held) if self.config.max_sequences is None else min(len(held), self.config.max_sequences)
        # The default binds `start` now; without it all batches would read the last slice.
        size = self.config.batch_size
        return [lambda s=start: held.select(range(s, min(s + size, count))) for start in range(0, count, size)]  # type: ignore[misc]

    def _client_batch(self, client: Client) -> ReadBatch:
        most = self.config.client_sequences
        return lambda: (held := self.data.holdout(client.index)).select(range(min(most, len(held))))

    @torch.no_grad()
    def _run(self, batches: list[ReadBatch], how: Assignment) -> Tensor:
        """[3, N batches]: (nll, correct, targets) under one assignment, identical on every rank."""
        sums_3N = torch.zeros(3, len(batches), dtype=torch.float64)
        world, rank = self.runtime.world_size, self.runtime.rank
        trained_bank, trained_pool = self.execution.bank, self.execution.pool
        self.execution.bank = self._received(how)
        # One slot and one client on every rank: each rank scores batches of its own, with the same adapters.
        self.execution.pool = replace(trained_pool, home_clients=1, merge=False, shared=True)
        try:
            # Every rank runs every turn, with or without a batch: the layers' all-to-alls need all of the cluster.
            for turn in range(math.ceil(len(batches) / world)):
                place = turn * world + rank
                self._pass(batches[place] if place < len(batches) else None, place, how, sums_3N)
        finally:
            self.execution.bank, self.execution.pool = trained_bank, trained_pool
        return self.runtime.control.sum(sums_3N)  # disjoint entries: adding zeros is exact

    def _received(self, how: Assignment) -> Bank:
        """The global adapters as a client with this assignment receives them."""
        # All rows: the global bank itself, without a copy.
        if how.rows_R is None:
            return self.bank
        specs = list(self.bank.specs.values())
        bank = Bank(specs, self.bank.experts, clients=1, device=self.bank.device, with_grad=False)
        for spec in specs:
            value, mask = self.bank.client(spec.name, 0), how.mask(spec, self.bank.device)
            bank.client(spec.name, 0).copy_(value if mask is None else torch.where(mask, value, 0.0))
        return bank

    def _pass(self, read: ReadBatch | None, place: int, how: Assignment, sums_3N: Tensor) -> None:
        rows = []
        if read is not None:
            sequences = read()
            rows.append(Rows.of(0, how.cap, sequences, range(len(sequences)), images=self.model.foundation.images))
        # Without a batch this makes the stand-in row that takes part in the all-to-alls.
        batch = self.model.batch(rows)
        result = self.model.forward(batch, 0, None if how.rescale is None else [how.rescale])
        if read is not None:
            sums_3N[0, place] = float(result.nll_N.double().sum())
            correct_N = result.logits_NV.argmax(-1) == batch.labels_N
            sums_3N[1, place], sums_3N[2, place] = int(correct_N.sum()), len(correct_N)
