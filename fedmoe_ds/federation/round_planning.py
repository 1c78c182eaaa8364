"""Round planning: who takes part in a round and what each is told, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.checkpoint.memories import Memory
from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.clients.batches import step_count
from fedmoe_ds.clients.client import Client
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.privacy_account import spent_by
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.federation.schedule import participants_per_round
from fedmoe_ds.federation.traffic import Traffic
from fedmoe_ds.federation.virtual_clock import VirtualClock
from fedmoe_ds.methods import Load, PlanContext, RoundPlan


class RoundPlanning:
    """Asks the method for the plan of a round, once.

    Args:
        spec: method and sampling of the run.
        clients: all clients.
        personal: what is known of them.
        drawn: those that sampling gives for a round.
        labels: how many units of each label they were dealt, asked for by methods that want to know.
        clock: that of simulated devices, which asks for the plan when it has asked the clients.
    """

    def __init__(
        self,
        spec: RunSpec,
        clients: Sequence[Client],
        personal: Personal,
        drawn: Callable[[int], list[Client]],
        labels: Callable[[], NDArray[np.int64]],
        clock: VirtualClock | None = None,
    ) -> None:
        self.spec, self.clients, self.personal, self.drawn, self.labels = spec, clients, personal, drawn, labels
        self.plans = spec.method.overrides("plan")
        self.clock = clock if self.plans else None
        if self.clock is not None:
            self.clock.planned = self._asked
        self._round, self._plan, self._made = 0, RoundPlan(()), RoundPlan(())

    def of(self, round_index: int) -> RoundPlan:
        """The plan of a round. Its memories change when it ends, so one that is resumed in its middle has the same.

        Raises:
            UserError: the method plans with clients that there are not, twice with one, or with more than are drawn.
        """
        if not self.plans:
            return RoundPlan(self.drawn(round_index))
        if round_index != self._round:
            drawn = self.drawn(round_index)
            plan = self._make(round_index, drawn) if self.clock is None else self._of_those_who_arrive(drawn)
            self._round, self._plan = round_index, plan
        return self._plan

    def _asked(self, round_index: int, asked: list[Client]) -> Sequence[Client]:
        """Whom the method plans with, of those whom the clock has asked."""
        self._made = self._make(round_index, asked)
        return self._made.participants

    def _of_those_who_arrive(self, arrived: Sequence[Client]) -> RoundPlan:
        """The plan that was made when they were asked; those who are lost in the round are told nothing any more."""
        there = {client.index for client in arrived}
        return replace(self._made, participants=[client for client in self._made.participants if client.index in there])

    def _make(self, round_index: int, drawn: Sequence[Client]) -> RoundPlan:
        context = PlanContext(round_index, drawn, self.clients, self.personal.memories, self._load, self.labels)
        plan = self.spec.method.plan(context)
        self._check(plan, len(drawn))
        # Canonical order: a client's place among the participants is no matter of the method's loops.
        return replace(plan, participants=sorted(plan.participants, key=lambda client: client.index))

    def part(self, client: int, round_index: int) -> Any:
        """A client's part of the round's plan, or None."""
        return self.of(round_index).parts.get(client) if self.plans else None

    def fields(self, round_index: int) -> dict[str, float]:
        """What the round's record says of its plan, and of what all rounds up to it have spent of privacy."""
        variation = self.of(round_index).load_variation if self.plans else None
        spent = spent_by(self.spec.config, len(self.clients), round_index)
        return spent | ({} if variation is None else {"load_variation": variation})

    def memory(self, client: int) -> Memory:
        """What the server knows of a client; empty before it is trained."""
        known: Mapping[int, Memory] = self.personal.memories
        return known.get(client, {})

    @cached_property
    def _traffic(self) -> Traffic:
        return Traffic(self.spec, self.clients, participants_per_round(self.spec, len(self.clients)))

    def _load(self, client: Client) -> Load:
        local = self.spec.config.local
        _, up = self._traffic.of(client.rank)
        return Load(step_count(client, local), self.spec.cost.client(client, local), up)

    def _check(self, plan: RoundPlan, drawn: int) -> None:
        indices = [client.index for client in plan.participants]
        name = self.spec.config.method.name
        if len(set(indices)) != len(indices) or not all(0 <= index < len(self.clients) for index in indices):
            raise UserError(f"method {name}: plan names {indices}; each participant once, by its own index")
        # Slots, and clusters that hold any, are made for as many clients as are drawn.
        if len(indices) > drawn:
            raise UserError(f"method {name}: plan has {len(indices)} participants; at most {drawn} are drawn per round")
        self._check_spending(plan, indices)

    def _check_spending(self, plan: RoundPlan, indices: list[int]) -> None:
        """The record has a row for everybody who spends something: one who takes part and is not there would be lost."""
        method, name, spent = self.spec.method, self.spec.config.method.name, plan.spending
        spenders = sorted(indices) if method.accounts else []
        if sorted(spent) != spenders:
            raise UserError(f"method {name}: plan says what {sorted(spent)} spend, and accounts for {spenders}; let both agree")
        for client, one in sorted(spent.items()):
            if not all(math.isfinite(value) and value >= 0 for value in (one.compute_s, one.up_s, one.joules)):
                raise UserError(f"method {name}: plan says that client {client} spends {one}; give finite numbers from 0 on")
