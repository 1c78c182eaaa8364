"""Rounds: the loop of a run.

    1 sample clients   2 schedule them to clusters and waves   3 local training: update -> postprocessors -> this rank's sums
    4 add up the sums of all ranks   5 server step   6 evaluate per budget tier   7 report, checkpoint

Everything here runs on every rank in the same order; rank 0 also talks to the user. A stop request ends the round after the
wave that is running: what the finished clients added up to is saved, and the next start continues with the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from fedmoe_ds.aggregation.postprocessors import OK, Postprocessor, keep_out_non_finite, postprocess
from fedmoe_ds.aggregation.round_sums import RoundSums
from fedmoe_ds.checkpoint.digest import global_digest
from fedmoe_ds.checkpoint.memories import checked
from fedmoe_ds.checkpoint.state import PartialRound
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.local_training import Wave
from fedmoe_ds.clients.out_of_memory import OutOfMemory, release_memory
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.phase_timer import PhaseTimer
from fedmoe_ds.errors import LostError
from fedmoe_ds.federation import client_record
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.planned_spending import settle_planned
from fedmoe_ds.federation.round_checkpoints import RoundCheckpoints
from fedmoe_ds.federation.round_messages import meet, share_counts, share_products, stop_agreed, stop_requested_here, unweighted
from fedmoe_ds.federation.schedule import schedule
from fedmoe_ds.federation.server_training import epochs_of, train_server
from fedmoe_ds.federation.shortage import for_next_start, make_room
from fedmoe_ds.federation.survey import survey
from fedmoe_ds.federation.virtual_clock import Settled, spent_fields
from fedmoe_ds.methods import MeanContext


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `interrupted` names the signal, or is None after the last round."""

    digest: str
    interrupted: str | None


@dataclass
class _Round:
    """One round at work.

    Attributes:
        chosen: its clients in canonical order.
        partial, sums: what is known of it so far, from an earlier start or this one.
        waves: those of this rank's cluster.
        clients: who is trained, by cluster.
        busiest: how many waves the cluster with most of them has.
        weighted: by block, in how many tensors of all ranks the weights do not sum to zero (after `share_counts`).
        settled: what it was on simulated devices, once it has ended; None without any.
        server: what the record says of the server's own training.
    """

    index: int
    chosen: list[Client]
    partial: PartialRound
    sums: RoundSums
    waves: list[Wave] = field(default_factory=list)
    clients: list[list[int]] = field(default_factory=list)
    busiest: int = 0
    weighted: dict[str, int] = field(default_factory=dict)
    settled: Settled | None = None
    server: dict[str, float] = field(default_factory=dict)

    @cached_property
    def places(self) -> dict[int, int]:
        """Where each client stands among the chosen ones."""
        # Sums are exact in any order, but methods that collect updates need places that no schedule decides.
        return {client.index: place for place, client in enumerate(self.chosen)}

    @property
    def unfinished(self) -> bool:
        """Whether some of its clients have not been trained, on any rank (after `meet`)."""
        return any(client.index not in self.partial.done for client in self.chosen)


