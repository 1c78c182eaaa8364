"""Local training: that of a wave, the clients in flight on one cluster, fused into common passes.

Legend: C client slots of the wave, P ranks of the cluster, H home slots of the rank with most, L layers, E experts of the
model, N gradient norms.

Every rank of a cluster runs the same sequence of passes and collectives, because all of them are derived from sizes that every
rank knows; a rank without rows joins with a stand-in row that is not routed. A pass holds the rows of all clients in flight,
unless bits are promised and the kernels do not keep rows apart (`RunSpec.shares_passes`): then those of one per rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedmoe_ds.clients.batches import Packing, local_batches
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.client_work import ClientWork, asked_of, first_trained, read_losses
from fedmoe_ds.clients.fused_step import ClientStep
from fedmoe_ds.clients.gradient_probe import GradientProbe
from fedmoe_ds.clients.hooks import LocalTrainingHooks, ReadClient
from fedmoe_ds.clients.in_training import in_training
from fedmoe_ds.clients.lr_schedule import round_rate
from fedmoe_ds.clients.optimizer import ClientOptimizer, global_norms
from fedmoe_ds.clients.out_of_memory import is_out_of_memory
from fedmoe_ds.clients.pass_limits import PassLimits, shortage
from fedmoe_ds.clients.teaching import OnePass, Teaching
from fedmoe_ds.clients.update import ClientUpdate, Counts, Gatherer
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.distributed.phase_timer import PhaseTimer
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.forward import AdaptedModel, segment_sums
from fedmoe_ds.model.objective import add_sums
from fedmoe_ds.model.pass_context import InTraining

Wave = list[list[Client]]
"""One wave of one cluster: the clients at home on each of its ranks."""


class WaveTrainer:
    """Trains waves on one rank with one set of buffers, allocated once: memory does not grow with the number of clients.

    Args:
        model: the bank of its execution is trained here.
        layers: indices of the layers with experts.
        local: local training settings.
        micro_batch_size: sequences of a client in one pass; None for all of a step.
        seed: run seed.
        hooks: what the method prescribes per client.
        rounds: of the run; a learning rate scheduled across rounds needs it.
        packing: where samples are packed, what cuts a step into passes.
        moments_on_host: whether a GPU's clients keep their optimizer state in the host's memory.
    """

    def __init__(
        self,
        model: AdaptedModel,
        layers: list[int],
        local: LocalConfig,
        micro_batch_size: int | None,
        seed: int,
        hooks: LocalTrainingHooks | None = None,
        rounds: int = 1,
        packing: Packing | None = None,
        moments_on_host: bool = False,
    ) -> None:
        assert model.packing == (packing is not None)
        self.model, self.execution, self.hooks = model, model.execution, hooks or LocalTrainingHooks()
        self.local, self.micro, self.seed, self.rounds, self.packing = local, micro_batch_size, seed, rounds, packing
        self.bank, self.pool, self.shard = self.execution.bank, self.execution.pool, self.execution.pool.shard
        # The global id of this rank's first expert: random rounding is addressed by it, not by the place in the bank.
        self.first_expert = self.shard * self.pool.local_experts
        self.optimizer = ClientOptimizer(self.bank, local, seed, self.first_expert, moments_on_host)
        self.layers = layers
        self.timer = PhaseTimer()  # phases: set_up, passes, optimizer, reports

    def train(
        self,
        wave: Wave,
        round_index: int,
        start: Bank,
        personal: Callable[[int], dict[str, Tensor]],
        read: ReadClient,
        limits: PassLimits = PassLimits(),  # noqa: B008  (frozen)
    ) -> list[tuple[ClientView, ClientUpdate]]:
        """Train one wave from the global adapters `start` and each client's personal state.

        Args:
            wave: clients at home on each rank of the cluster.
            personal: by client, its personal blocks [L, ...]; asked for the clients of the wave.
            read: training sequences of a client; called for clients at home here only.
            limits: of the passes, the same on every rank of the cluster.
        Returns:
            For every client a view of what it trained (valid until the next wave), and its update.
        Raises:
            OutOfMemory: a pass did not fit. Nothing of the pass is held, and nothing of this wave counts: it may be trained
                again in smaller passes, or without that client.
        """
        began = time.monotonic()
        self.timer.resume()
        works = [
            [self._work(client, (shard, slot), round_index, limits) for slot, client in enumerate(home)]
            for shard, home in enumerate(wave)
        ]
        for work in works[self.shard]:
            work.data = read(work.client.index)
        views = [[self._view(work, shard, start, personal) for work in home] for shard, home in enumerate(works)]
        self._load(works, views, start)
        self.timer.lap("set_up")
        counts = Counts(self.pool.home_clients, len(self.layers), self.pool.num_experts, self.bank.device)
        probe = GradientProbe(works, self.execution, self.layers, self.hooks.reduce_probe)
        # The steps of the longest client, on every rank: where a rank's own have finished, rows of others still arrive.
        try:
            cut = partial(limits.cut, configured=self.micro, packing=self.packing)
            probe.run(lambda step, probing, counts: self._forward_backward(step, probing, counts, limits), cut)
            # A probe may have settled which layers its client trains.
            views = [
                [replace(v, assignment=w.assignment) for w, v in zip(*home, strict=True)]
                for home in zip(works, views, strict=True)
            ]
            steps = max((len(w.batches) for home in works for w in home), default=0)
            if self.hooks.teaches:
                Teaching(self.model, self._factors).run(steps, lambda step, run: self._each_pass(step, works, limits, run))
            for step in range(steps):
                self._forward_backward(step, works, counts, limits)
                probe.look(step)
                self.timer.lap("passes")
                self._optimize(step, round_index, works, views)
                self.timer.lap("optimizer")
        finally:
            # Observers and scale factors belong to this wave; an evaluation that follows must not see them, nor does one after
            # a wave that did not fit into memory: it may have been the round's last.
            self.execution.wave = InTraining()
        read_losses(works[self.shard])
        updates = self._updates(works, views, counts, time.monotonic() - began)
        probe.tell(updates)
        self.timer.lap("reports")
        return [(view, update) for (_, view), update in zip(_flat(works, views), updates, strict=True)]

    def round_rate(self, round_index: int) -> float:
        """What the learning rates of a round's clients start from."""
        return round_rate(self.local, round_index, self.rounds)

    def _work(self, client: Client, place: tuple[int, int], round_index: int, limits: PassLimits) -> ClientWork:
        given = self.hooks.batches
        assignment = self.hooks.assign(client, round_index)
        own = (client, self.local, self.seed, round_index, assignment.samples)
        batches = local_batches(*own) if given is None else given(client, round_index)
        cut = limits.cut(client.index, batches, self.micro, self.packing)
        return ClientWork(client, *place, assignment, batches, *cut, round_index, self.round_rate(round_index))

    def _view(self, work: ClientWork, shard: int, start: Bank, personal: Callable[[int], dict[str, Tensor]]) -> ClientView:
        slots = {True: self.pool.wave_slot(shard, work.slot)}
        if shard == self.shard:
            slots[False] = work.slot
        # On the CPU for all clients; here it meets tensors of the device.
        state = {name: value.to(self.bank.device) for name, value in personal(work.client.index).items()}
        past = self.hooks.past(work.assignment.delay, work.round_index)
        view = ClientView(work.client, work.assignment, self.bank, start, slots, state, past, self.first_expert)
        return view if self.hooks.start is None else replace(view, starts=self.hooks.start(view))

    @torch.no_grad()
    def _load(self, works: list[list[ClientWork]], views: list[list[ClientView]], start: Bank) -> None:
        # A step clears what it has used; what a wave that ran out of memory has left behind is cleared here.
        self.bank.zero_grad()
        self.optimizer.reset()
        for name, spec in self.bank.specs.items():
            if not spec.personal:
                self.bank.broadcast(name).copy_(start.broadcast(name).expand_as(self.bank.broadcast(name)))
        for view in (view for home in views for view in home):
            for spec in view.blocks(trained=False):
                if spec.personal:
                    view.value(spec).copy_(view.client_state[spec.name])
                elif view.starts_elsewhere(spec):
                    view.value(spec).copy_(view.received(spec))
        self.execution.wave = in_training(works, self.shard, self.hooks, self.pool, self.bank.device)

    def _forward_backward(self, step: int, works: list[list[ClientWork]], counts: Counts, limits: PassLimits) -> None:
        def run(here: list[ClientWork], at: int, micro: int, slot: int | None, first: int) -> None:
            self._run(here, at, micro, slot, first, counts)

        self._each_pass(step, works, limits, run)

    def _each_pass(self, step: int, works: list[list[ClientWork]], limits: PassLimits, run: OnePass) -> None:
        """All passes of one local step, in an order that every rank of the cluster knows."""
        # Unless they share passes, the same slot on all ranks at a time: a rank's rows are then one client's (see `make_plan`).
        merge = self.pool.merge
        for slots in limits.groups(step, works) if merge else [[slot] for slot in range(self.pool.home_clients)]:
            here = [work for home in works for work in home if work.slot in slots]
            for micro in range(max((w.micro_batches(step) for w in here), default=0)):
                self._pass([w for w in here if micro < w.micro_batches(step)], step, micro, None if merge else slots[0], run)

    def _pass(self, everyone: list[ClientWork], step: int, micro: int, slot: int | None, run: OnePass) -> None:
        """One pass; `everyone` are the clients in it on all ranks of the cluster."""
        try:
            works = [work for work in everyone if work.data is not None]
            run(works, step, micro, slot, first_trained(everyone, self.bank))
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Out here nothing refers to the error, whose traceback holds the pass with its graph; the router's losses hold it, too.
        self.execution.current = None
        raise shortage(everyone, step, micro)

    def _run(self, works: list[ClientWork], step: int, micro: int, slot: int | None, first_layer: int, counts: Counts) -> None:
        images = self.model.foundation.images
        rows = [work.rows(step, micro, images) for work in works]
        batch = self.model.batch(rows)
        whole = [work.step_sums(step, images) for work in works]
        # Clients' losses are added, not averaged: parameters are disjoint, so each gradient is that of its client's mean.
        asked = asked_of(works, rows, (step, micro), [targets for targets, _ in whole], self.execution.wave.objectives)
        found = self.model.loss(batch, slot, [targets for targets, _ in whole], self._factors(works), first_layer, asked)
        loss = found.sum
        for work, part, own, (targets, tokens) in zip(works, rows, segment_sums(found.nll_N, batch), whole, strict=True):
            # Read at the end of the wave: every number that is read here makes the processor wait for the device.
            # Of members the mean: what is minimised is their sum, what is recorded compares with the loss of one model.
            work.on_device.append((step, own / (targets * work.assignment.models)))
            work.tokens += part.tokens
            work.targets += part.targets
            # Auxiliary losses are means over the rows of a pass; a micro-batch counts by its share of the step's tokens.
            loss = loss + self._auxiliary(found.run.losses, work.slot) * (part.tokens / tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        counts.add(found.run, self.layers)
        for work in works:
            if not work.probing:
                work.observe(found.run.observed, self.layers, self.hooks.observes)
                work.take_offers(found.run, self.layers)
        for work, sums in zip(works, found.observed, strict=False):
            add_sums(work.summed, sums)

    def _factors(self, works: list[ClientWork]) -> list[float] | None:
        factors = {work.slot: work.assignment.rescale for work in works if work.assignment.rescale is not None}
        return [factors.get(slot, 1.0) for slot in range(self.pool.home_clients)] if factors else None

    def _auxiliary(self, losses: dict[int, dict[int, Tensor]], slot: int) -> Tensor | float:
        found = [by_slot[slot] for by_slot in losses.values()]
        return torch.stack(found).mean() if found else 0.0

    def _optimize(self, step: int, round_index: int, works: list[list[ClientWork]], views: list[list[ClientView]]) -> None:
        """One optimizer step for every client of the wave that has not finished."""
        training = [(work, view) for work, view in _flat(works, views) if step < len(work.batches)]
        self.hooks.complete(training, self.pool)
        for _, view in training:
            # Before the norms are taken: clipping acts on the corrected gradient (see `client_drift`).
            for adjust in self.hooks.adjust:
                adjust(view)
            # Last: what a client does not train has no gradient, whatever a correction has made of it.
            view.clear_untrained()
        # A collective: all ranks call it in every step, also those whose clients have finished.
        norms_C = global_norms(self.bank, self.pool) if self.local.clip is not None else None
        steps = [
            ClientStep(view.slots, step + 1, work.rate(self.local, step), (round_index, work.client.index))
            for work, view in training
        ]
        self.optimizer.step_all(steps, norms_C)
        for _, view in training:
            view.restore_untrained()
            if self.hooks.project is not None:
                self.hooks.project(view)

    def _updates(
        self, works: list[list[ClientWork]], views: list[list[ClientView]], counts: Counts, seconds: float
    ) -> list[ClientUpdate]:
        gatherer, mine, updates = Gatherer(self.pool, self.bank.device), works[self.shard], list[ClientUpdate]()
        counted_CN = gatherer.numbers({work.slot: (work.tokens, work.targets) for work in mine})
        counts_CLE, trained_CLE = gatherer.home(counts.routed), gatherer.home(counts.trained)
        observed = gatherer.observations({w.slot: w.observed for w in mine}, self.hooks.observes, len(self.layers))
        summed = gatherer.sums({w.slot: w.summed for w in mine}, self.hooks.sums)
        measured = gatherer.measures([view for home in views for view in home], self.hooks.measure)
        finite_C = gatherer.finite(self.bank, {work.slot: work.losses for work in mine})
        losses_C = gatherer.losses({work.slot: work.losses for work in mine if work.losses}) if self.hooks.losses else None
        for i, (work, view) in enumerate(_flat(works, views)):
            place, rates = view.slots[True], tuple(work.rate(self.local, step) for step in range(len(work.batches)))
            update = ClientUpdate(
                work.client,
                place,
                work.home,
                len(work.batches),
                counted_CN[place][0],
                counts_CLE[place].numpy(),
                finite_C[place],
                (work.losses[0], work.losses[-1]) if work.losses else None,
                seconds,
                work.assignment,
                trained_CLE[place].numpy() if counts.selective else counts_CLE[place].numpy(),
                {name: values_C[place].numpy() for name, values_C in (observed | summed).items()},
                measured[i],
                {name: value for remember in self.hooks.remember for name, value in remember(view, sum(rates)).items()},
                counted_CN[place][1],
                rates=rates,
                shared_losses=None if losses_C is None else losses_C[place],
            )
            updates.append(update)
        return updates


def _flat(works: list[list[ClientWork]], views: list[list[ClientView]]) -> list[tuple[ClientWork, ClientView]]:
    return [pair for home in zip(works, views, strict=True) for pair in zip(*home, strict=True)]
