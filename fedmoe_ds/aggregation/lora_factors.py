"""LoRA factors: those of every participant by itself, for server steps that need more than their mean.

Legend: P participants of the round in canonical order, L layers, E experts of this rank, R adapter rank, I and O widths, Q = PR
stacked rows, K singular values.

Stacking and re-factoring methods need sum_k p_k B_k A_k, which no mean of A and B gives. A rank keeps the factors of clients
that its cluster trained, at their place among all participants, and zeros elsewhere; adding zeros is exact, so the factors
merge over clusters, waves and an interrupted round like any other sum. Memory grows with the participants of a round, not with
a dense weight: P (I + O) R numbers per adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.aggregation.flat_buffer import Flat
from fedmoe_ds.distributed.collectives import Summing
from fedmoe_ds.model.adapter_bank import BlockSpec, lora_pairs


@dataclass(frozen=True)
class FactorPair:
    """One adapter (of one layer, and expert if there are experts) as all participants returned it; float64.

    Attributes:
        key: canonical name without the lora_A / lora_B ending.
        a_PRI, b_POR: the factors; rows that a participant did not hold are zero.
        weight_P: aggregation weights, not normalised; at least one is positive.
        a_RI, b_OR: the global factors of the last round.
        round_index: the round that these factors are of, from 1.
    """

    key: str
    a_PRI: Tensor
    b_POR: Tensor
    weight_P: Tensor
    a_RI: Tensor
    b_OR: Tensor
    round_index: int = 1

    @property
    def share_P(self) -> Tensor:
        """Weights that sum to one."""
        return self.weight_P / self.weight_P.sum()

    def stacked(self) -> tuple[Tensor, Tensor]:
        """(B [O, PR], A [PR, I]) with the shares on A: their product is sum_k p_k B_k A_k, and is never formed."""
        # On A alone: on both factors the shares would enter the product squared.
        a_QI = (self.a_PRI * self.share_P.view(-1, 1, 1)).flatten(0, 1)
        return self.b_POR.transpose(0, 1).flatten(1), a_QI

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """The singular value decomposition of sum_k p_k B_k A_k: U [O, K], S [K], V^T [K, I], K = min(O, I, Q)."""
        b_OQ, a_QI = self.stacked()
        # The matrix that is decomposed is Q x Q at most, mostly far smaller than O x I.
        q_b, r_b = torch.linalg.qr(b_OQ)
        q_a, r_a = torch.linalg.qr(a_QI.T)
        u, s_K, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        u_OK, vh_KI = q_b @ u, vh @ q_a.T
        # A singular pair is unique up to its sign; which one comes out depends on the library, so one is chosen.
        sign_K = u_OK.gather(0, u_OK.abs().argmax(0, keepdim=True)).sign().squeeze(0)
        # A column of zeros has no sign; it must not wipe out its row of V^T.
        sign_K = torch.where(sign_K == 0, 1.0, sign_K)
        return u_OK * sign_K, s_K, vh_KI * sign_K.unsqueeze(1)


class Collection:
    """Factors and weights of one round on one rank, each kind in one piece of memory, which the collectives take as it is.

    Args:
        specs: blocks; only LoRA pairs are collected.
        experts: number of experts of this rank.
        participants: clients of the round.
    """

    def __init__(self, specs: list[BlockSpec], experts: int, participants: int, device: torch.device | None = None) -> None:
        self.pairs = lora_pairs(specs)
        halves = [half for pair in self.pairs for half in pair]
        heads = {
            spec.name: (participants, len(spec.layers), experts) if spec.expert else (participants, len(spec.layers))
            for spec in halves
        }
        full = [(spec, ((*heads[spec.name], *spec.item),)) for spec in halves]
        self._flat_factors = Flat.zeros(full, torch.float32, device)
        # Weights are float64, as methods give them; factors are float32, as clients hold them.
        self._flat_weights = Flat.zeros([(spec, (heads[spec.name],)) for spec in halves], torch.float64, device)
        self.factors = {name: part for name, (part,) in self._flat_factors.parts.items()}
        self.weights = {name: part for name, (part,) in self._flat_weights.parts.items()}

    def add(self, place: int, name: str, value: Tensor, weight: np.ndarray) -> None:
        """Keep one participant's block (this rank's part) and its weight."""
        # Adding zero turns -0.0 into 0.0, which is what the sum over ranks makes of it.
        self.factors[name][place] = value + 0.0
        self.weights[name][place] = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float64))

    def reduce(self, cluster: Summing, shard: Summing) -> None:
        """Bring all participants' factors to every rank that holds the adapter, in place."""
        self._flat_factors.reduce(cluster, shard)
        self._flat_weights.reduce(cluster, shard)

    def adapters(
        self, current: dict[str, Tensor], first_expert: int, round_index: int = 1
    ) -> Iterator[tuple[BlockSpec, BlockSpec, tuple[int, ...], FactorPair]]:
        """Every adapter that somebody trained: (A block, B block, place in the block, its factors).

        Args:
            current: the global value of each block, [L, E, *item] or [L, *item].
            round_index: the round that ends.
        """
        for a, b in self.pairs:
            for place in np.ndindex(*self.weights[a.name].shape[1:]):
                weight_P = self.weights[a.name][(slice(None), *place)]
                # Nobody took part: the global pair stays, and a share would be 0 / 0.
                if not bool((weight_P > 0).any()):
                    continue
                expert = first_expert + place[1] if a.expert else None
                key = a.key(a.layers[place[0]], expert).removesuffix(".lora_A")
                # Float64: server steps multiply the factors and decompose the products.
                a_PRI, b_POR = (self.factors[half.name][(slice(None), *place)].double() for half in (a, b))
                old_a_RI, old_b_OR = (current[half.name][place].double() for half in (a, b))
                yield a, b, place, FactorPair(key, a_PRI, b_POR, weight_P, old_a_RI, old_b_OR, round_index)

    def tensors(self) -> Iterator[tuple[BlockSpec, str, int, Tensor]]:
        """As `Statistics.tensors`."""
        for spec in (half for pair in self.pairs for half in pair):
            yield spec, "factors", 1, self.factors[spec.name]
            yield spec, "factor-weights", 1, self.weights[spec.name]
