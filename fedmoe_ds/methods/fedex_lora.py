"""FedEx-LoRA: exact aggregation (Singhal, Ponkshe, Vepakomma, ACL 2025, arXiv 2410.09432).

Legend: O and I output and input width, R adapter rank, Q stacked rows of all participants and of the mean.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   W <- W + (alpha / R) (sum_k p_k B_k A_k - B A),   clients go on with A and B

READ (abstract, public readings): factors are averaged as FedIT does; what the product of the means lacks of the mean of the
products, a residual of high rank, moves into the frozen weight. The model is exactly the mean of the clients' models, and the
rank does not grow.
COMPLETION: p_k is the data share of all participants where the paper has 1 / k. The residual is taken against A and B as they
are kept, rounded to float32, so it has their rounding, too; it is never formed but as factors. The clients of the paper add the
residual that the server broadcasts; here the server's weight is the one that all of them train on. The budget buys k.
An expert that nobody used has equal factors on all clients and no residual: its weight keeps its bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_ds.methods import Combined, FactorPair, Method, MethodInfo


class FedExLoRA(Method):
    """FedIT whose error moves into the frozen weights."""

    info = MethodInfo(
        title="FedEx-LoRA",
        paper="arXiv 2410.09432",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A, B (server: residuals of the weights)",
        weighs="data size, and the residual of BA",
        completion="data sizes as weights; the budget buys k; the residual covers the rounding of A and B",
    )
    needs = frozenset({"lora"})
    collects = True
    absorbs = True

    def combine(self, pair: FactorPair, fresh_a_RI: Tensor) -> Combined:
        share = pair.share_P.view(-1, 1, 1)
        # As the server keeps them: what rounding takes from the factors is then in the residual.
        a_RI, b_OR = ((half * share).sum(0).float().double() for half in (pair.a_PRI, pair.b_POR))
        b_OQ, a_QI = pair.stacked()
        return Combined(a_RI, b_OR, absorbed=(torch.cat([b_OQ, -b_OR], 1), torch.cat([a_QI, a_RI])))
