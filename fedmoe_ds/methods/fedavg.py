"""FedIT / FedAvg on LoRA (arXiv 2305.05644): A <- sum_k p_k A_k, B <- sum_k p_k B_k with p_k = |D_k| / sum |D|.

Clients keep their top-k caps; nothing else is adapted to them. The baseline that FLAME with t = 0 and no rescaler equals.
"""

from __future__ import annotations

from fedmoe_ds.methods.base import Method


class FedAvg(Method):
    """Data-size weights for everything: the behaviour of the base class."""
