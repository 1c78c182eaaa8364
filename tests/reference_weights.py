"""Methods whose servers do not take one weighted mean, in plain float64: FedNova, q-FedAvg, EWWA-FL, key by key.

Keys are those of `reference_methods.py`, whose local training this is.
"""

from __future__ import annotations

from typing import Any

import torch
from reference import Adapters
from reference_methods import FedIT, FedProx, Returned, remembered_key
from torch import Tensor


class Changes(FedIT):
    """x + sum of weighted changes, by one factor for all keys."""

    def factors(self, returned: list[Returned]) -> list[float]:
        """What each client's change is multiplied by."""
        raise NotImplementedError

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        factors = self.factors(returned)
        for key, old in list(self.adapters.items()):
            if not key.endswith(self.frozen):
                moved = sum((f * (one.trained.adapters[key] - old) for f, one in zip(factors, returned, strict=True)),
                            torch.zeros_like(old))  # fmt: skip
                self.adapters[key] = self.server.step(key, old, old + moved)


class FedNova(Changes):
    """The paper's norms; options: lr, momentum, mu (with a proximal term), effective. For a constant rate."""

    def factors(self, returned: list[Returned]) -> list[float]:
        whole = sum(one.task.samples for one in returned)
        shares = [one.task.samples / whole for one in returned]
        steps = [len(one.task.steps) for one in returned]
        norms = [self.norm(tau) for tau in steps]
        lengths = norms if self.options.get("effective", "norms") == "norms" else steps
        effective = sum(p * length for p, length in zip(shares, lengths, strict=True))
        return [effective * p / norm for p, norm in zip(shares, norms, strict=True)]

    def norm(self, tau: int) -> float:
        """||a||_1 from the vector itself: how often the gradient of each step counts in the change."""
        rho, shrink = self.options.get("momentum", 0.0), 1.0 - self.options["lr"] * self.options.get("pull", 0.0)
        if rho:
            assert shrink == 1.0, "the paper has one or the other"
            return sum((1 - rho ** (tau - k)) / (1 - rho) for k in range(tau))
        return sum(shrink ** (tau - 1 - k) for k in range(tau))


class ProximalFedNova(FedProx, FedNova):
    """Options besides: mu and pull, the same number."""


class QFedAvg(Changes):
    """Algorithm 2; options: q, lipschitz."""

    def factors(self, returned: list[Returned]) -> list[float]:
        q, steep = self.options["q"], self.options["lipschitz"]
        total, powers = 0.0, []
        for one in returned:
            delta = [
                steep * (self.adapters[key] - value) for key, value in one.trained.adapters.items() if key in self.adapters
            ]
            square = sum(float(part.square().sum()) for part in delta)
            loss = one.trained.loss + 1e-10
            powers.append(loss**q)
            total += q * loss ** (q - 1) * square + steep * loss**q
        return [power * steep / total for power in powers]


class EWWAFL(FedIT):
    """A softmax over clients for every element; options: alpha, beta1, beta2, eps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        shared = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in self.adapters.items()}
        self.moments = {index: (dict(shared), dict(shared)) for index in self.clients}
        self.rounds = dict.fromkeys(self.clients, 0)

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        scores = [self.score(one) for one in returned]
        for key, old in list(self.adapters.items()):
            shares = torch.stack([score[key] for score in scores]).softmax(0)
            values = torch.stack([one.trained.adapters[key] for one in returned])
            self.adapters[key] = self.server.step(key, old, (shares * values).sum(0))

    def score(self, one: Returned) -> Adapters:
        """b_c of every element, after the client's moments have moved."""
        alpha, beta1, beta2, eps = (self.options[name] for name in ("alpha", "beta1", "beta2", "eps"))
        index, found = one.task.index, {}
        first, second = self.moments[index]
        self.rounds[index] += 1
        for key, old in self.adapters.items():
            g: Tensor = old - one.trained.adapters[key]
            first[key] = beta1 * first[key] + (1 - beta1) * g
            second[key] = beta2 * second[key] + (1 - beta2) * g**2
            mhat = first[key] / (1 - beta1 ** self.rounds[index])
            vhat = second[key] / (1 - beta2 ** self.rounds[index])
            found[key] = alpha * mhat / (vhat + eps).sqrt()
        return found

    def memory(self, index: int) -> Adapters:
        found = {"model.ewwa.rounds": torch.tensor([float(self.rounds[index])], dtype=torch.float64)}
        for word, values in zip(("ewwa-first", "ewwa-second"), self.moments[index], strict=True):
            found |= {remembered_key(key, word): value for key, value in values.items()}
        return super().memory(index) | found
