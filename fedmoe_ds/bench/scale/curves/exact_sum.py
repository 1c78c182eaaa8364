"""Adding clients to an order-free sum, each with the largest digits that there are: time, and the room that is left."""

from __future__ import annotations

import math
import time

import torch

from fedmoe_ds.aggregation.exact_sum import DIGIT_BITS, MOST_TERMS, ORIGIN, ExactSum

NAME = "exact_sum"
X = "clients of a round"
POINTS = (1_024, 4_096, 16_384, MOST_TERMS)
WALL = f"{MOST_TERMS} clients in a round: digits have no room for more, and a bitwise run with more is refused before it starts"
_NUMBERS = 16_384


def measure(x: int) -> dict[str, float]:
    # Just below the bound of window 0: such a term rounds to the largest digit.
    value = torch.full((1, _NUMBERS), 2.0 ** (DIGIT_BITS + ORIGIN - 1) * (1 - 2.0**-24))
    weight, sums = torch.full((1,), 1 - 2.0**-53, dtype=torch.float64), ExactSum((1, _NUMBERS), 1)
    began = time.perf_counter()
    for _ in range(x):
        sums.add_product(value, weight)
    seconds = time.perf_counter() - began
    largest = int(sums.limbs.abs().max())
    assert int(sums.windows) == 0, "the terms are not those of the window that is measured"
    return {"seconds": seconds, "ns_per_number": seconds / x / _NUMBERS * 1e9, "bits_left": 63 - math.log2(largest)}
