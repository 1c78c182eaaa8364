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

from fedmoe_ds.adapters.bank import Bank
from fedmoe_ds.clients.batch import Rows, make_batch
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.model import forward_pass
from fedmoe_ds.collectives import all_reduce_sum
from fedmoe_ds.config import EvaluationConfig
from fedmoe_ds.data import FederatedData, Sequences
from fedmoe_ds.experts.execution import Execution
from fedmoe_ds.experts.layer import RESCALER
from fedmoe_ds.foundation import Foundation
from fedmoe_ds.methods import Method
from fedmoe_ds.runtime import Runtime

ReadBatch = Callable[[], Sequences]


@dataclass(frozen=True)
class Score:
    """One evaluation row. Loss is the mean negative log-likelihood per target token, in nats."""

    tier: int
    split: str
    loss: float
    accuracy: float
    tokens: int
    client: str | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def pooled(tier: int, split: str, sums_3N: Tensor, client: str | None = None) -> Score:
    """Pool per-batch (nll, correct, tokens) into one row."""
    nll, correct, tokens = (float(value) for value in sums_3N.sum(1))
    return Score(tier, split, nll / max(tokens, 1.0), correct / max(tokens, 1.0), int(tokens), client)


class Evaluator:
    """Scores the global adapters at each tier.

    Args:
        bank: the global adapters (one client slot, no gradients); in the model only while an evaluation runs.
        clients: all clients; a tier's personal state is the mean over its clients.
        tiers: the caps to evaluate.
    """

    def __init__(
        self,
        foundation: Foundation,
        execution: Execution,
        runtime: Runtime,
        bank: Bank,
        data: FederatedData,
        clients: list[Client],
        tiers: list[int],
        method: Method,
        config: EvaluationConfig,
    ) -> None:
        self.foundation, self.execution, self.runtime, self.bank = foundation, execution, runtime, bank
        self.data, self.clients, self.tiers, self.method, self.config = data, clients, tiers, method, config

    def scores(self, personal: dict[str, Tensor], per_client: bool, plain: bool) -> list[Score]:
        """Rows for every tier: split `global`, and with `per_client` also `client` (one per client) and `clients` (pooled).

        `plain` evaluates the foundation itself: no rescaler.
        """
        rows = []
        shared = self._global_batches()
        owners = [client for client in self.clients if len(self.data.holdout(client.index))] if per_client else []
        for tier in self.tiers:
            fixed = self._prepare_tier(tier, personal, plain)
            rows.append(pooled(tier, "global", self._run(shared, tier, fixed)))
            if owners:
                sums_3N = self._run([self._client_batch(client) for client in owners], tier, fixed)
                rows.append(pooled(tier, "clients", sums_3N))
                rows += [pooled(tier, "client", sums_3N[:, i : i + 1], c.name) for i, c in enumerate(owners)]
        return rows

    def _global_batches(self) -> list[ReadBatch]:
        held = self.data.global_holdout()
        count = len(held) if self.config.max_sequences is None else min(len(held), self.config.max_sequences)
        size = self.config.batch_size
        return [lambda s=start: held.select(range(s, min(s + size, count))) for start in range(0, count, size)]  # type: ignore[misc]

    def _client_batch(self, client: Client) -> ReadBatch:
        most = self.config.client_sequences
        return lambda: (held := self.data.holdout(client.index)).select(range(min(most, len(held))))

    def _prepare_tier(self, tier: int, personal: dict[str, Tensor], plain: bool) -> float | None:
        members = [client.index for client in self.clients if client.top_k == tier]
        for name, values in personal.items():
            place = self.bank.client(name, 0)
            place.fill_(1.0) if plain and name == RESCALER else place.copy_(
                values[members].double().mean(0) if members else values.double().mean(0)
            )
        return None if plain else self.method.fixed_rescale(tier, self.foundation.top_k)

    @torch.no_grad()
    def _run(self, batches: list[ReadBatch], cap: int, rescale: float | None) -> Tensor:
        """[3, N batches]: (nll, correct, tokens) at top-k `cap`, identical on every rank."""
        sums_3N = torch.zeros(3, len(batches), dtype=torch.float64)
        world, rank = self.runtime.world_size, self.runtime.rank
        trained_bank, trained_pool = self.execution.bank, self.execution.pool
        self.execution.bank = self.bank
        self.execution.pool = replace(trained_pool, home_clients=1, merge=False, shared=True)
        try:
            for turn in range(math.ceil(len(batches) / world)):
                place = turn * world + rank
                self._pass(batches[place] if place < len(batches) else None, place, cap, rescale, sums_3N)
        finally:
            self.execution.bank, self.execution.pool = trained_bank, trained_pool
        return all_reduce_sum(sums_3N, self.runtime.control, world)  # disjoint entries: adding zeros is exact

    def _pass(self, read: ReadBatch | None, place: int, cap: int, rescale: float | None, sums_3N: Tensor) -> None:
        rows = []
        if read is not None:
            sequences = read()
            rows.append(Rows(0, cap, sequences.input_ids, sequences.loss_mask))
        batch = make_batch(rows, self.execution.pool.num_experts, self.runtime.device)
        result = forward_pass(self.foundation, self.execution, batch, 0, None if rescale is None else [rescale])
        if read is not None:
            sums_3N[0, place] = float(result.nll_N.double().sum())
            correct_N = result.logits_NV.argmax(-1) == batch.labels_N
            sums_3N[1, place], sums_3N[2, place] = int(correct_N.sum()), len(correct_N)
