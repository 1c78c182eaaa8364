"""FLoRIST: stacking, then singular value thresholding (Ramesh, Dass, MLSys 2026, arXiv 2506.09199).

Legend: O and I output and input width, R adapter rank, K singular values of the product, p of which are kept.

    U S V^T = SVD(sum_k p_k B_k A_k),    p = the least with  sum_{i <= p} S_i^2  >=  tau sum_i S_i^2
    B_g = U[:, :p] S[:p],   A_g = V^T[:p, :],    W <- W + (alpha / R) B_g A_g,    every round starts from a fresh A and B = 0

READ (the paper's text, section 3 and algorithm 1): clients of any ranks send their factors; B side by side and p_k A_k one
below the other multiply to the weighted sum exactly. The server decomposes it without ever forming it, cuts by the energy of
squares, and sends one pair to all clients, whatever their ranks; they merge it into the frozen weight and draw new adapters.
Every layer has its own p; at tau = 1 the model is FLoRA's. What goes down is p (O + I) numbers per adapter, and the paper
compares methods by the sum of p. READ (the authors' repository): tau = 0.9 does well everywhere, 0.8 to 0.99 are sensible.
COMPLETION: the paper decomposes both stacks before the small matrix between them; we take their QR, which gives the same U, S
and V. The server's merged weight is the model that all train on, which is the same numbers without the broadcast. Fresh A is an
addressed draw. A client that routed no row to an expert adds zero with its weight, as in FLoRA; of an expert that nobody used
p = 0, nothing is sent, and its weight does not change. Energies are float64, whose sums of squares do not see directions below
1e-8 of the largest: at tau = 1 they are cut.
LIMITS: a client that was not drawn for some rounds is counted as if the last product were all that it lacks, as the paper does.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import Combined, FactorPair, Method, MethodInfo, MethodParams


class FLoRISTParams(MethodParams):
    """How much of a round's product goes on."""

    tau: float = Field(0.9, gt=0, le=1, description="least share of the squared singular values that is kept")


class FLoRIST(Method):
    """FLoRA whose product loses its weakest directions."""

    Params: ClassVar[type[MethodParams]] = FLoRISTParams
    info = MethodInfo(
        title="FLoRIST",
        paper="arXiv 2506.09199",
        adapts="LoRA rank r",
        trains="fresh A and B in every round",
        sends="A, B (server: p leading directions of BA)",
        weighs="data size, on the product BA",
        completion="QR of the stacks in place of their SVDs; fresh A from an addressed draw",
    )
    spends = "rank"
    needs = frozenset({"lora"})
    unequal_ranks = True
    collects = True
    absorbs = True
    chooses_rank = True

    def combine(self, pair: FactorPair, fresh_a_RI: Tensor) -> Combined:
        u_OK, s_K, vh_KI = pair.svd()
        rank = _kept(s_K, self.params.tau)
        # B = 0, so the fresh pair adds nothing: the merged weight alone is the model that clients start from.
        return Combined(fresh_a_RI, torch.zeros_like(pair.b_OR), absorbed=(u_OK[:, :rank] * s_K[:rank], vh_KI[:rank]))


def _kept(s_K: Tensor, tau: float) -> int:
    """p: how many of the descending singular values it takes for a share of the energy of all."""
    energy_K = (s_K**2).cumsum(0)
    # Of a product of zero nothing is less than its share of nothing: the first value must not be counted as kept.
    return int((energy_K < tau * energy_K[-1]).sum()) + int(energy_K[-1] > 0)
