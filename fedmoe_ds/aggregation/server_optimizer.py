"""Server optimizers: what happens to the mean of a round before it becomes the global adapters.

Reddi et al., "Adaptive Federated Optimization" (arXiv 2003.00295), algorithm 2, with the pseudo-gradient D = mean - global:

    fedavg      x <- x + lr D                                   (lr = 1: the mean itself)
    fedavgm     m <- beta1 m + D                                x <- x + lr m         (Hsu et al., arXiv 1909.06335)
    fedadagrad  m <- beta1 m + (1 - beta1) D,  v <- v + D^2                                  x <- x + lr m / (sqrt(v) + tau)
    fedadam     m as fedadagrad,  v <- beta2 v + (1 - beta2) D^2                             x <- x + lr m / (sqrt(v) + tau)
    fedyogi     m as fedadagrad,  v <- v - (1 - beta2) D^2 sign(v - D^2)                     x <- x + lr m / (sqrt(v) + tau)
    fedams      m, v as fedadam,  vhat <- max(vhat, v)                                    x <- x + lr m / (sqrt(vhat) + tau)

v starts at tau^2; with fedams v and vhat start at zero, as in AMSGrad. FedAMS (Wang et al., arXiv 2205.02719) names two
variants: the maximum as above (FedAMSGrad), and one that takes epsilon into it, vhat <- max(vhat, v, epsilon), and divides by
sqrt(vhat) alone. Ours is the first, with tau outside the root, where client-centric adaptive optimization (`methods/cc_fao.py`)
has its epsilon; the two differ where vhat is about epsilon or less (our completion). The maximum never falls.

Adapters that nobody is averaged for in a round (weights sum to zero) have no pseudo-gradient: they and their moments stay as
they are (our completion).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_ds.config import ServerConfig
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

MOMENTUM, VARIANCE, LARGEST = "momentum", "variance", "largest"
_KEPT = {"fedavg": [], "fedavgm": [MOMENTUM], "fedams": [MOMENTUM, VARIANCE, LARGEST]}


def server_moments(config: ServerConfig) -> list[str]:
    """Names of what the optimizer remembers, each shaped like the averaged adapters."""
    return _KEPT.get(config.optimizer, [MOMENTUM, VARIANCE])


class ServerOptimizer:
    """Elementwise, in float64, so that every rank that holds an adapter computes the same bits."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config

    @property
    def plain(self) -> bool:
        """Whether the mean is taken as it is."""
        return self.config.optimizer == "fedavg" and self.config.lr == 1.0

    def banks(self, specs: list[BlockSpec], experts: int, device: torch.device | None = None) -> dict[str, Bank]:
        """The moments before the first round; part of the state of a run."""
        names = server_moments(self.config)
        banks = {name: Bank(specs, experts, clients=1, device=device, with_grad=False) for name in names}
        if VARIANCE in banks and LARGEST not in banks:
            for value in banks[VARIANCE].values.values():
                value.fill_(self.config.tau**2)
        return banks

    @torch.no_grad()
    def step(self, spec: BlockSpec, old: Tensor, mean: Tensor, trained: Tensor, banks: dict[str, Bank]) -> Tensor:
        """The new global value of a block; moments are updated in place.

        Args:
            old, mean: [L, E, *item] or [L, *item].
            trained: bool [L, E] or [L]: where anybody trained.
        """
        # old + (mean - old) need not round to mean: plain averaging returns the mean's own bits.
        if self.plain:
            return mean
        change = mean.double() - old.double()
        # Per (layer, expert): a round without a pseudo-gradient is no step, neither for an expert nor for its moments.
        where = trained.view(*trained.shape, *([1] * len(spec.item)))
        direction = self._direction(spec, change, where, banks)
        return torch.where(where, old.double() + self.config.lr * direction, old.double()).float()

    def _direction(self, spec: BlockSpec, change: Tensor, where: Tensor, banks: dict[str, Bank]) -> Tensor:
        config = self.config
        if config.optimizer == "fedavg":
            return change
        first = banks[MOMENTUM].client(spec.name, 0)
        if config.optimizer == "fedavgm":
            momentum = first.double() * config.beta1 + change
            first.copy_(torch.where(where, momentum, first.double()))
            return momentum
        # No bias correction: algorithm 2 has none.
        momentum = first.double() * config.beta1 + change * (1.0 - config.beta1)
        first.copy_(torch.where(where, momentum, first.double()))
        second, square = banks[VARIANCE].client(spec.name, 0), change * change
        variance = self._variance(second.double(), square)
        second.copy_(torch.where(where, variance, second.double()))
        if LARGEST in banks:
            largest = banks[LARGEST].client(spec.name, 0)
            variance = torch.maximum(largest.double(), variance)
            largest.copy_(torch.where(where, variance, largest.double()))
        return momentum / (variance.sqrt() + config.tau)

    def _variance(self, second: Tensor, square: Tensor) -> Tensor:
        beta2 = self.config.beta2
        if self.config.optimizer == "fedadagrad":
            return second + square
        if self.config.optimizer == "fedyogi":
            # Yogi: v changes by at most (1 - beta2) D^2, so small changes after large ones do not shrink it at once.
            return second - (second - square).sign() * square * (1.0 - beta2)
        return second * beta2 + square * (1.0 - beta2)
