"""Server: from the sums of a round to the new global state. Every rank computes the part that it holds.

Legend: L layers, E experts of this rank, O and I output and input width, Q stacked LoRA rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.aggregation.averaged_statistics import AveragedStatistics
from fedmoe_ds.aggregation.exact_sum import MOST_TERMS
from fedmoe_ds.aggregation.past_adapters import PastAdapters
from fedmoe_ds.aggregation.round_sums import RoundSums
from fedmoe_ds.aggregation.server_optimizer import ServerOptimizer
from fedmoe_ds.aggregation.sparse_changes import largest_changes
from fedmoe_ds.aggregation.weighted_average import Statistics
from fedmoe_ds.clients.client import Client, counts_of
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.devices.buffer import staleness
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.most_delay import most_delay
from fedmoe_ds.federation.privacy_account import check_budget
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.federation.sampling import buffered, participant_count
from fedmoe_ds.federation.traffic import Products
from fedmoe_ds.foundation import Foundation
from fedmoe_ds.methods import MeanContext, TensorRule
from fedmoe_ds.methods.client_drift import CONTROL, keeps_variables, server_step, variable_share
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec, base_block, control_block, lora_pairs, shared_blocks
from fedmoe_ds.model.install import base_weights, drawn_a

BASE = "base"


def check_terms(spec: RunSpec, clients: int) -> None:
    """Raises UserError where a round of so many clients adds up more of them than exact sums have room for."""
    share = spec.config.federation.participation
    drawn = buffered(spec.config, clients) or participant_count(clients, share)
    # Pooled data are one client's, however many are drawn.
    if spec.bitwise and not spec.method.pooled and drawn > MOST_TERMS:
        # Rounded down: the number that is named must be one that is taken.
        most = math.floor(MOST_TERMS / clients * 10_000) / 10_000
        raise UserError(
            f"federation.participation: {share}: {drawn} clients in a round, and bitwise sums hold {MOST_TERMS}; use "
            f"{most:.4f} or less, or execution.reproducible=fast"
        )


class Server:
    """Folds clients into sums and makes the next global state of them.

    Args:
        spec: method, adapter blocks and mode of the run.
        foundation: its frozen weights are written where the method moves products into them.
        clients: all clients of the federation.

    Attributes:
        averaged: the statistics of the method.
        moved: what the last step has moved into the frozen weights of this rank; what has no expert counts once per cluster.
    """

    def __init__(self, spec: RunSpec, foundation: Foundation, clients: Sequence[Client]) -> None:
        self.config, self.method, self.blocks = spec.config, spec.method, spec.blocks
        self.foundation, self.clients, self.exact = foundation, clients, spec.bitwise
        self.scale = self.config.adapters.alpha / self.config.adapters.rank
        check_terms(spec, len(clients))
        check_budget(spec.config, len(clients))
        # Over all clients, not those of a round: fixed weights, of which only the ratio counts in a mean.
        self.total_samples = int(counts_of(clients, "samples").sum())
        self.averaged = AveragedStatistics(spec.method.statistics())
        self.optimizer, self.past = ServerOptimizer(self.config.server), PastAdapters(most_delay(spec))
        self.keeps_variables, self.dual_step = keeps_variables(self.config.local), server_step(self.config.local)
        self.experts, self.first_expert = len(spec.expert_layout.held), spec.expert_layout.held.start
        self.moved = Products()

    def initial_state(self, device: torch.device) -> dict[str, Bank]:
        """The server's own state before the first round."""
        shared = shared_blocks(self.blocks)
        banks = self.optimizer.banks(shared, self.experts, device) | self.past.banks(shared, self.experts, device)
        banks |= self.averaged.banks(device)
        if self.keeps_variables:
            banks[CONTROL] = Bank(shared, self.experts, clients=1, device=device, with_grad=False)
        if self.method.absorbs:
            specs = [base_block(a, b) for a, b in lora_pairs(shared)]
            banks[BASE] = Bank(specs, self.experts, clients=1, device=device, with_grad=False)
            weights = base_weights(self.foundation, self.first_expert)
            for key, _, value in banks[BASE].items(self.first_expert):
                value.copy_(weights[key])
            banks[BASE].changed = set()  # the foundation's own weights need no checkpoint
        return banks

    def new_sums(self, participants: int, device: torch.device) -> RoundSums:
        """Empty sums for one round."""
        return RoundSums(self.blocks, self.experts, self.exact, participants if self.method.collects else None,
                         self.keeps_variables, device, self.method.weighing,
                         None if self.method.surveys else self.averaged)  # fmt: skip

    @torch.no_grad()
    def fold(self, sums: RoundSums, place: int, view: ClientView, update: ClientUpdate) -> None:
        """Add one finished client; `place` is its place among the round's participants."""
        share = update.client.samples / self.total_samples
        # Weights are per global expert; the sums of this rank are about its own experts.
        held = slice(self.first_expert, self.first_expert + self.experts)
        for spec in shared_blocks(view.blocks()):
            weights = self.method.weightings(spec, update, share)
            parts = [weight[:, held] if spec.expert else weight for weight in weights]
            tallies = self._tallies(spec, update, share)
            elements = self.method.element_weights(spec, view, update) if self.method.weighing.elements else None
            sums.add(place, spec, self._contribution(view, spec), parts, tallies, elements)
            if self.keeps_variables:
                moves = variable_share(self.config.local, share, len(self.clients))
                change = update.remembered[control_block(spec).name] - view.client_state[control_block(spec).name]
                sums.add_control(spec, change, np.full(parts[0].shape, moves))
        # At home alone, as what is dense: every rank of the cluster knows the update.
        if sums.keyed is not None and False in view.slots:
            self.averaged.add(sums.keyed, self.method.summary(update.client, update.observed))

    def _tallies(self, spec: BlockSpec, update: ClientUpdate, share: float) -> dict[str, np.ndarray]:
        if not self.method.weighing.tallies:
            return {}
        held = slice(self.first_expert, self.first_expert + self.experts)
        found = self.method.tally(spec, update, share)
        return {name: value[:, held] if spec.expert else value for name, value in found.items()}

    def _contribution(self, view: ClientView, spec: BlockSpec) -> Tensor:
        # An update that comes late by device time counts less, by the method's weights as much as any: FedBuff's sum over the
        # buffer of s(tau) times the change, divided by their weights and not by those times s(tau).
        factor = staleness(self.config.devices, view.assignment.delay or 0)
        if self.method.weighing.changes:
            # Rows that the client does not hold are zero in both: no change.
            change = _sent(view, spec) - view.received(spec)
            return change if factor == 1.0 else (factor * change.double()).float()
        mask, value = view.assignment.mask(spec, view.value(spec).device), _sent(view, spec)
        if view.past is not None:
            # The change since its own start, on the present adapters: it does not pull the mean back to where it started.
            # In float64 and rounded once; where the client changed nothing, the present bits.
            now = view.start.client(spec.name, 0).double()
            change = value.double() - view.received(spec).double()
            moved = (now + (change if factor == 1.0 else factor * change)).float()
            value = moved if mask is None else torch.where(mask, moved, value)
        if mask is None or self.method.missing_rows == "zero":
            return value
        # Rows that the client does not hold count as unchanged, so they do not pull the mean to zero.
        return torch.where(mask, value, view.start.client(spec.name, 0))

    @torch.no_grad()
    def step(
        self,
        sums: RoundSums,
        adapters: Bank,
        own: dict[str, Bank],
        round_index: int,
        participants: Sequence[Client] = (),
        context: MeanContext | None = None,
    ) -> None:
        """Replace the global adapters (and the server's own state) by those of the next round.

        `participants` are those of its plan; `context` is what the method is told of the round, None: it is not asked.
        """
        # Clones: the steps below overwrite the adapters that they are computed from.
        old = {spec.name: adapters.client(spec.name, 0).clone() for spec in shared_blocks(self.blocks)}
        self.past.keep(old, round_index, own)
        means, rate = sums.average(adapters, self.method.factor), self.method.server_rate(round_index, participants)
        if context is not None and (arrives := self.method.after_mean(context)) is not None:
            _let_arrive(means, sums, arrives, self.first_expert)
        # Before the adapters: FedVRA's step goes along the duals of this round.
        if sums.controls is not None:
            _move_controls(sums.controls, own[CONTROL])
        for spec in sums.statistics.specs:
            # Where no client had weight there is no mean; a momentum step there would move untrained experts.
            trained = sums.trained(spec.name)
            target = self._target(spec, means[spec.name], trained, own)
            new = self.optimizer.step(spec, old[spec.name], target, trained, own, rate)
            adapters.client(spec.name, 0).copy_(new)
        if sums.collection is not None:
            self.moved = self._combine(sums, adapters, own, old, round_index)
        if sums.keyed is not None:
            self.averaged.step(sums.keyed, own)
        if context is not None and self.method.overrides("renew"):
            self._renew(adapters, context)

    def _renew(self, adapters: Bank, context: MeanContext) -> None:
        for spec in self.blocks:
            if not (spec.expert or spec.personal or spec.trained):
                value = adapters.client(spec.name, 0)
                value.copy_(self.method.renew(spec, value.clone(), context))

    def _target(self, spec: BlockSpec, mean: Tensor, trained: Tensor, own: dict[str, Bank]) -> Tensor:
        """The mean, or where the duals lead from it."""
        # A step of zero would cost the mean's own bits where they are -0.0.
        if self.dual_step == 0:
            return mean
        where = trained.view(*trained.shape, *([1] * len(spec.item)))
        ahead = own[CONTROL].client(spec.name, 0).double() * self.dual_step
        return torch.where(where, mean.double() + ahead, mean.double()).float()

    def _combine(
        self, sums: RoundSums, adapters: Bank, own: dict[str, Bank], old: dict[str, Tensor], round_index: int
    ) -> Products:
        assert sums.collection is not None
        moved = Products()
        for a, b, place, pair in sums.collection.adapters(old, self.first_expert, round_index):
            # Drawn by address and not by a generator's state: every rank and every resumed start draws the same.
            fresh = drawn_a(self.config.seed, f"{pair.key}.lora_A", torch.Size(a.item), round_index).double()
            combined = self.method.combine(pair, fresh.to(pair.a_RI.device))
            # Combined in float64, kept in float32: the factors are rounded once per round.
            adapters.client(a.name, 0)[place] = combined.a_RI.float()
            adapters.client(b.name, 0)[place] = combined.b_OR.float()
            if combined.absorbed is not None:
                b_OQ, a_QI = combined.absorbed
                weight_OI = own[BASE].client(base_block(a, b).name, 0)[place]
                # Added in float64 and rounded once: the weight collects the products of many rounds.
                before_OI = weight_OI.clone()
                weight_OI.copy_(weight_OI.double() + self.scale * (b_OQ @ a_QI))
                own[BASE].note_change(f"{pair.key}.base", before_OI, weight_OI)
                if a.expert or self.first_expert == 0:
                    moved = moved.plus(b_OQ, a_QI)
        if BASE in own:
            self.load_base(own)
        return moved

    @torch.no_grad()
    def load_base(self, own: dict[str, Bank]) -> None:
        """Write the merged weights into the model (after a step, and after a checkpoint was read)."""
        if BASE not in own:
            return
        weights = base_weights(self.foundation, self.first_expert)
        for key, _, value in own[BASE].items(self.first_expert):
            weights[key].copy_(value)


