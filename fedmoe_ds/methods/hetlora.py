"""HetLoRA: heterogeneous ranks, self-pruning, sparsity-weighted aggregation (Cho et al., EMNLP 2024, arXiv 2401.06432).

Legend: L layers, E experts, O and I output and input width, R adapter rank.

1. A client of rank r_k receives the first r_k rows of A and columns of B (truncation).
2. It adds  lambda ||B[:, floor(gamma r_k):]||_F ||A[floor(gamma r_k):, :]||_F  to its loss. When that product, summed over its
   adapters, is smaller after the round than before, it gives the tail up: r_k <- max(r_min, floor(gamma r_k)).
3. The server pads with zeros and averages with weights ||B_k A_k||_F / sum_j ||B_j A_j||_F.

The paper knows no experts: every client trains every adapter, and has weight in all of them. Our completions: one rank per
client for all of its adapters; the weights are computed for every adapter (layer, expert) by itself; a client that routed no
row to an expert has no weight there, because its truncated copy of the global adapter would only erase rows, and an expert
that nobody used keeps its value; everything that is no LoRA pair has data-size weights; the LoRA scale is alpha / R for every
rank, so that truncation only drops terms of a sum. `aggregation: data` and `pruning: false` give the naive variant (zero
padding with data-size weights). A tier is evaluated at the rank that its clients began with, whatever they have pruned since:
its figures are about one model over all rounds.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import (
    Assignment,
    BlockSpec,
    Client,
    ClientUpdate,
    ClientView,
    Config,
    Method,
    MethodInfo,
    MethodParams,
    RoundContext,
    leading,
    present,
    product_norms,
)

# One number for the whole model, personal, so that it is saved and travels with the client's other state.
RANK = BlockSpec("hetlora.rank", (-1,), (1,), personal=True, trained=False)


class HetLoRAParams(MethodParams):
    """HetLoRA's switches."""

    gamma: float = Field(0.99, gt=0, lt=1, description="share of the ranks that the penalty leaves alone")
    penalty: float = Field(0.01, ge=0, description="lambda of the tail penalty")
    pruning: bool = Field(True, description="whether clients lower their rank")
    min_rank: int = Field(1, ge=1, description="r_min")
    aggregation: Literal["sparsity", "data"] = Field("sparsity", description="weights ||BA||_F, or data size")

    def idle(self, config: Config) -> dict[str, str]:
        if self.pruning:
            return {}
        none = "with method.pruning=false: ranks stay"
        return {"min_rank": none} if self.penalty else {"min_rank": none, "gamma": f"{none}, and there is no penalty"}


class HetLoRA(Method):
    """Truncate, prune, pad."""

    Params: ClassVar[type[MethodParams]] = HetLoRAParams
    info = MethodInfo(
        title="HetLoRA",
        paper="arXiv 2401.06432",
        adapts="LoRA rank r",
        trains="first r rows of A, columns of B",
        sends="A, B, norms of BA",
        weighs="norm of BA",
        completion="norms per adapter, none where a client has no rows; one rank per client, scale alpha / R for every rank",
    )
    spends = "rank"
    needs = frozenset({"lora"})
    unequal_ranks = True

    def client_state(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        return [RANK]

    def initial(self, spec: BlockSpec, client: Client) -> float | None:
        return float(client.rank) if spec == RANK else super().initial(spec, client)

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        own = context.client_state.get(RANK.name) if context.round > 0 else None  # round 0: the tier, not the client
        # A float block holds it; ranks are far below 2^24, so the conversion is exact.
        rank = client.rank if own is None else int(own.item())
        return Assignment(client.cap, leading(rank, self.facts.rank))

    @torch.no_grad()
    def adjust(self, view: ClientView) -> None:
        """The gradient of the tail penalty; zero where a tail vanishes."""
        if not self.params.penalty:
            return
        for a, b in view.pairs():
            tail_a, tail_b, rows = *self._tail(view, view.value(a), view.value(b)), self._rows(view)
            norm_a, norm_b = _norm(tail_a), _norm(tail_b)
            both = (norm_a > 0) & (norm_b > 0)
            # d/dA of ||B|| ||A|| is ||B|| A / ||A||. At a norm of zero it has a kink, and zero is a subgradient there.
            pull_a = torch.where(both, norm_b / norm_a, 0.0).float() * self.params.penalty
            pull_b = torch.where(both, norm_a / norm_b, 0.0).float() * self.params.penalty
            view.grad(a)[..., rows, :].add_(tail_a * pull_a[..., None, None])
            view.grad(b)[..., :, rows].add_(tail_b * pull_b[..., None, None])

    @torch.no_grad()
    def measure(self, view: ClientView) -> dict[str, Tensor]:
        """Per adapter ||BA||_F, and the tail product before and after the round."""
        found = {}
        for a, b in view.pairs():
            found[f"{a.pair}.norm"] = product_norms(view.value(a), view.value(b))
            found[f"{a.pair}.before"] = self._tail_product(view, view.received(a), view.received(b))
            found[f"{a.pair}.after"] = self._tail_product(view, view.value(a), view.value(b))
        return found

    def remember(self, update: ClientUpdate) -> dict[str, Tensor]:
        """Self-pruning. A tail that was zero before cannot get smaller."""
        rank = update.assignment.rank(self.facts.rank)
        # Over all adapters and layers; measures are gathered, as expert adapters lie on other ranks too.
        before, after = (sum(v.sum() for k, v in update.measured.items() if k.endswith(end)) for end in (".before", ".after"))
        if self.params.pruning and after < before:
            # min: a client that began below min_rank stays at its rank and is not raised.
            rank = max(min(self.params.min_rank, rank), math.floor(self.params.gamma * rank))
        return {RANK.name: torch.tensor([[float(rank)]])}

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        if spec.pair is None:
            return super().weights(spec, update, data_share)
        if self.params.aggregation == "data":
            return np.where(present(spec, update), data_share, 0.0)
        return np.where(present(spec, update), update.measured[f"{spec.pair}.norm"], 0.0)

    def _rows(self, view: ClientView) -> slice:
        rank = view.assignment.rank(self.facts.rank)
        # The tail ends at the client's rank: rows behind it are zero and not its own.
        return slice(math.floor(self.params.gamma * rank), rank)

    def _tail(self, view: ClientView, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows(view)
        # Dense copies: the norm then adds up in the order of the tail itself, whatever slice of a bank it was.
        return a_RI[..., rows, :].contiguous(), b_OR[..., :, rows].contiguous()

    def _tail_product(self, view: ClientView, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        tail_a, tail_b = self._tail(view, a_RI, b_OR)
        return _norm(tail_a) * _norm(tail_b)


def _norm(matrices: Tensor) -> Tensor:
    """Frobenius norms of a batch of matrices, float64."""
    norms: Tensor = torch.linalg.vector_norm(matrices.flatten(-2), dim=-1, dtype=torch.float64)
    return norms
