"""Client drift: its correction on the client side, for any method whose server averages what the clients train.

FedProx (Li et al., arXiv 1812.06127): every step adds mu (w - w_global) to the gradient.
SCAFFOLD (Karimireddy et al., arXiv 1910.06378, option II): every step adds c - c_i, with
    c_i <- c_i - c + (w_global - w_i) / (sum of the learning rates of the K steps)        c <- c + (1 / N) sum_i (c_i' - c_i)
over the participants of a round and all N clients. The denominator is K eta for a constant rate; the sum over a schedule is our
completion. Clipping, where it is on, acts on the corrected gradient g + c - c_i, and weight decay on the weights, so
(w_global - w_i) / rates is the mean of the steps as they were taken: after a clipped one, c_i is no mean gradient.
Personal blocks are left alone: they have no global value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec, control_block, shared_blocks


class FedProx:
    """The proximal term. `mu` as in the paper."""

    def __init__(self, mu: float) -> None:
        self.mu = mu

    @torch.no_grad()
    def adjust(self, view: ClientView) -> None:
        """grad += mu (w - w_global)."""
        for spec in shared_blocks(view.blocks()):
            # `received` is zero in rows that the client does not hold, and so is its value: no pull there.
            view.grad(spec).add_((view.value(spec) - view.received(spec)).mul_(self.mu))


class Scaffold:
    """Control variates. `control` is the server's c: a bank with one slot per adapter block."""

    def __init__(self, control: Bank) -> None:
        self.control = control

    @torch.no_grad()
    def adjust(self, view: ClientView) -> None:
        """grad += c - c_i."""
        for spec in shared_blocks(view.blocks()):
            # Slot 0: the server's bank has one client slot.
            correction = self.control.client(spec.name, 0) - view.client_state[control_block(spec).name]
            # c covers all rows of the global adapter, so it is cut to the client's: other rows must get no gradient.
            view.grad(spec).add_(_held(view, spec, correction))

    @torch.no_grad()
    def remember(self, view: ClientView, rates: float) -> dict[str, Tensor]:
        """The client's new control variates; `rates` is the sum of its learning rates."""
        result = {}
        for spec in shared_blocks(view.blocks()):
            name = control_block(spec).name
            # A new tensor, so dividing in place touches neither the client's nor the global values.
            slope = (view.received(spec) - view.value(spec)).div_(rates)
            change = slope - self.control.client(spec.name, 0)
            result[name] = view.client_state[name] + _held(view, spec, change)
        return result


def _held(view: ClientView, spec: BlockSpec, value: Tensor) -> Tensor:
    """Zero in the LoRA rows that the client does not hold, and in layers and experts that it does not train."""
    mask, untrained = view.assignment.mask(spec, value.device), view.untrained(spec)
    value = value if mask is None else torch.where(mask, value, 0.0)
    return value if untrained is None else torch.where(untrained, 0.0, value)
