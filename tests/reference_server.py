"""Server optimizers in plain float64, key by key (Reddi et al., arXiv 2003.00295, algorithm 2; FedAvgM: arXiv 1909.06335)."""

from __future__ import annotations

import torch
from torch import Tensor


class ServerRule:
    """What becomes of the mean of a round; settings as in the configuration."""

    def __init__(
        self, kind: str = "fedavg", lr: float = 1.0, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
    ) -> None:
        self.kind, self.lr, self.beta1, self.beta2, self.tau = kind, lr, beta1, beta2, tau
        self.moments: dict[str, dict[str, Tensor]] = {"momentum": {}, "variance": {}, "largest": {}}

    def step(self, key: str, old: Tensor, mean: Tensor) -> Tensor:
        """The new global value."""
        d = mean - old
        if self.kind == "fedavg":
            return old + self.lr * d
        m = self.moments["momentum"].get(key, torch.zeros_like(d))
        v = self.moments["variance"].get(key, torch.full_like(d, 0.0 if self.kind == "fedams" else self.tau**2))
        if self.kind == "fedavgm":
            m = self.beta1 * m + d
            self.moments["momentum"][key] = m
            return old + self.lr * m
        m = self.beta1 * m + (1 - self.beta1) * d
        if self.kind == "fedadagrad":
            v = v + d**2
        elif self.kind in ("fedadam", "fedams"):
            v = self.beta2 * v + (1 - self.beta2) * d**2
        else:
            v = v - (1 - self.beta2) * d**2 * torch.sign(v - d**2)
        self.moments["momentum"][key], self.moments["variance"][key] = m, v
        if self.kind == "fedams":
            v = self.moments["largest"][key] = torch.maximum(v, self.moments["largest"].get(key, torch.zeros_like(v)))
        return old + self.lr * m / (v.sqrt() + self.tau)
