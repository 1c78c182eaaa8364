"""Client optimizers: AdamW and SGD on stacked parameters, every client with its own step count, rate and clipping factor.

Clients are updated one by one, with elementwise operations only, so a client's bits do not depend on who else is in flight, and
a client that has finished is not touched at all: no decay, no momentum drift. A vector unit may treat the last few elements of
a loop differently where an operation multiplies and adds in one go. Such operations, which save half of the memory traffic, are
therefore used only where every item fills whole vectors; elsewhere each operation rounds by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fedmoe_ds.adapters.bank import Bank
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.native import rows

# Two AVX-512 registers of floats: the longest stride of torch's vectorised loops.
_VECTOR_ELEMENTS = 32


class ClientOptimizer:
    """Steps single clients of a bank.

    Args:
        bank: values and gradients of the clients in flight.
        config: optimizer settings; AdamW is Loshchilov & Hutter (arXiv 1711.05101), SGD has classical momentum.
    """

    def __init__(self, bank: Bank, config: LocalConfig) -> None:
        self.bank = bank
        self.config = config
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        needs_first = config.optimizer == "adamw" or config.momentum > 0
        if needs_first:
            self.first = {name: torch.zeros_like(value) for name, value in bank.values.items()}
        if config.optimizer == "adamw":
            self.second = {name: torch.zeros_like(value) for name, value in bank.values.items()}

    def reset(self) -> None:
        """Forget all moments (a new wave moves in)."""
        for state in (*self.first.values(), *self.second.values()):
            state.zero_()

    @torch.no_grad()
    def step(self, blocks: Iterable[str], slot: int, step: int, lr: float, clip_factor: float) -> None:
        """Update one client's part of some blocks and clear its gradients.

        Args:
            blocks: names of the blocks in which `slot` counts.
            slot: the client's slot on those blocks' client axis.
            step: the client's own step number, from 1.
            lr: learning rate of this step.
            clip_factor: the gradient is multiplied by it (1.0: no clipping).
        """
        for name in blocks:
            axis = 2 if self.bank.specs[name].expert else 1
            value, grad = self.bank.values[name].select(axis, slot), self.bank.grads[name].select(axis, slot)
            decay = self.config.weight_decay if self.bank.specs[name].decay else 0.0
            if self.config.optimizer == "adamw":
                first, second = self.first[name].select(axis, slot), self.second[name].select(axis, slot)
                if rows.serves(value, grad, first, second):
                    self._adamw_native(name, (value, grad, first, second), step, lr, decay, clip_factor)
                    continue
                if clip_factor != 1.0:
                    grad.mul_(clip_factor)
                update = self._adamw if self._fills_vectors(name) else self._adamw_by_single_operations
                update(value, grad, first, second, step, lr, decay)
            else:
                if clip_factor != 1.0:
                    grad.mul_(clip_factor)
                buffer = self.first[name].select(axis, slot) if self.first else None
                self._sgd(value, grad, buffer, lr, decay)
            grad.zero_()

    def _fills_vectors(self, name: str) -> bool:
        """Whether no loop over an item ends in the middle of a vector (torch unrolls by two; threads cut anywhere)."""
        on_cpu = self.bank.values[name].device.type == "cpu"
        whole = math.prod(self.bank.specs[name].item) % _VECTOR_ELEMENTS == 0
        return not on_cpu or (whole and torch.get_num_threads() == 1)

    def _adamw_native(
        self, name: str, tensors: tuple[Tensor, Tensor, Tensor, Tensor], step: int, lr: float, decay: float, clip: float
    ) -> None:
        """In one pass over memory; every item goes through the same loop from its first element on."""
        beta1, beta2 = self.config.betas
        rows.adamw(
            *tensors,
            len(self.bank.specs[name].item),
            clip=clip,
            keep=1.0 - lr * decay,
            betas=(beta1, beta2),
            root=math.sqrt(1.0 - beta2**step),
            eps=self.config.eps,
            rate=lr / (1.0 - beta1**step),
        )

    def _adamw(self, value: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: int, lr: float, decay: float) -> None:
        beta1, beta2 = self.config.betas
        if decay:
            value.mul_(1.0 - lr * decay)
        first.lerp_(grad, 1.0 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        denominator = second.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(self.config.eps)
        value.addcdiv_(first, denominator, value=-lr / (1.0 - beta1**step))

    def _adamw_by_single_operations(
        self, value: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: int, lr: float, decay: float
    ) -> None:
        beta1, beta2 = self.config.betas
        if decay:
            value.mul_(1.0 - lr * decay)
        first.mul_(beta1).add_(grad * (1.0 - beta1))
        second.mul_(beta2).add_((grad * grad).mul_(1.0 - beta2))
        denominator = second.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(self.config.eps)
        value.sub_((first * (lr / (1.0 - beta1**step))).div_(denominator))

    def _sgd(self, value: Tensor, grad: Tensor, buffer: Tensor | None, lr: float, decay: float) -> None:
        update = grad.clone() if not decay else grad + value * decay
        if buffer is not None:
            update = buffer.mul_(self.config.momentum).add_(update).clone()
        value.sub_(update.mul_(lr))


def squared_norms(bank: Bank, expert: bool) -> Tensor:
    """Squared gradient norms in float64: [N, E, C] over expert blocks or [N, 1, C] over dense ones, N = blocks x layers.

    Each number is a sum over one contiguous item, so it does not depend on how many experts or clients are held here.
    """
    clients = bank.expert_clients if expert else bank.clients
    rows = []
    for name, spec in bank.specs.items():
        if spec.expert == expert and spec.trained:
            grad = bank.grads[name]
            square = torch.linalg.vector_norm(grad.view(-1, math.prod(spec.item)), dim=-1, dtype=torch.float64).square()
            rows.append(square.view(len(spec.layers), -1, clients))
    if not rows:
        device = next(iter(bank.values.values())).device
        return torch.zeros(0, 1, clients, dtype=torch.float64, device=device)
    return torch.cat(rows)
