"""FlexLoRA: average the products, re-factor by SVD (Bai et al., NeurIPS 2024, arXiv 2402.11505).

Legend: O and I output and input width, R adapter rank, Q stacked rows of all participants.

    W = sum_k p_k s_k B_k A_k,    U S V^T = SVD(W),    client k:  B_k <- U[:, :r_k] S[:r_k] / s_k,  A_k <- V^T[:r_k, :]

W is never formed: with the stacked factors B [O, Q] and A [Q, I], QR gives B = Q_B R_B and A^T = Q_A R_A^T, and the SVD of the
small R_B R_A^T, rotated by Q_B and Q_A, is that of W. The server keeps the R leading directions; the leading r_k of these are
exactly what client k receives. With one client of full rank the product is unchanged.

The paper knows no experts: every client trains every adapter. Our completions: s_k = alpha / R for every rank, so it cancels;
p_k is the data share among the participants of the round that routed rows to the expert (a truncated copy that was not
trained would only shrink the product; an expert that nobody used keeps its value), and among all of them for other adapters;
of each singular pair, the sign that makes the largest entry of u positive; where W has fewer than R directions, A keeps its
rows and B is zero there, so an expert that nobody has trained yet stays as it is.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.methods import BlockSpec, ClientUpdate, Combined, FactorPair, Method, MethodInfo, present

NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest are rounding noise of float32 adapters; their directions mean nothing."""


class FlexLoRA(Method):
    """Exact product, truncated SVD."""

    info = MethodInfo(
        title="FlexLoRA",
        paper="arXiv 2402.11505",
        adapts="LoRA rank r",
        trains="r leading singular directions",
        sends="A, B",
        weighs="data size, on the product BA",
        completion="SVD through QR of the stacked factors; no weight where a client has no rows; scale alpha / R; signs",
    )
    spends = "rank"
    needs = frozenset({"lora"})
    unequal_ranks = True
    collects = True

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        if spec.pair is None:
            return super().weights(spec, update, data_share)
        return np.where(present(spec, update), data_share, 0.0)

    def combine(self, pair: FactorPair, fresh_a_RI: Tensor) -> Combined:
        u_OK, s_K, vh_KI = pair.svd()
        # Strictly greater: a product of zero has no direction at all, and the pair keeps its A with B = 0.
        rank = min(pair.a_RI.shape[0], int((s_K > NEGLIGIBLE * s_K[0]).sum()))
        a_RI, b_OR = pair.a_RI.clone(), torch.zeros_like(pair.b_OR)
        a_RI[:rank] = vh_KI[:rank]
        # The singular values go to B alone, as in the paper; A's rows are orthonormal.
        b_OR[:, :rank] = u_OK[:, :rank] * s_K[:rank]
        return Combined(a_RI, b_OR)
