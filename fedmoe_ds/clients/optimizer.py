"""Client optimizers: AdamW and SGD on stacked parameters, every client with its own step count, rate and clipping factor.

On a CPU clients are updated with elementwise operations only, so a client's bits do not depend on who else is in flight, and a
client that has finished is not touched at all: no decay, no momentum drift. The compiled step takes the items of all clients in
the order of memory; PyTorch's operations take one client after the other. A vector unit may treat the last few
elements of a loop differently where an operation multiplies and adds in one go. Such operations, which save half of the memory
traffic, are therefore used only where every item fills whole vectors; elsewhere each operation rounds by itself.

On a device all clients of a wave are updated together, block by block (`fused_step.py`).

Moments may be kept in bfloat16 (`local.moments`): a step computes in float32 and rounds what it keeps
(`stochastic_rounding.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe_ds.clients.fused_step import ClientStep, FusedStep, clip_factors
from fedmoe_ds.clients.host_moments import HostMoments, moments_of
from fedmoe_ds.clients.stochastic_rounding import Keys, Rounding, store
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.distributed.collectives import all_gather
from fedmoe_ds.kernels import rows
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.dispatcher import Pool

# Two AVX-512 registers of floats: the longest stride of torch's vectorised loops.
_VECTOR_ELEMENTS = 32


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def moment_count(config: LocalConfig) -> int:
    """Numbers of optimizer state per trained number."""
    return 2 if config.optimizer == "adamw" else int(config.momentum > 0)


def moment_bytes(config: LocalConfig) -> int:
    """Bytes of optimizer state per trained number."""
    return moment_count(config) * _DTYPES[config.moments].itemsize


@dataclass(frozen=True)
class Turn:
    """One client's step on blocks of one kind: its slot there, its step number, rate and clipping factor, and its address."""

    slot: int
    step: int
    lr: float
    clip: float
    address: tuple[int, int] | None = None


class ClientOptimizer:
    """Steps clients of a bank, each on its own part of it.

    Args:
        bank: values and gradients of the clients in flight.
        config: optimizer settings; AdamW is Loshchilov & Hutter (arXiv 1711.05101), SGD has classical momentum.
        seed: run seed, for moments in bfloat16.
        first_expert: global id of the first expert in the bank, for the same.
        on_host: keep the moments of a bank on a device in the host's memory.
    """

    def __init__(self, bank: Bank, config: LocalConfig, seed: int = 0, first_expert: int = 0, on_host: bool = False) -> None:
        self.bank = bank
        self.config = config
        held, dtype = range(first_expert, first_expert + bank.experts), _DTYPES[config.moments]
        self.rounding = Rounding(seed, held) if dtype == torch.bfloat16 else None
        assert not on_host or bank.device.type == "cuda"
        states = [moments_of(bank, dtype, on_host) for _ in range(moment_count(config))]
        self.host = HostMoments(states, bank.device) if on_host else None
        self.first: dict[str, Tensor] = states[0] if states else {}
        self.second: dict[str, Tensor] = states[1] if len(states) > 1 else {}
        self.fused = FusedStep(bank, config, states, self.rounding, self.host)

    def reset(self) -> None:
        """Forget all moments (a new wave moves in)."""
        if self.host is not None:
            self.host.forget()
            return
        for state in (*self.first.values(), *self.second.values()):
            state.zero_()

    @torch.no_grad()
    def step_all(self, steps: Sequence[ClientStep], norms_C: Tensor | None = None) -> None:
        """Update several clients' parts of all trained blocks and clear their gradients.

        Args:
            steps: the clients that take a step.
            norms_C: their gradient norms by expert slot, where `local.clip` bounds these.
        """
        if self.bank.device.type == "cuda":
            self.fused.take(steps, norms_C)
            return
        factors = None if norms_C is None else clip_factors(norms_C, self.config.clip).tolist()
        turns: dict[bool, list[Turn]] = {True: [], False: []}
        for one in steps:
            factor = 1.0 if factors is None else factors[one.slots[True]]
            for expert, slot in one.slots.items():
                turns[expert].append(Turn(slot, one.step, one.lr, factor, one.address))
        for spec in self.bank.specs.values():
            if spec.trained:
                self.take(spec.name, turns[spec.expert])

    @torch.no_grad()
    def take(self, name: str, turns: Sequence[Turn]) -> None:
        """One step of some clients on a block of a CPU's bank; their gradients are cleared."""
        value, grad = self.bank.values[name], self.bank.grads[name]
        # The native step multiplies the clipping factor in and clears the gradient in the same pass over memory.
        if self.config.optimizer == "adamw" and rows.serves(value, grad):
            self._adamw_native(name, turns)
            return
        axis = 2 if self.bank.specs[name].expert else 1
        for turn in turns:
            own, slope = value.select(axis, turn.slot), grad.select(axis, turn.slot)
            moments = [state[name].select(axis, turn.slot) for state in (self.first, self.second) if state]
            if turn.clip != 1.0:
                slope.mul_(turn.clip)
            keys = self._keys(name, turn.step, turn.address)
            if keys is None:
                self._plain(name, own, slope, moments, turn.step, turn.lr)
            else:
                self._plain_rounding(name, own, slope, moments, keys, turn.step, turn.lr)
            # This client's part alone, right after its use: the next step adds to it, micro-batch by micro-batch.
            slope.zero_()

    def _keys(self, name: str, step: int, address: tuple[int, int] | None) -> Keys | None:
        if self.rounding is None:
            return None
        assert address is not None, "moments in bfloat16 are rounded by an address"
        return self.rounding.keys(self.bank.specs[name], *address, step)

    def _plain(self, name: str, value: Tensor, grad: Tensor, moments: Sequence[Tensor], step: int, lr: float) -> None:
        """With PyTorch's operations, all in float32."""
        decay = self._decay(name)
        if self.config.optimizer == "sgd":
            self._sgd(value, grad, moments[0] if moments else None, lr, decay)
            return
        first, second = moments
        update = self._adamw if self._fills_vectors(name) else self._adamw_by_single_operations
        update(value, grad, first, second, step, lr, decay)

    def _plain_rounding(
        self, name: str, value: Tensor, grad: Tensor, moments: Sequence[Tensor], keys: Keys, step: int, lr: float
    ) -> None:
        """The same layer by layer: float32 copies of a whole block would take as much memory as its moments give back."""
        for row in range(len(value)):
            layer = slice(row, row + 1)
            kept = [moment[layer] for moment in moments]
            # The step uses the moments in float32; they are rounded once, when it is done.
            wide = [moment.float() for moment in kept]
            self._plain(name, value[layer], grad[layer], wide, step, lr)
            store(kept, wide, keys[layer])

    def _fills_vectors(self, name: str) -> bool:
        """Whether no loop over an item ends in the middle of a vector (torch unrolls by two; threads cut anywhere)."""
        on_cpu = self.bank.values[name].device.type == "cpu"
        whole = math.prod(self.bank.specs[name].item) % _VECTOR_ELEMENTS == 0
        return not on_cpu or (whole and torch.get_num_threads() == 1)

    def _decay(self, name: str) -> float:
        return self.config.weight_decay if self.bank.specs[name].decay else 0.0

    def _adamw_native(self, name: str, turns: Sequence[Turn]) -> None:
        """All clients in one pass over memory; every item goes through the same loop from its first element on."""
        beta1, beta2 = self.config.betas
        keys = [self._keys(name, turn.step, turn.address) for turn in turns]
        rows.adamw(
            self.bank.values[name],
            self.bank.grads[name],
            self.first[name],
            self.second[name],
            len(self.bank.specs[name].item),
            [
                # Bias corrections follow the client's own step count, not the wave's.
                rows.AdamwStep(
                    turn.slot,
                    turn.clip,
                    1.0 - turn.lr * self._decay(name),
                    math.sqrt(1.0 - beta2**turn.step),
                    turn.lr / (1.0 - beta1**turn.step),
                )
                for turn in turns
            ],
            betas=(beta1, beta2),
            eps=self.config.eps,
            keys=None if self.rounding is None else [key for key in keys if key is not None],
        )
        # The native step takes addresses: torch does not know that anything was written.
        self.bank.note_step()

    def _adamw(self, value: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: int, lr: float, decay: float) -> None:
        beta1, beta2 = self.config.betas
        if decay:
            value.mul_(1.0 - lr * decay)
        # Decay comes first and by itself (decoupled): it never enters the moments.
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
        # Clones here and below: the rate is multiplied into `update` in place and must reach neither gradient nor buffer.
        update = grad.clone() if not decay else grad + value * decay
        if buffer is not None:
            update = buffer.mul_(self.config.momentum).add_(update).clone()
        value.sub_(update.mul_(lr))


