"""Evaluation: perplexity and next-token accuracy of the global model at every budget tier.

Batches are cut before they are dealt to ranks, and per-batch sums are added in batch order, so the figures do not depend on the
topology. Every rank runs the same number of passes; one without a batch joins with a stand-in row. Small hold-outs of
clients share a pass wherever clients in training do, and the sums of each are those of a pass of its own.
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
from fedmoe_ds.config import Config
from fedmoe_ds.data import FederatedData, Sequences
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.methods import RoundContext
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.batch import Rows
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.moe_layer import RESCALER

ReadPart = Callable[[], Sequences]
"""Reads what one row of figures is about: a batch of the global hold-out, or what is scored of one client's."""


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


def most_together(config: Config, home: int) -> int:
    """Sequences of clients' hold-outs in one pass: as many as a pass of training has with `home` clients on a rank."""
    step = config.local.batch_size
    return max(config.evaluation.batch_size, home * min(config.execution.micro_batch_size or step, step))


def passes(sizes: list[int], longest: list[int], limit: int) -> list[list[int]]:
    """Cut parts of so many sequences into passes of at most `limit` sequences, or of a single larger part.

    Parts whose longest sequences are about equally long come together: a pass is padded to the longest of all.
    """
    found, total = list[list[int]](), limit
    for place in sorted(range(len(sizes)), key=lambda place: longest[place]):
        if not found or total + sizes[place] > limit:
            found.append([])
            total = 0
        found[-1].append(place)
        total += sizes[place]
    return found


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
        self.method, self.config, self.shares_passes = spec.method, spec.config.evaluation, spec.shares_passes
        self.together = most_together(spec.config, model.execution.pool.home_clients)

    def scores(self, personal: Personal, per_client: bool, plain: bool) -> list[Score]:
        """Rows for every tier: split `global`, and with `per_client` also `client` (one per client) and `clients` (pooled).

        `plain` evaluates the foundation itself: no rescaler. Where clients keep models of their own, every client's model is
        scored, at its own tier: `global` pools those of a tier on the global hold-out, `clients` each on its own.
        """
        rows = []
        owners = [client for client in self.clients if len(self.data.holdout(client.index))] if per_client else []
        owning = {client.index for client in owners}
        for members in self.tiers.values():
            how = self.method.assign(members[0], RoundContext(0, personal.dense(members[0].index)))
            how = how if not plain else replace(how, rows_R=None, rescale=None)
            if not self.method.personal_models:
                rows += self._tier_rows(members, how, personal, owners, plain)
                continue
            # A client's own model exists at its own tier only; the foundation is scored there for the same clients.
            own = [client for client in members if client.index in owning]
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
        rows = [pooled(members[0], "global", self._run(*self._global_parts(), how))]
        if owners:
            sums_3N = self._run(*self._client_parts(owners), how)
            rows.append(pooled(members[0], "clients", sums_3N))
            rows += [pooled(members[0], "client", sums_3N[:, i : i + 1], c.name) for i, c in enumerate(owners)]
        return rows

    def _personal_rows(self, members: list[Client], how: Assignment, personal: Personal, owners: list[Client]) -> list[Score]:
        """One model per client; each is scored on the global hold-out, and on its own client's."""
        shared, own = [], {}
        parts, cut = self._global_parts()
        scored = {client.index for client in owners}
        for client in members:
            for name in (name for name in personal.specs if name in self.bank):
                self.bank.client(name, 0).copy_(personal.values[name][client.index])
            last = [self._client_part(client)] if client.index in scored else []
            # Its own hold-out in the turn after the last one of the global: ranks without a batch of that one have time for it.
            sums_3N = self._run([*parts, *last], [*cut, *([len(parts)] for _ in last)], how)
            shared.append(sums_3N[:, : len(parts)])
            if last:
                own[client.name] = sums_3N[:, len(parts) :]
        rows = [pooled(members[0], "global", torch.cat(shared, 1))]
        if own:
            rows.append(pooled(members[0], "clients", torch.cat(list(own.values()), 1)))
            rows += [pooled(members[0], "client", sums_3N, name) for name, sums_3N in own.items()]
        return rows

    def _global_parts(self) -> tuple[list[ReadPart], list[list[int]]]:
        """Batches of the global hold-out, a pass each."""
        held = self.data.global_holdout()
        count = len(held) if self.config.max_sequences is None else min(len(held), self.config.max_sequences)
        # The default binds `start` now; without it all batches would read the last slice.
        size = self.config.batch_size
        parts: list[ReadPart] = [
            lambda s=start: held.select(range(s, min(s + size, count)))  # type: ignore[misc]
            for start in range(0, count, size)
        ]
        return parts, [[place] for place in range(len(parts))]

    def _client_part(self, client: Client) -> ReadPart:
        most = self.config.client_sequences
        return lambda: (held := self.data.holdout(client.index)).select(range(min(most, len(held))))

    def _client_parts(self, owners: list[Client]) -> tuple[list[ReadPart], list[list[int]]]:
        """What is scored of each client, several of them in a pass where that changes no bit."""
        parts = [self._client_part(client) for client in owners]
        if not self.shares_passes:
            return parts, [[place] for place in range(len(parts))]
        own = [part() for part in parts]  # views of a memory map
        longest = [max(map(len, sequences.input_ids), default=0) for sequences in own]
        return parts, passes([len(sequences) for sequences in own], longest, self.together)

    @torch.no_grad()
    def _run(self, parts: list[ReadPart], cut: list[list[int]], how: Assignment) -> Tensor:
        """[3, N parts]: (nll, correct, targets) under one assignment, the same on every rank; `cut` says which share a pass."""
        sums_3N = torch.zeros(3, len(parts), dtype=torch.float64)
        world, rank = self.runtime.world_size, self.runtime.rank
        trained_bank, trained_pool = self.execution.bank, self.execution.pool
        self.execution.bank = self._received(how)
        # One slot and one client on every rank: each rank scores batches of its own, with the same adapters.
        self.execution.pool = replace(trained_pool, home_clients=1, merge=False, shared=True)
        try:
            # Every rank runs every turn, with or without a batch: the layers' all-to-alls need all of the cluster.
            for turn in range(math.ceil(len(cut) / world)):
                place = turn * world + rank
                self._pass(parts, cut[place] if place < len(cut) else [], how, sums_3N)
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

    def _pass(self, parts: list[ReadPart], chosen: list[int], how: Assignment, sums_3N: Tensor) -> None:
        read = [parts[place]() for place in chosen]
        images = self.model.foundation.images
        # Rows of their own for every part: in bitwise mode each is attended to at its own length, whoever is beside it.
        rows = [Rows.of(0, how.cap, sequences, range(len(sequences)), images=images) for sequences in read]
        # Without a part this makes the stand-in row that takes part in the all-to-alls.
        batch = self.model.batch(rows)
        result = self.model.forward(batch, 0, None if how.rescale is None else [how.rescale])
        if not rows:
            return
        right_N = result.logits_NV.argmax(-1) == batch.labels_N
        by_part = zip(torch.split(result.nll_N, batch.targets), torch.split(right_N, batch.targets), strict=True)
        for place, (nll, right) in zip(chosen, by_part, strict=True):
            sums_3N[:, place] = torch.tensor([float(nll.double().sum()), int(right.sum()), len(right)], dtype=torch.float64)
