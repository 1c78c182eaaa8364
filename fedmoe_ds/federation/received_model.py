"""Received model: the global adapters as the clients of a tier, or one client, receive them, for passes that train nothing.

The bank holds shared blocks as they are and one value of every personal block: a client's own, or the mean over a tier. It is
in the model only while `receiving` lasts. Evaluation goes this way, and so does whoever asks a finished run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.data import Sequences
from fedmoe_ds.methods import Method, RoundContext
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.batch import Rows
from fedmoe_ds.model.forward import AdaptedModel, PassResult
from fedmoe_ds.model.moe_layer import RESCALER


class ReceivedModel:
    """Puts a tier's or a client's adapters into the model, and runs passes with them.

    Args:
        method: it says what a member of a tier is told.
        model: with the adapters of clients in flight, or with none.
        bank: the global adapters (one client slot, no gradients).
    """

    def __init__(self, method: Method, model: AdaptedModel, bank: Bank) -> None:
        self.method, self.model, self.execution, self.bank = method, model, model.execution, bank

    def assigned(self, member: Client, personal: Personal, plain: bool, own: bool = True) -> Assignment:
        """What a client is told in evaluation; `plain`: all LoRA rows and no rescaler, as before the first round. Not `own`: as
        any client of its tier is told of whom nothing is known."""
        names = [name for name, spec in personal.specs.items() if not spec.expert]
        ((_, dense),) = personal.visit([member.index], names)
        # A tier's model is nobody's own: what is known of one of its clients says nothing about it.
        known = personal.memories.get(member.index, {}) if self.method.personal_models and own and not plain else {}
        how = self.method.assign(member, RoundContext(0, dense, memory=known))
        # The foundation reads every view that its members do: with adapters that add nothing they are it.
        members_MLE = None if how.views is None else how.members_MLE
        return how if not plain else replace(how, rows_R=None, rescale=None, allowed_LE=None, members_MLE=members_MLE)

    def load_mean(self, members: Sequence[Client], personal: Personal, plain: bool = False) -> None:
        """Set the bank's personal blocks to their mean over clients. Collective, as are `load_own` and `assigned`."""
        for name, mean in personal.means([client.index for client in members], self.own_blocks(personal)).items():
            self.bank.client(name, 0).copy_(torch.ones_like(mean) if plain and name == RESCALER else mean)

    def load_own(self, client: Client, personal: Personal) -> None:
        """Set them to those of one client."""
        for _, own in personal.visit([client.index], self.own_blocks(personal)):
            for name, value in own.items():
                self.bank.client(name, 0).copy_(value)

    def own_blocks(self, personal: Personal) -> list[str]:
        """The blocks of the model that are personal."""
        return [name for name in personal.specs if name in self.bank]

    @contextmanager
    def receiving(self, how: Assignment) -> Iterator[None]:
        """The model with the global adapters as a client with this assignment receives them."""
        trained_bank, trained_pool = self.execution.bank, self.execution.pool
        self.execution.bank = self._received(how)
        # One slot and one client on every rank: each rank runs batches of its own, with the same adapters.
        self.execution.pool = replace(trained_pool, wave_clients=trained_pool.ep_size, merge=False, shared=True)
        try:
            yield
        finally:
            self.execution.bank, self.execution.pool = trained_bank, trained_pool

    def _received(self, how: Assignment) -> Bank:
        # All rows: the global bank itself, without a copy.
        if how.rows_R is None:
            return self.bank
        specs = list(self.bank.specs.values())
        bank = Bank(specs, self.bank.experts, clients=1, device=self.bank.device, with_grad=False)
        for spec in specs:
            value, mask = self.bank.client(spec.name, 0), how.mask(spec, self.bank.device)
            bank.client(spec.name, 0).copy_(value if mask is None else torch.where(mask, value, 0.0))
        return bank

    def run_pass(self, parts: list[Sequences], how: Assignment) -> PassResult:
        """One pass over samples in parts, inside `receiving`; without any, the stand-in row that takes part in the
        all-to-alls. Where the assignment has members, one pass for each of them, and the mean of their logits."""
        # Rows of their own for every part: in bitwise mode each is attended to at its own length, whoever is beside it.
        batches = [self.model.batch([self._rows(part, how, member) for part in parts]) for member in range(how.models)]
        return self.model.ensemble(batches, 0, None if how.rescale is None else [how.rescale])

    def _rows(self, part: Sequences, how: Assignment, member: int) -> Rows:
        images, view = self.model.foundation.images, how.view_of(member)
        return Rows.of(0, how.cap, part, range(len(part)), how.allowed_by(member), images, view=view)
