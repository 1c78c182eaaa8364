"""Fused step: the optimizer step of all clients of a wave on a device, block by block and not client by client.

Every client has its own step count, rate and clipping factor: they are a table that travels to the device once per step, for
all blocks. Elementwise operations over whole blocks read a client's factors by its place on the client axis; with Triton that
is one kernel per block, with PyTorch's operations a dozen. torch's fused AdamW is no help: it has one rate per call, and it
takes no strided slices.

A client that takes no step keeps its numbers: the kernel does not touch them, and the operations multiply them by one and add
zero.

Legend: C client slots of expert blocks, H those of dense blocks, K = C + H columns of the table, L layers, E experts held by
this rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmoe_ds.clients.host_moments import HostMoments
from fedmoe_ds.clients.stochastic_rounding import Rounding, at_layer, mixed, store
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.kernels import rows_on_device
from fedmoe_ds.kernels.client_block import ACTIVE, BLEND1, BLEND2, CLIP, FACTORS, KEEP, RATE, ROOT, ClientBlock
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.upload import upload


@dataclass(frozen=True)
class ClientStep:
    """One client's step.

    Attributes:
        slots: its slot on the client axis, by whether a block has experts; a client at home elsewhere has no dense one here.
        step: its own step number, from 1.
        lr: learning rate of this step.
        address: (round, client index), from which moments in bfloat16 are rounded.
    """

    slots: dict[bool, int]
    step: int
    lr: float
    address: tuple[int, int]


class FusedStep:
    """Steps all clients of a bank on a device.

    Args:
        bank: values and gradients.
        config: optimizer settings.
        moments: the optimizer's state, one dictionary by block name for each moment.
        rounding: where moments are bfloat16.
        host: lends the moments where they are on the host; None: they are on the device.
    """

    def __init__(
        self,
        bank: Bank,
        config: LocalConfig,
        moments: Sequence[dict[str, Tensor]],
        rounding: Rounding | None,
        host: HostMoments | None = None,
    ) -> None:
        self.bank, self.config, self.moments, self.rounding, self.host = bank, config, moments, rounding, host
        self.trained = [spec for spec in bank.specs.values() if spec.trained]
        self.numbers: dict[str, Tensor] = {}  # of items, for random rounding; made at the first step

    def take(self, steps: Sequence[ClientStep], norms_C: Tensor | None) -> None:
        """One step of these clients, in place; gradients are cleared.

        Args:
            steps: the clients that take one.
            norms_C: gradient norms by expert slot, on the device; None: no clipping.
        """
        (sent,) = upload([self._table(steps)], self.bank.device)
        factors_7K, whole = sent[: len(FACTORS)].float(), sent[len(FACTORS) :].view(torch.int64)
        if norms_C is not None:
            factors_7K[CLIP] = clip_factors(norms_C, self.config.clip).index_select(0, whole[0])
        for row, spec in enumerate(self.trained):
            first = 0 if spec.expert else self.bank.expert_clients
            columns = slice(first, first + (self.bank.expert_clients if spec.expert else self.bank.clients))
            self._step(spec, factors_7K[:, columns], None if self.rounding is None else whole[1 + row, columns])
        if self.host is not None:
            self.host.stepped()
        # Triton's kernels take addresses: torch does not know that anything was written.
        self.bank.note_step()

    def _table(self, steps: Sequence[ClientStep]) -> NDArray[np.float64]:
        """[7 + 1 + blocks, K]: factors (see `client_block`); below them, as bits of whole numbers, the place of the client's
        gradient norm and, for random rounding, what each block's keys start from."""
        bank, config = self.bank, self.config
        beta1, beta2 = config.betas if config.optimizer == "adamw" else (0.0, 0.0)
        factors = np.ones((len(FACTORS), bank.expert_clients + bank.clients))
        factors[[ACTIVE, RATE, BLEND1, BLEND2]] = 0.0
        whole = np.zeros((1 + len(self.trained), factors.shape[1]), np.int64)
        for one in steps:
            for expert, slot in one.slots.items():
                column = slot if expert else bank.expert_clients + slot
                factors[ACTIVE, column] = 1.0
                # Bias corrections follow the client's own step count, not the wave's.
                factors[RATE, column] = one.lr / (1.0 - beta1**one.step)
                factors[ROOT, column] = math.sqrt(1.0 - beta2**one.step)
                factors[KEEP, column] = 1.0 - one.lr * config.weight_decay
                # Taken in float64: in float32, 1 - beta2 would be off by 5e-5 of itself.
                factors[[BLEND1, BLEND2], column] = 1.0 - beta1, 1.0 - beta2
                whole[0, column] = one.slots[True]
                for row, spec in enumerate(self.trained):
                    if self.rounding is not None and spec.expert == expert:
                        whole[1 + row, column] = self.rounding.base(spec, *one.address, one.step)
        return np.concatenate([factors, whole.view(np.float64)])

    def _step(self, spec: BlockSpec, factors_7C: Tensor, bases_C: Tensor | None) -> None:
        block = ClientBlock(
            self.bank.values[spec.name],
            self.bank.grads[spec.name],
            [state[spec.name] for state in self.moments],
            len(spec.item),
            factors_7C,
            bases_C,
            # A block without experts adds no expert to the address of its rounding.
            self.rounding.held.start if self.rounding is not None and spec.expert else 0,
            self.config.weight_decay if spec.decay else 0.0,
        )
        if self.host is None:
            self._advance(spec, block)
            return
        for row in range(len(block.value)):
            with self.host.lent(spec.name, row) as moments:
                # A layer by itself is numbered 0: what its rounding starts from says which one it is.
                self._advance(spec, block.layer(row, moments, None if bases_C is None else at_layer(bases_C, row)))

    def _advance(self, spec: BlockSpec, block: ClientBlock) -> None:
        if rows_on_device.kernels(block.value) is not None:
            self._by_triton(block)
        elif block.bases_C is None:
            self._by_torch(block)
        else:
            self._rounding(spec, block, block.bases_C)

    def _by_triton(self, block: ClientBlock) -> None:
        from fedmoe_ds.kernels import optimizer_triton  # Triton is there only with CUDA builds of torch

        if self.config.optimizer == "sgd":
            optimizer_triton.sgd(block, self.config.momentum)
        else:
            optimizer_triton.adamw(block, self.config.eps)

    def _rounding(self, spec: BlockSpec, block: ClientBlock, bases_C: Tensor) -> None:
        """Layer by layer: float32 copies of a whole block's moments would take as much memory as bfloat16 gives back."""
        assert self.rounding is not None
        if spec.name not in self.numbers:
            self.numbers[spec.name] = self.rounding.numbers(spec).to(self.bank.device)
        keys = mixed(bases_C, self.numbers[spec.name][: len(block.value)].unsqueeze(-1))
        for row in range(len(block.value)):
            kept = [moment[row : row + 1] for moment in block.moments]
            # The step uses the moments in float32; they are rounded once, when it is done.
            wide = [moment.float() for moment in kept]
            self._by_torch(block.layer(row, wide))
            store(kept, wide, keys[row : row + 1])

    def _by_torch(self, block: ClientBlock) -> None:
        """With PyTorch's operations. The gradient is the only scratch: temporaries would be as large as the block."""
        # [C, 1, ...]: along the client axis, which lies before the item's own.
        factors = block.factors_7C.view(len(FACTORS), -1, *[1] * block.item_axes)
        if self.config.clip is not None:
            block.grad.mul_(factors[CLIP])
        if self.config.optimizer == "sgd":
            self._sgd(block, factors)
        else:
            self._adamw(block, factors)
        block.grad.zero_()

    def _adamw(self, block: ClientBlock, factors: Tensor) -> None:
        (first, second), grad = block.moments, block.grad
        if block.decay:
            block.value.mul_(factors[KEEP])
        # A blend of zero leaves a moment what it is.
        first.lerp_(grad, factors[BLEND1])
        second.lerp_(grad.mul_(grad), factors[BLEND2])
        torch.sqrt(second, out=grad).div_(factors[ROOT]).add_(self.config.eps)
        block.value.addcmul_(torch.div(first, grad, out=grad), factors[RATE], value=-1.0)

    def _sgd(self, block: ClientBlock, factors: Tensor) -> None:
        update = block.grad.add_(block.value, alpha=block.decay) if block.decay else block.grad
        if block.moments:
            kept = 1.0 - factors[ACTIVE] * (1.0 - self.config.momentum)
            update = block.moments[0].mul_(kept).addcmul_(update, factors[ACTIVE])
        block.value.addcmul_(update, factors[RATE], value=-1.0)


def clip_factors(norms_C: Tensor, clip: float | None) -> Tensor:
    """What gradients of these norms are multiplied by, so that none is above `clip`.

    A norm that is not a number compares as False: the step is taken as it is, and the client is then found not finite and
    left out.
    """
    limit = clip or 0.0
    return torch.where(norms_C > limit, limit / norms_C, torch.ones_like(norms_C))