def _sent(view: ClientView, spec: BlockSpec) -> Tensor:
    """What arrives of the client's values."""
    value, density = view.value(spec), view.assignment.density
    if density is None:
        return value
    if (mask := view.assignment.mask(spec, value.device)) is not None:
        # A share of the rows that the client holds; of the others nothing has changed.
        density = Fraction(str(density)) * Fraction(int(mask.expand(spec.item).sum()), math.prod(spec.item))
    return largest_changes(value, view.received(spec), len(spec.item), density)


def _let_arrive(means: dict[str, Tensor], sums: RoundSums, arrives: TensorRule, first_expert: int) -> None:
    """Pass every adapter tensor of which there is a mean through the rule, by its canonical name."""
    for spec in sums.statistics.specs:
        for place in sums.trained(spec.name).nonzero().tolist():
            # Global experts: the rule must not know who holds them.
            expert = first_expert + place[1] if spec.expert else None
            value = means[spec.name][tuple(place)]
            value.copy_(arrives(spec.key(spec.layers[place[0]], expert), value))


def _move_controls(changes: Statistics, control: Bank) -> None:
    """c <- c + sum_i share_i (c_i' - c_i): shares are of all clients, so the sum is taken as it is."""
    for spec in changes.specs:
        value = control.client(spec.name, 0)
        value.copy_(value.double() + changes.total(spec.name))
