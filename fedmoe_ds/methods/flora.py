"""FLoRA: stacking (Wang et al., arXiv 2409.05976).

Legend: O and I output and input width, Q stacked rows of all participants.

    A = [p_1 A_1; p_2 A_2; ...],   B = [B_1, B_2, ...],   B A = sum_k p_k B_k A_k exactly, for any ranks

The product moves into the frozen weight, W <- W + (alpha / R) B A, and every round starts from a fresh A and B = 0. The clients
of the paper merge what the server broadcasts; here the server's merged weight is the model that all of them train on, which is
the same numbers without the broadcast. The paper's traffic grows with the sum of the ranks.

The weights p_k are the paper's, data sizes of all participants: a client that routed no row to an expert adds B_k A_k = 0
with its weight, which is FedAvg's answer for an update of zero.

Our completion: an expert that nobody used in a round has B = 0 on all clients, so nothing moves into its weight; its A is drawn
anew like all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_ds.methods import Combined, FactorPair, Method, MethodInfo


class FLoRA(Method):
    """Stack, merge, start afresh."""

    info = MethodInfo(
        title="FLoRA",
        paper="arXiv 2409.05976",
        adapts="LoRA rank r",
        trains="fresh A and B in every round",
        sends="A, B (server: stacks of all)",
        weighs="data size, on the product BA",
        completion="fresh A from an addressed draw; unused experts' weights do not change",
    )
    spends = "rank"
    needs = frozenset({"lora"})
    unequal_ranks = True
    collects = True
    absorbs = True

    def combine(self, pair: FactorPair, fresh_a_RI: Tensor) -> Combined:
        # B = 0, so the fresh pair adds nothing: the merged weight alone is the model that clients start from.
        return Combined(fresh_a_RI, torch.zeros_like(pair.b_OR), absorbed=pair.stacked())
