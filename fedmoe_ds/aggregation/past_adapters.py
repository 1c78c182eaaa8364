"""Past adapters: the global adapters of the last rounds, for clients that start late (`Assignment.delay`).

A ring: with the present adapters x_{t-1}, that rounds up to t - 1 have made, it keeps x_{t-2} to x_{t-1-D}, D being the largest
delay of the run; the present ones and the ring are D + 1 adapters. Before the first round everything is x_0, so a delay that
reaches back beyond it starts from the initial adapters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmoe_ds.errors import UserError
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec


class PastAdapters:
    """Where which round's adapters are. Copies and no arithmetic: every rank has the same bits.

    Args:
        most: D, rounds by which a client may be late; 0: nothing is kept.
    """

    def __init__(self, most: int) -> None:
        self.most = most

    def banks(self, specs: list[BlockSpec], experts: int, device: torch.device | None = None) -> dict[str, Bank]:
        """Memory of the ring, one bank per round; part of the state of a run."""
        return {self._name(i): Bank(specs, experts, clients=1, device=device, with_grad=False) for i in range(self.most)}

    @torch.no_grad()
    def begin(self, adapters: Bank, banks: Mapping[str, Bank]) -> None:
        """Before the first round: all of the past is as the present."""
        for place in range(self.most):
            for name, value in banks[self._name(place)].values.items():
                value.copy_(adapters.values[name])

    @torch.no_grad()
    def keep(self, old: Mapping[str, Tensor], round_index: int, banks: Mapping[str, Bank]) -> None:
        """The adapters `old`, by block, that round `round_index` began with become past: they take the place of the oldest."""
        if self.most:
            bank = banks[self._name(round_index - 1)]
            for name in bank.specs:
                bank.client(name, 0).copy_(old[name])

    def of(self, delay: int | None, round_index: int, banks: Mapping[str, Bank]) -> Bank | None:
        """What a client starts from in round `round_index` that is late by `delay` rounds; None: it is not late."""
        if not delay:
            return None
        if not 1 <= delay <= self.most:
            raise UserError(
                f"method.name: a client is to start from the adapters of {delay} rounds ago, and the run keeps those of "
                f"{self.most}; set `most_delay` of the method"
            )
        return banks[self._name(round_index - 1 - delay)]

    def _name(self, rounds: int) -> str:
        # By rounds done, modulo: nothing is moved when a round ends but the oldest adapters, which are overwritten.
        return f"past-{rounds % self.most}"
