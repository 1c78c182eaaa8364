"""FedIT: federated averaging of LoRA (Zhang et al., arXiv 2305.05644).

    A <- sum_k p_k A_k,   B <- sum_k p_k B_k,   p_k = |D_k| / sum |D|

All participants count in every adapter, as the paper says: one that routed no row to an expert sends back what it received, and
so stands for no change (FLAME with t > 0 leaves it out).

The mean of products is not the product of means; later methods mend that. All clients hold the same rank. Our completion: a
client's budget buys active experts, as in FLAME, so that FLAME with t = 0 and no rescaler is this method.
"""

from __future__ import annotations

from fedmoe_ds.methods import Method, MethodInfo


class FedIT(Method):
    """Data-size weights for everything: the behaviour of the base class."""

    info = MethodInfo(
        title="FedIT",
        paper="arXiv 2305.05644",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A, B",
        weighs="data size",
        completion="the budget buys k",
    )
