"""Combined: the adapter that a server makes of the factors of all participants."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Combined:
    """A new global adapter: A [R, I], B [O, R], and a product (B [O, Q], A [Q, I]) that moves into the frozen weight."""

    a_RI: Tensor
    b_OR: Tensor
    absorbed: tuple[Tensor, Tensor] | None = None
