"""FedRot-LoRA: factors are rotated before they are averaged (Zhang, Kim, Cha, Vikalo, ICML 2026, arXiv 2602.23638).

Legend: P participants, R adapter rank, I and O input and output width; A', B' the global factors that clients received.

    M_k = A_k A'^T  or  B_k^T B',    R_k = argmax <R, M_k>,    R_k <- argmax <R, (1 - lambda) I + lambda R_k>    (R: rotations)
    A <- sum_k p_k R_k^T A_k,        B <- sum_k p_k B_k R_k

READ (abstract, public readings): (B R)(R^T A) = B A for every orthogonal R, so equal updates may come as unlike factors, and
unlike factors cancel in a mean. Turned towards one reference they do not; nothing more is sent, and nothing is frozen. A and B
take turns as what is aligned. lambda from 0.2 to 0.8 beats whole rotations, 0.4 to 0.6 is mostly best; 0 is FedIT.
CODE (the authors' repository): M = U S V^T, R = U V^T, with V^T's last row negated where the determinant is negative; no
rotation in the first round, A is aligned in the second, B in the third, and so on; one of them alone is an ablation.
COMPLETION: lambda is 0.5 by default. M need not determine R (B' = 0 before an expert is used, an expert of few rows): of all
best rotations it is then the one nearest to the identity, by decomposing M + 1e-7 ||M|| I, and I where M = 0. So a client that
routed no row to an expert, whose M is symmetric and not negative, is not rotated. p_k is the data share of all participants;
the budget buys k. The paper's clients rotate what they send; here the server rotates what it received: the same numbers.
LIMITS: the server keeps everybody's factors, as for LoRA-FAIR; all clients have one rank.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import Combined, Config, FactorPair, Method, MethodInfo, MethodParams

TIE = 1e-7
"""Share of ||M|| that speaks for the identity: what decides where M does not, and too little to be seen where it does."""


class FedRotLoRAParams(MethodParams):
    """What is rotated towards what, and how far."""

    align: Literal["alternating", "A", "B"] = Field("alternating", description="whose distance the rotations lessen")
    strength: float = Field(0.5, ge=0, le=1, description="lambda: 0 is FedIT, 1 the whole rotation")

    def idle(self, config: Config) -> dict[str, str]:
        return {} if self.strength else {"align": "with method.strength=0"}


class FedRotLoRA(Method):
    """FedIT of aligned factors."""

    Params: ClassVar[type[MethodParams]] = FedRotLoRAParams
    info = MethodInfo(
        title="FedRot-LoRA",
        paper="arXiv 2602.23638",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A, B",
        weighs="data size, after rotations of A and B",
        completion="lambda = 0.5; of equally good rotations the one nearest to the identity; the budget buys k",
    )
    needs = frozenset({"lora"})
    collects = True

    def combine(self, pair: FactorPair, fresh_a_RI: Tensor) -> Combined:
        a_PRI, b_POR = pair.a_PRI, pair.b_POR
        # The factors of the first round were trained from one start by everybody, and the code leaves them as they are.
        if pair.round_index > 1 and self.params.strength > 0:
            rotation_PRR = _softened(_rotation(self._likeness(pair)), self.params.strength)
            a_PRI, b_POR = rotation_PRR.mT @ a_PRI, b_POR @ rotation_PRR
        share = pair.share_P.view(-1, 1, 1)
        return Combined((a_PRI * share).sum(0), (b_POR * share).sum(0))

    def _likeness(self, pair: FactorPair) -> Tensor:
        """M of every participant, [P, R, R]."""
        turn = "A" if pair.round_index % 2 == 0 else "B"
        if (turn if self.params.align == "alternating" else self.params.align) == "A":
            return pair.a_PRI @ pair.a_RI.T
        return pair.b_POR.mT @ pair.b_OR


def _rotation(likeness_PRR: Tensor) -> Tensor:
    """The rotations R with the largest <R, M>, [P, R, R]; of several, those nearest to the identity."""
    size_P11 = torch.linalg.matrix_norm(likeness_PRR, keepdim=True)
    # Where M is zero any number does: it is the only thing that is decomposed.
    size_P11 = torch.where(size_P11 == 0, 1.0, size_P11)
    return _nearest(likeness_PRR + TIE * size_P11 * _identity(likeness_PRR))


def _softened(rotation_PRR: Tensor, strength: float) -> Tensor:
    """Part of the way from the identity to the rotations."""
    # A whole rotation is taken as it is: a second decomposition would add its rounding.
    if strength == 1:
        return rotation_PRR
    return _nearest((1 - strength) * _identity(rotation_PRR) + strength * rotation_PRR)


def _nearest(matrix_PRR: Tensor) -> Tensor:
    """The rotations (orthogonal, determinant 1) nearest to matrices."""
    u_PRR, _, vh_PRR = torch.linalg.svd(matrix_PRR)
    # A reflection would turn a direction against the reference; the one that counts least is turned back.
    turned_P = torch.linalg.det(u_PRR @ vh_PRR) < 0
    last_PR = torch.where(turned_P.unsqueeze(-1), -vh_PRR[..., -1, :], vh_PRR[..., -1, :])
    return torch.matmul(u_PRR, torch.cat([vh_PRR[..., :-1, :], last_PR.unsqueeze(-2)], -2))


def _identity(like_PRR: Tensor) -> Tensor:
    # Made where it is needed: a copy from the host would be waited for, once per adapter.
    return torch.eye(like_PRR.shape[-1], dtype=like_PRR.dtype, device=like_PRR.device)
