"""Client mean: the mean of one tensor over clients, with the same bits whoever holds which of them."""

from __future__ import annotations

from torch import Tensor


class ClientMean:
    """Adds up in float64, in the order in which it is told; first of all those that are alike.

    Every rank is told every client. A sum of sums would send less and depend on who is at home where: float64 rounds, and the
    digest of a run counts the bits.

    Args:
        common: what clients have that were never trained.
        count: how many of these there are.
    """

    def __init__(self, common: Tensor, count: int) -> None:
        # Exact below 2^29 clients, so that the mean of many equal float32 values is that value.
        self.total, self.count = common.double() * count, count

    def add(self, value: Tensor) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> Tensor:
        return self.total / self.count
