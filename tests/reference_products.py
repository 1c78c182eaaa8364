"""Methods whose server works on products B A, with every product written out as a dense float64 matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from reference import Adapters
from reference_methods import FedIT, Returned, has_rows, pairs
from torch import Tensor


class Products(FedIT):
    """Everything that is no LoRA pair is averaged as usual; pairs are made by `renew`."""

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        old = dict(self.adapters)
        super().step(returned, fresh)  # of pairs: the means of A and of B
        for stem, a, b in pairs(self.adapters):
            weights = [self.weight(f"{stem}.lora_A", one) for one in returned]
            if sum(weights) == 0:
                continue
            products = [one.trained.adapters[f"{stem}.lora_B"] @ one.trained.adapters[f"{stem}.lora_A"] for one in returned]
            shares = [weight / sum(weights) for weight in weights]
            w = sum((p * product for p, product in zip(shares, products, strict=True)), torch.zeros_like(products[0]))
            new = self.renew(stem, w, a, b, fresh)
            assert new[0].shape == old[f"{stem}.lora_A"].shape and new[1].shape == old[f"{stem}.lora_B"].shape
            self.adapters[f"{stem}.lora_A"], self.adapters[f"{stem}.lora_B"] = new

    def renew(self, stem: str, w: Tensor, a: Tensor, b: Tensor, fresh: Adapters) -> tuple[Tensor, Tensor]:
        """(A, B) of the next round from W = sum_k p_k B_k A_k and the means of A and B."""
        raise NotImplementedError


class FlexLoRA(Products):
    """The leading singular triples of W over those who have rows; u's largest entry is positive."""

    def weight(self, key: str, one: Returned) -> float:
        return super().weight(key, one) if "lora" not in key or has_rows(key, one) else 0.0

    def renew(self, stem: str, w: Tensor, a: Tensor, b: Tensor, fresh: Adapters) -> tuple[Tensor, Tensor]:
        u, s, vt = np.linalg.svd(w.numpy())
        for i in range(self.full):
            if u[np.argmax(np.abs(u[:, i])), i] < 0:
                u[:, i], vt[i] = -u[:, i], -vt[i]
        return torch.from_numpy(vt[: self.full].copy()), torch.from_numpy(u[:, : self.full] * s[: self.full])


class FLoRA(Products):
    """W moves into the frozen weight; A is drawn anew and B is zero."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.base: Adapters = {
            f"{stem}.base": self.reference.frozen_weight(stem).clone() for stem, _, _ in pairs(self.adapters)
        }

    def renew(self, stem: str, w: Tensor, a: Tensor, b: Tensor, fresh: Adapters) -> tuple[Tensor, Tensor]:
        weight: Tensor = self.reference.frozen_weight(stem)
        weight += self.reference.settings.scale * w
        self.base[f"{stem}.base"] = weight.clone()
        return fresh[f"{stem}.lora_A"].double(), torch.zeros_like(b)

    def extras(self) -> dict[str, Adapters]:
        return {"base": self.base}


class FLoRIST(FLoRA):
    """Of W the leading singular triples that have a share of the squared singular values; options: tau."""

    def renew(self, stem: str, w: Tensor, a: Tensor, b: Tensor, fresh: Adapters) -> tuple[Tensor, Tensor]:
        u, s, vt = np.linalg.svd(w.numpy(), full_matrices=False)
        kept, energy, whole = 0, 0.0, float((s**2).sum())
        while energy < self.options["tau"] * whole:
            energy, kept = energy + float(s[kept] ** 2), kept + 1
            self.margin = min(self.margin, abs(energy / whole - self.options["tau"]))
        return super().renew(stem, torch.from_numpy(u[:, :kept] * s[:kept] @ vt[:kept]), a, b, fresh)


class FedExLoRA(FLoRA):
    """W - B A of the means moves into the frozen weight; the means stay."""

    def renew(self, stem: str, w: Tensor, a: Tensor, b: Tensor, fresh: Adapters) -> tuple[Tensor, Tensor]:
        super().renew(stem, w - b @ a, a, b, fresh)
        return a, b


class FedRotLoRA(FedIT):
    """FedIT of factors that are turned towards the global ones, from the second round on; options: turns, strength."""

    rounds = 0

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        self.rounds += 1
        turn = self.options["turns"][self.rounds % len(self.options["turns"])]
        for one in returned if self.rounds > 1 else []:
            for stem, a, b in pairs(self.adapters):
                own_a, own_b = (one.trained.adapters[f"{stem}.lora_{half}"].numpy() for half in "AB")
                m = a.numpy() @ own_a.T if turn == "A" else b.numpy().T @ own_b
                r = np.eye(len(m)) if not m.any() else towards(m + 1e-7 * np.linalg.norm(m) * np.eye(len(m)))
                r = orthogonal((1 - self.options["strength"]) * np.eye(len(m)) + self.options["strength"] * r)
                one.trained.adapters[f"{stem}.lora_A"] = torch.from_numpy(r.T @ own_a)
                one.trained.adapters[f"{stem}.lora_B"] = torch.from_numpy(own_b @ r)
        super().step(returned, fresh)


def towards(m: np.ndarray) -> np.ndarray:
    """The rotation R that brings R^T A nearest to A', or B R to B'; m = A' A^T, or B'^T B (Kabsch)."""
    u, _, vt = np.linalg.svd(m)
    turned = np.diag([*[1.0] * (len(m) - 1), np.linalg.det(u @ vt)])
    return np.asarray(vt.T @ turned @ u.T)


def orthogonal(m: np.ndarray) -> np.ndarray:
    """The orthogonal matrix nearest to one that is regular: m (m^T m)^(-1/2)."""
    squares, axes = np.linalg.eigh(m.T @ m)
    return np.asarray(m @ (axes / np.sqrt(squares)) @ axes.T)


class LoRAFair(Products):
    """The best dB on a gradient descent on 1 - cos(W, (B + dB) A) + lambda ||dB||; options: regularisation, steps, lr."""

    def renew(self, stem: str, w: Tensor, a: Tensor, b: Tensor, fresh: Adapters) -> tuple[Tensor, Tensor]:
        if not b.any():
            return a, b
        residual, path = torch.zeros_like(b), []
        for _ in range(self.options["steps"] + 1):
            residual.requires_grad_()
            product = (b + residual) @ a
            loss = 1 - (w * product).sum() / (w.norm() * product.norm()) + self.options["regularisation"] * residual.norm()
            (slope,) = torch.autograd.grad(loss, residual)
            residual = residual.detach()
            path.append((loss.item(), residual))
            residual = residual - self.options["lr"] * b.norm() ** 2 * slope
        return a, b + min(path, key=lambda step: step[0])[1]
