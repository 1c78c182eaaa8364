"""LoRA-FAIR: correct the averaged B on the server (Bian et al., ICCV 2025, arXiv 2411.14961).

Legend: O and I output and input width, R adapter rank, Q stacked rows of all participants.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   W = sum_k p_k B_k A_k
    dB = argmin  (1 - cos(W, (B + dB) A)) + lambda ||dB||_F,      clients start from (A, B + dB)

All participants count in every adapter, as the paper says; one that routed no row to an expert sends back what it received.

The paper writes the similarity S inside the minimum; we read it as one minus the cosine. Gradient descent from dB = 0 with the
server's own rate and number of steps; the best dB on the way is kept, because the norm has a kink at 0 and steps of its pull
do not get shorter. Inner products with W are taken through the factors, W is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import Combined, Config, FactorPair, Method, MethodInfo, MethodParams


class LoRAFairParams(MethodParams):
    """LoRA-FAIR's server problem."""

    regularisation: float = Field(0.01, ge=0, description="lambda")
    server_steps: int = Field(50, ge=0, description="gradient steps on dB")
    server_lr: float = Field(0.05, gt=0, description="their rate, as a share of ||B||_F")

    def idle(self, config: Config) -> dict[str, str]:
        return {} if self.server_steps else dict.fromkeys(("regularisation", "server_lr"), "with method.server_steps=0")


class LoRAFair(Method):
    """FedIT with a residual on B."""

    Params: ClassVar[type[MethodParams]] = LoRAFairParams
    info = MethodInfo(
        title="LoRA-FAIR",
        paper="arXiv 2411.14961",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A, B",
        weighs="data size, then a residual on B",
        completion="S = 1 - cosine; steps relative to the norm of B; the budget buys k",
    )
    needs = frozenset({"lora"})
    collects = True

    def combine(self, pair: FactorPair, fresh_a_RI: Tensor) -> Combined:
        share = pair.share_P.view(-1, 1, 1)
        a_RI, b_OR = (pair.a_PRI * share).sum(0), (pair.b_POR * share).sum(0)
        problem = Problem.of(b_OR, a_RI, *pair.stacked(), self.params.regularisation)
        length = b_OR.norm()
        best = residual = torch.zeros_like(b_OR)
        least, slope = problem.at(residual)
        for _ in range(self.params.server_steps):
            # The cosine's slope shrinks as 1 / ||B||: times ||B||^2, a step is a share of ||B|| whatever the adapter's size.
            residual = residual - self.params.server_lr * length**2 * slope
            value, slope = problem.at(residual)
            # Strictly: where nothing improves, dB stays zero and the result is FedIT's.
            better = value < least
            best, least = torch.where(better, residual, best), torch.where(better, value, least)
        # W = 0 or not, a cosine with B = 0 is undefined, and there is no length to measure a step by.
        return Combined(a_RI, torch.where(length == 0, b_OR, b_OR + best))


@dataclass(frozen=True)
class Problem:
    """The server's problem for one adapter. What does not depend on dB is computed once.

    Attributes:
        target_OR: W A^T.
        gram_a_RR: A A^T.
        w_norm: ||W||_F.
        strength: lambda.
    """

    b_OR: Tensor
    target_OR: Tensor
    gram_a_RR: Tensor
    w_norm: Tensor
    strength: float

    @classmethod
    def of(cls, b_OR: Tensor, a_RI: Tensor, b_OQ: Tensor, a_QI: Tensor, strength: float) -> Problem:
        # <B A, B' A'> = <B^T B', A A'^T>: sums over R x R or Q x Q, never over O x I.
        w_norm = torch.sqrt(((b_OQ.T @ b_OQ) * (a_QI @ a_QI.T)).sum())
        return cls(b_OR, b_OQ @ (a_QI @ a_RI.T), a_RI @ a_RI.T, w_norm, strength)

    def at(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The objective and its gradient in dB [O, R]; the norm's is taken as zero at dB = 0.

        Cases are chosen on the device: there are fifty steps for each adapter, and none of them waits for it.
        """
        total = self.b_OR + residual
        m_norm = torch.sqrt(((total.T @ total) * self.gram_a_RR).sum())
        scale = self.w_norm * m_norm
        cosine = (self.target_OR * total).sum() / scale
        toward = self.target_OR / scale - cosine * (total @ self.gram_a_RR) / m_norm**2
        size = residual.norm()
        pull = torch.where(size > 0, residual / size, 0.0)
        # A zero matrix has no direction: the cosine is undefined, and dB stays where it is.
        undefined = (self.w_norm == 0) | (m_norm == 0)
        value = torch.where(undefined, 0.0, 1.0 - cosine + self.strength * size)
        return value, torch.where(undefined, 0.0, self.strength * pull - toward)
