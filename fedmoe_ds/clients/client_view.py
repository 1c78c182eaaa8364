"""ClientView: one client's adapters on one rank, while it trains and when it has finished.

Legend: L layers, E experts held by this rank, item the shape of one adapter tensor.

Expert blocks of a client are spread over the ranks of its cluster; its dense blocks are on its home rank alone. What is
computed from a `ClientView` per (layer, expert) or per layer is therefore computed where the tensors are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec, lora_pairs


@dataclass(frozen=True)
class ClientView:
    """One client's adapters on one rank, during and after its local training. A view; nothing is copied.

    Attributes:
        bank: clients in flight.
        start: the global adapters at the beginning of the round (slot 0).
        slots: block kind (is it an expert block?) -> the client's slot on that kind's client axis; a kind without tensors of
            this client on this rank is absent.
        client_state: the client's personal state on this rank, by block: [L, E, *item] or [L, *item].
        past: the adapters that a client with a delay started from, of the blocks that rounds change; None: from `start`.
        first_expert: global id of the first expert that this rank holds.
        starts: what the method lets the client start from, by block, in the place of what it receives.
    """

    client: Client
    assignment: Assignment
    bank: Bank
    start: Bank
    slots: dict[bool, int]
    client_state: dict[str, Tensor]
    past: Bank | None = None
    first_expert: int = 0
    starts: Mapping[str, Tensor] = field(default_factory=dict)

    def blocks(self, trained: bool = True) -> Iterator[BlockSpec]:
        """The blocks that this rank holds for the client; by default those that it trains."""
        for spec in self.bank.specs.values():
            # On a rank that is not the client's home the view has expert blocks alone, so loops over it do the rank's share.
            if spec.expert in self.slots and (spec.trained or not trained):
                yield spec

    def pairs(self) -> list[tuple[BlockSpec, BlockSpec]]:
        """The LoRA pairs that this rank holds for the client."""
        return lora_pairs(self.blocks(trained=False))

    def value(self, spec: BlockSpec) -> Tensor:
        """[L, E, *item] or [L, *item]: the client's own values."""
        return self.bank.client(spec.name, self.slots[spec.expert])

    def grad(self, spec: BlockSpec) -> Tensor:
        """Same shape: the gradient of the running step; may be changed in place before the optimizer reads it."""
        return self.bank.grads[spec.name].select(2 if spec.expert else 1, self.slots[spec.expert])

    def received(self, spec: BlockSpec) -> Tensor:
        """Same shape: what the client started the round from (rows that it does not hold are zero)."""
        if spec.name in self.starts:
            return self.starts[spec.name]
        # The past has no blocks that nobody trains: a late client has the present ones.
        source = self.past if self.past is not None and spec.name in self.past else self.start
        value = source.client(spec.name, 0)
        mask = self.assignment.mask(spec, value.device)
        # What a client of lower rank never got is no part of its start: differences to it are zero in those rows.
        return value if mask is None else torch.where(mask, value, 0.0)

    def starts_elsewhere(self, spec: BlockSpec) -> bool:
        """Whether `received` is not the global value of the round."""
        rows = self.assignment.rows_R is not None and spec.pair is not None
        return rows or self.past is not None or spec.name in self.starts

    def clear_untrained(self) -> None:
        """Set the gradients of what the client does not train to zero: they count in no norm."""
        for spec, untrained in self._untrained():
            self.grad(spec).masked_fill_(untrained, 0.0)

    def restore_untrained(self) -> None:
        """Give back their values to tensors that the client does not train: weight decay has moved them."""
        for spec, untrained in self._untrained():
            own = self.client_state[spec.name] if spec.personal else self.received(spec)
            self.value(spec).copy_(torch.where(untrained, own, self.value(spec)))

    def untrained(self, spec: BlockSpec) -> Tensor | None:
        """Bool [L, 1, ...] or [L, E, 1, ...], what the client does not train; None: it trains all."""
        trained = self.assignment.trains(spec)
        if trained is None:
            return None
        value = self.value(spec)
        if spec.expert and trained.shape[1] > 1:
            trained = trained[:, self.first_expert : self.first_expert + value.shape[1]]
        shape = (*trained.shape, *([1] * len(spec.item)))
        return ~torch.from_numpy(trained).view(shape).to(value.device)

    def _untrained(self) -> Iterator[tuple[BlockSpec, Tensor]]:
        """Trained blocks of which the client trains some, and bool [L, 1, ...] or [L, E, 1, ...], what it does not."""
        if self.assignment.all_trained:
            return
        for spec in self.blocks():
            if (untrained := self.untrained(spec)) is not None:
                yield spec, untrained