class Federation:
    """One run, built by `fedmoe_ds.federation.build.load_parts`."""

    def __init__(self, parts: Parts, journal: Journal) -> None:
        self.parts, self.journal = parts, journal
        self.state = parts.state
        self.checkpoints = RoundCheckpoints(parts, journal)
        self.timer = PhaseTimer()
        self.postprocessors: list[Postprocessor] = [keep_out_non_finite]

    def run(self) -> Outcome:
        """Train the remaining rounds; at the end every checkpoint is on disk. Raises UserError when one cannot be written."""
        try:
            outcome = self._rounds()
            self.checkpoints.finish()
        except BaseException:
            self.checkpoints.drop()
            raise
        return outcome

    def _rounds(self) -> Outcome:
        config = self.parts.config
        if self.state.round == 0 and self.state.partial is None:
            if stop_agreed(self.parts, self.journal):  # asked while the model and the data were loaded
                self.checkpoints.save()
                return self._stopped()
            if warmed := train_server(self.parts, 0):
                self.journal.event("warm_up", **warmed)
            self._evaluate(0)
            self.journal.settle()
        for round_index in range(self.state.round + 1, config.federation.rounds + 1):
            if self._round(round_index):
                return self._stopped()
            # Also asked after the last round: what could not be recorded is told before there is a checkpoint of it.
            stopped = stop_agreed(self.parts, self.journal) and round_index < config.federation.rounds
            self.checkpoints.round_done(round_index, stopped or self._is_due(round_index, config.checkpoint.every))
            if stopped:
                return self._stopped()
        return Outcome(self._digest(), None)

    def _stopped(self) -> Outcome:
        return Outcome(self._digest(), self.parts.stop.name or "a signal on another rank")

    def _round(self, round_index: int) -> bool:
        """One round, in the steps of docs/design.md; True when it was interrupted (and saved unfinished)."""
        self.timer = PhaseTimer()
        activity.take()  # collectives are counted per round
        with self.timer.phase("schedule", round_index):
            self.journal.limits(round_index, self.parts.skipped.limits(round_index))
            work = self._sample(round_index)  # 1. Which clients take part.
            self._schedule(work)  # 2. Which cluster trains them, in which wave.
        with self.timer.phase("train"):
            self._train(work)  # 3. Local training, and every update into this rank's part of the sums.
        with self.timer.phase("aggregate"):
            # Slower clusters are waited for here, so that the checkpoint below is not charged with them.
            stopped = meet(self.parts, work.partial)
        # That of the round before: its figures and those of this round are never both at risk.
        self.checkpoints.finish()
        with self.timer.phase("aggregate"):
            work.sums.reduce(self.parts.topology)  # 4. The sums of all clusters.
            self.state.personal.share(self.parts.runtime, self.parts.topology.control)
            work.weighted = share_counts(self.parts, work.partial, work.sums)
            self.journal.limits(round_index + 1, self.parts.skipped.limits(round_index + 1))
        if stopped or work.unfinished:
            self._keep(work)
            return True
        with self.timer.phase("aggregate"):
            self._step(work)  # 5. The new global state.
        with self.timer.phase("evaluate"):
            if self._is_due(round_index, self.parts.config.evaluation.every):
                self._evaluate(round_index)  # 6. The new global state at every budget tier.
        self._report(work)  # 7. What all this was, for the user; the caller keeps it for the next start.
        return False

    def _is_due(self, round_index: int, every: int) -> bool:
        """Whether what happens every so many rounds, and after the last one, happens after this one."""
        return round_index == self.parts.config.federation.rounds or round_index % every == 0

    def _sample(self, round_index: int) -> _Round:
        """The round's clients. Those that an earlier start finished, or that a start found no memory for, are done."""
        parts = self.parts
        chosen = list(parts.planning.of(round_index).participants)
        partial = self.state.partial or PartialRound()
        sums = self.state.sums or parts.new_sums(round_index)
        # A checkpoint within the round must not take these for those of a round that begins.
        self.state.partial, self.state.sums = None, None
        absent = parts.skipped.of(round_index)
        partial.done |= {c.index: client_record.absent(c) for c in chosen if c.index in absent}
        partial.known = frozenset(partial.done)
        return _Round(round_index, chosen, partial, sums)

    def _schedule(self, work: _Round) -> None:
        parts, config = self.parts, self.parts.config
        waiting = [client for client in work.chosen if client.index not in work.partial.done]
        clusters = parts.topology.layout.clusters
        plan = schedule(waiting, parts.spec.cost, config.local, clusters, config.topology.ep_size, parts.in_flight)
        work.waves, work.busiest = plan[parts.topology.cluster], max(len(waves) for waves in plan)
        work.clients = [[client.index for wave in waves for home in wave for client in home] for waves in plan]
        self.journal.start_round(work.index, config.federation.rounds, len(work.waves))

    def _train(self, work: _Round) -> None:
        """Train this cluster's waves, and fold their updates into the sums. A stop request ends it after a wave."""
        parts = self.parts
        self.state.personal.fetch(work.clients, parts.runtime)
        parts.trainer.timer = PhaseTimer()
        for number in range(1, len(work.waves) + 1):
            trained = self._train_wave(work, work.waves[number - 1 :])
            for view, update in trained:
                self._fold(view, update, work)
            tokens = sum(update.tokens for _, update in trained)
            seconds = max((update.seconds for _, update in trained), default=0.0)
            self.journal.wave_done(number, len(work.waves), tokens * parts.topology.layout.clusters, seconds)
            if stop_requested_here(parts):
                return

    def _train_wave(self, work: _Round, waves: list[Wave]) -> list[tuple[ClientView, ClientUpdate]]:
        """Train the first of the waves that are left. Where a pass does not fit into memory, it begins again with smaller ones,
        and at last without the client that does not fit alone.

        Raises:
            LostError: that happened in the middle of the cluster's all-to-all, where the peers cannot be called back. The next
                start does it.
        """
        parts, state, wave = self.parts, self.state, waves[0]
        while any(wave):
            limits = parts.skipped.limits(work.index)
            try:
                return parts.trainer.train(
                    wave, work.index, state.adapters, state.personal.state, parts.training_data.train, limits
                )
            except OutOfMemory as error:
                # Without its traceback, which would hold the wave.
                shortage = error.with_traceback(None)
            waiting = [client for one in [wave, *waves[1:]] for home in one for client in home]
            way, lost = make_room(parts.skipped, work.index, shortage, waiting, parts.config)
            if parts.topology.layout.ep_size > 1:
                where = f"rank {parts.runtime.rank} on {parts.topology.hosts[parts.runtime.rank]}, round {work.index}"
                raise LostError(f"{where}: {for_next_start(shortage, way)}")
            self.journal.note(f"round {work.index}: {shortage}; {way}")
            if lost is not None:
                work.partial.done[lost.index] = client_record.absent(lost)
                wave = [[client for client in home if client.index != lost.index] for home in wave]
            release_memory()
        return []

    @torch.no_grad()
    def _fold(self, view: ClientView, update: ClientUpdate, work: _Round) -> None:
        """Postprocess one update, fold it into the sums, keep what its client remembers, and book its row of metrics."""
        parts, partial, shard = self.parts, work.partial, self.parts.topology.shard
        at_home = update.home == shard
        update.plan = parts.planning.part(update.client.index, work.index)
        update.memory = parts.planning.memory(update.client.index)
        status = postprocess(self.postprocessors, view, update)
        if status == OK:
            parts.server.fold(work.sums, work.places[update.client.index], view, update)
            self._remember(view, update, at_home)
            if at_home and (shapes := parts.spec.method.memory()):
                known = checked(parts.config.method.name, shapes, parts.spec.method.memorise(update))
                partial.memories[update.client.index] = known
        # Counts have been added up within the cluster: one of its ranks speaks for all.
        if shard == 0:
            tier = partial.activation.setdefault(update.client.tier, np.zeros_like(update.counts_LE))
            tier += update.counts_LE
        if at_home:
            rank = update.assignment.rank(parts.config.adapters.rank)
            spent = parts.spec.cost.counted(update, parts.config.adapters.rank, parts.spec.expert_layout.layers)
            report = client_record.trained(update, status, spent, self.state.personal)
            sent = {} if parts.clock is None else parts.clock.traffic.fields(update.assignment, rank)
            partial.done[update.client.index] = report | sent

    def _remember(self, view: ClientView, update: ClientUpdate, at_home: bool) -> None:
        """Store the client's personal blocks, control or dual variables, and (at home) what the method wants to know again."""
        index, personal = update.client.index, self.state.personal
        for spec in view.blocks():
            if spec.personal:
                personal.store(index, spec.name, view.value(spec))
        for name, value in update.remembered.items():
            personal.store(index, name, value)
        if at_home:
            for name, value in self.parts.spec.method.remember(update).items():
                personal.store(index, name, value)

    def _keep(self, work: _Round) -> None:
        """Save a round that is not finished: the next start goes on with its other clients."""
        work.partial.seconds += self.timer.total()
        self.state.partial, self.state.sums = work.partial, work.sums
        self.checkpoints.save()

    def _step(self, work: _Round) -> None:
        """Make the next global state of the sums."""
        parts, partial = self.parts, work.partial
        kept = unweighted(parts, work.chosen, work.index, work.weighted)
        self.journal.not_averaged(work.index, partial.done.values(), kept)
        context = MeanContext(work.index, partial.memories, partial.counts_LE(parts.counts_shape), partial.tokens)
        parts.server.step(work.sums, self.state.adapters, self.state.server, work.index, work.chosen, context)
        work.server = train_server(parts, work.index)
        survey(parts, work.index, [c for c in work.chosen if partial.done[c.index]["status"] == OK])
        self.state.utilisation_LE = context.counts_LE
        if parts.clock is not None:
            work.settled = parts.clock.settle(self.state.clock, work.index, partial.done)
            self.state.clock = work.settled.state
        elif parts.spec.method.accounts:
            work.settled = settle_planned(self.state.clock, parts.planning.of(work.index).spending, partial.done)
            self.state.clock = work.settled.state
        # Last: the plan of this round was made of what was known before it.
        self.state.personal.memories |= partial.memories
        self.state.round = work.index

    def _report(self, work: _Round) -> None:
        settled, more = work.settled, share_products(self.parts) | self.parts.planning.fields(work.index) | work.server
        done = [work.partial.done[client.index] for client in work.chosen]
        if settled is not None:
            done, more = settled.rows, settled.fields | more
        self.journal.round(work.index, done, work.partial, self.timer, self.parts.trainer, work.busiest, more)

    def _evaluate(self, round_index: int) -> None:
        activity.enter("evaluate", round_index)
        parts, config, ends = self.parts, self.parts.config.evaluation, round_index in (0, self.parts.config.federation.rounds)
        # Adapters that somebody has trained are scored as clients receive them.
        plain = round_index == 0 and parts.start is None and not epochs_of(parts.config, 0)
        due = config.clients_every > 0 and round_index % config.clients_every == 0
        rows = parts.evaluator.scores(self.state.personal, config.client_sequences > 0 and (ends or due), plain)
        spent = spent_fields(self.state.clock) if parts.clock is not None or parts.spec.method.accounts else None
        self.journal.evaluation(round_index, rows, plain, self.checkpoints.see(round_index, rows), spent)
        if ends:
            self.journal.generations(round_index, parts.evaluator.generations(self.state.personal, plain))

    def _digest(self) -> str:
        parts = self.parts
        return global_digest(parts.result_tensors(), parts.runtime, parts.config.topology.ep_size, parts.own_hashes())