def squared_norms(bank: Bank, expert: bool) -> Tensor:
    """Squared gradient norms in float64: [N, E, C] over expert blocks or [N, 1, C] over dense ones, N = blocks x layers.

    Each number is a sum over one contiguous item, so it does not depend on how many experts or clients are held here.
    """
    clients, experts = (bank.expert_clients, bank.experts) if expert else (bank.clients, 1)
    norms = []
    for name, spec in bank.specs.items():
        if spec.expert == expert and spec.trained:
            grad = bank.grads[name]
            if rows.serves(grad):
                norm = rows.squared_norms(grad, len(spec.item))
            else:
                flat = grad.view(-1, math.prod(spec.item))
                norm = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float64).square_()
            norms.append(norm.view(len(spec.layers), experts, clients))
    # A run may train expert blocks only, or dense ones only; the gather needs a tensor of the right shape all the same.
    if not norms:
        device = next(iter(bank.values.values())).device
        return torch.zeros(0, 1, clients, dtype=torch.float64, device=device)
    return torch.cat(norms)


def global_norms(bank: Bank, pool: Pool) -> Tensor:
    """Gradient norm of every wave slot over its adapters on all ranks, [C], summed in one fixed order."""
    expert_CNE, dense_CN = gathered_norms(bank, pool)
    # Each over its own contiguous row: a sum over axis 1 could group terms by the number of clients.
    rows = torch.cat([expert_CNE.flatten(1), dense_CN], 1).contiguous().unbind(0)
    # On a device they stay there: what they decide is a factor of the step, which is there as well.
    return torch.stack([row.sum() for row in rows]).sqrt_()


def gathered_norms(bank: Bank, pool: Pool) -> tuple[Tensor, Tensor]:
    """`squared_norms` of every wave slot, on every rank of its cluster: [C, N, E] with all experts, and [C, N]. Collective."""
    size, group = pool.ep_size, pool.group
    expert_PNEC = all_gather(squared_norms(bank, expert=True), group, size)
    own_N1H = squared_norms(bank, expert=False)
    if bank.clients < pool.home_clients:
        # Ranks gather tensors of one shape: those with fewer clients at home add columns of zeros, and all drop them again.
        own_N1H = torch.nn.functional.pad(own_N1H, (0, pool.home_clients - bank.clients))
    dense_PN1H = all_gather(own_N1H, group, size)
    # Ranks times local experts is global expert order: the same order of summands for every expert-parallel size.
    dense_CN = pool.slots.of_wave(dense_PN1H.permute(0, 3, 1, 2).flatten(0, 1)).flatten(1)
    return expert_PNEC.permute(3, 1, 0, 2).flatten(2), dense_CN
