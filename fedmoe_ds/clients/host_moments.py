"""Host moments: optimizer state of the clients in flight in the host's memory, where a GPU has none to spare for it.

Of what a client in flight holds per trained number (value, gradient and, with AdamW in float32, two moments) the moments are
half, and nothing but an optimizer step reads them. With `execution.moments_on: host` they lie in pinned memory. A step takes
them to the device layer by layer and block by block, and back again: the numbers are those of a step with all of them there.
The host queues all of it and waits for none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fedmoe_ds.config import ExecutionConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.model.adapter_bank import Bank


def check_moments_on(execution: ExecutionConfig, device: str) -> None:
    """Refuse moments on the host of a run whose device is the host. Raises UserError."""
    if execution.moments_on == "host" and device == "cpu":
        raise UserError(
            "execution.moments_on: host: on a CPU they are in the host's memory as it is; use device (and "
            "local.moments=bfloat16 for half of their bytes)"
        )


def moments_of(bank: Bank, dtype: torch.dtype, on_host: bool) -> dict[str, Tensor]:
    """Room for one moment of everything that the bank trains, by block: zeros beside the values, or any numbers on the host."""
    trained = {spec.name: bank.values[spec.name] for spec in bank.specs.values() if spec.trained}
    if not on_host:
        return {name: torch.zeros_like(value, dtype=dtype) for name, value in trained.items()}
    # Pinned: only from there and to there does a GPU copy while the host goes on.
    return {name: torch.empty(value.shape, dtype=dtype, pin_memory=True) for name, value in trained.items()}


class HostMoments:
    """Moments on the host, lent to the device for a step.

    Args:
        states: pinned, one dictionary by block name for each moment, [L, ...].
        device: where steps are taken.
    """

    def __init__(self, states: Sequence[dict[str, Tensor]], device: torch.device) -> None:
        self.states, self.device, self.empty = states, device, True

    def forget(self) -> None:
        """All moments are zero from here on."""
        # Nothing is written: what the device has yet to copy here could come after it. A wave's first step reads none of it.
        self.empty = True

    @contextmanager
    def lent(self, name: str, row: int) -> Iterator[list[Tensor]]:
        """The moments of one layer of a block on the device, [1, ...]; what is in them afterwards is kept."""
        kept = [state[name][row : row + 1] for state in self.states]
        if self.empty:
            there = [torch.zeros(part.shape, dtype=part.dtype, device=self.device) for part in kept]
        else:
            there = [part.to(self.device, non_blocking=True) for part in kept]
        yield there
        # On the stream of the step, so the next step's copy to the device finds these numbers.
        for part, moment in zip(kept, there, strict=True):
            part.copy_(moment, non_blocking=True)

    def stepped(self) -> None:
        """All blocks have been lent once: the host holds their moments."""
        self.empty = False
