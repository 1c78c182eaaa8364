"""Client drift: its correction on the client side, for any method whose server averages what the clients train.

FedProx (Li et al., arXiv 1812.06127): every step adds mu (w - w_global) to the gradient.
SCAFFOLD (Karimireddy et al., arXiv 1910.06378, option II): every step adds c - c_i, with
    c_i <- c_i - c + (w_global - w_i) / (sum of the learning rates of the K steps)        c <- c + (1 / N) sum_i (c_i' - c_i)
over the participants of a round and all N clients. The denominator is K eta for a constant rate; the sum over a schedule is our
completion. Clipping, where it is on, acts on the corrected gradient g + c - c_i, and weight decay on the weights, so
(w_global - w_i) / rates is the mean of the steps as they were taken: after a clipped one, c_i is no mean gradient.

FedVRA (Wang et al., arXiv 2212.01519) is a primal-dual scheme: a client's dual variable l_i remembers by how much it disagreed.
    every step adds l_i + gamma (w - x) to the gradient            l_i <- l_i + a gamma (w_i - x)
    L <- L + sum_i p_i (l_i' - l_i)                                x <- mean of w_i + d L / gamma
with x the global value, p_i the client's share of all data, gamma = `local.proximal`, a = `local.dual_step`, d =
`local.aggregation_step`.
READ (abstract, public review): federated ADMM reduces the variance of clients; two step sizes, one of the dual, one of the
aggregation, which controls the bias of the global model where clients are drawn; FedAvg, FedProx and FedDyn are instances.
NOT FOUND: the server's rule with both step sizes, and how a and d would follow the client and the round.
COMPLETION: the server's rule above, with constant a and d. (a, d) = (0, 0) is FedProx, gamma = 0 with it FedAvg, (1, 1) FedDyn
(Acar et al., arXiv 2111.04263; here with p_i in the place of 1 / N). sum_i p_i l_i = L always holds. With everybody in the
round and a, d > 0, x rests where sum_i p_i grad f_i(x) = 0, whatever the method weighs clients by in its mean. With a > 0 = d
it does not where that mean is by p_i: L = a gamma (x - x_0) then, a pull back to the start.
Limits: an item of an adapter that nobody trains (weights sum to zero) keeps its global value, without the step along L;
clipping acts on the corrected gradient; with a server optimizer the pseudo-gradient is mean + d L / gamma - x.

Personal blocks are left alone: they have no global value. What SCAFFOLD and FedVRA keep lies in one place, of the clients
(`control_block`) and of the server (`CONTROL`): control variates of the one, dual variables of the other.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec, control_block, shared_blocks

CONTROL = "control"
"""The server's bank of what a correction keeps."""
DUAL = ("fedvra", "feddyn")


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


class FedVRA(FedProx):
    """Dual variables beside the proximal term; gamma and a as in the paper."""

    def __init__(self, gamma: float, step: float) -> None:
        super().__init__(gamma)
        self.step = step

    @torch.no_grad()
    def adjust(self, view: ClientView) -> None:
        """grad += l_i + gamma (w - x)."""
        super().adjust(view)
        for spec in shared_blocks(view.blocks()):
            # A client may have met other rows in an earlier round, and these get no gradient now.
            view.grad(spec).add_(_held(view, spec, view.client_state[control_block(spec).name]))

    @torch.no_grad()
    def remember(self, view: ClientView, rates: float) -> dict[str, Tensor]:
        """l_i + a gamma (w_i - x): values and no gradients, so it holds for every optimizer and every rate."""
        result = {}
        for spec in shared_blocks(view.blocks()):
            name = control_block(spec).name
            away = (view.value(spec) - view.received(spec)).mul_(self.step * self.mu)
            result[name] = view.client_state[name] + away
        return result


def keeps_variables(local: LocalConfig) -> bool:
    """Whether the correction keeps a vector of every client that was trained, and one at the server."""
    return local.drift == "scaffold" or local.drift in DUAL


def client_variables(local: LocalConfig, blocks: Iterable[BlockSpec]) -> list[BlockSpec]:
    """The blocks in which a client keeps them, as large as what is corrected."""
    return [control_block(block) for block in shared_blocks(blocks)] if keeps_variables(local) else []


def correction(local: LocalConfig, server: dict[str, Bank]) -> FedProx | Scaffold | FedVRA | None:
    """That of a run; at most one, since each defines where a client's steps should point."""
    if local.drift == "fedprox":
        return FedProx(local.proximal)
    if local.drift == "scaffold":
        return Scaffold(server[CONTROL])
    # FedDyn has no step sizes: a key that is set for FedVRA must not reach it.
    return FedVRA(local.proximal, local.dual_step if local.drift == "fedvra" else 1.0) if local.drift in DUAL else None


def variable_share(local: LocalConfig, data_share: float, clients: int) -> float:
    """By how much the change of one client's variables moves the server's; shares of all clients, drawn or not, sum to one."""
    # SCAFFOLD, algorithm 1: 1 / N. Duals weigh as the losses do whose sum is minimised.
    return data_share if local.drift in DUAL else 1.0 / clients


def server_step(local: LocalConfig) -> float:
    """d / gamma: how far the server goes from the mean along its duals; 0: it takes the mean as it is."""
    if local.drift not in DUAL:
        return 0.0
    step = local.aggregation_step if local.drift == "fedvra" else 1.0
    # Without a step there is nothing to divide, and gamma may be zero (a configuration with both is FedAvg).
    return step / local.proximal if step else 0.0


def _held(view: ClientView, spec: BlockSpec, value: Tensor) -> Tensor:
    """Zero in the LoRA rows that the client does not hold, and in layers and experts that it does not train."""
    mask, untrained = view.assignment.mask(spec, value.device), view.untrained(spec)
    value = value if mask is None else torch.where(mask, value, 0.0)
    return value if untrained is None else torch.where(untrained, 0.0, value)
