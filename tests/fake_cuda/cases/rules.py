"""What CUDA's kernels refuse, and what they take."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def case_mixed_devices(fake: Any) -> None:
    x = torch.randn(4, 8, device="cuda")
    for bad in (
        lambda: x + torch.ones(4, 8),
        lambda: torch.cat([x, torch.ones(4, 8)]),
        lambda: F.embedding(torch.tensor([1]), x),
    ):
        with fake.refuses("found at least two devices, "):
            bad()
    assert (x * torch.tensor(2.0)).device == fake.device  # a scalar is passed by value
    with fake.refuses("found at least two devices"):
        torch.tensor(1.0).add_(x.sum())
