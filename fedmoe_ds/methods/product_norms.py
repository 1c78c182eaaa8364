"""Product norms: sizes of LoRA products, which are never formed.

Legend: G pairs of a batch, R adapter rank, I and O input and output width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_norms(a_GRI: Tensor, b_GOR: Tensor) -> Tensor:
    """||B A||_F of every pair of a batch, float64 [...], from the R x R Gram matrices: B A is never formed."""
    # ||B A||_F^2 = tr(A A^T B^T B), which for two symmetric matrices is the sum of their elementwise product. Gram matrices
    # square the numbers, hence float64; the clamp takes off what rounding leaves below zero.
    a, b = a_GRI.double(), b_GOR.double()
    gram_a, gram_b = a @ a.mT, b.mT @ b
    return torch.sqrt(torch.clamp((gram_a * gram_b).sum((-2, -1)), min=0.0))
