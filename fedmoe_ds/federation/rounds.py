"""Federation: the round loop.

    sample -> schedule clients to clusters and waves -> local training -> aggregate -> evaluate per budget tier -> checkpoint

Everything here runs on every rank in the same order; rank 0 also talks to the user. A stop request ends the round after the
wave that is running: what the finished clients added up to is saved, and the next start continues with the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedmoe_ds.aggregation.round_sums import RoundSums
from fedmoe_ds.checkpoint import state as states
from fedmoe_ds.checkpoint.digest import global_digest
from fedmoe_ds.checkpoint.state import PartialRound
from fedmoe_ds.checkpoint.writer import CheckpointWriter
from fedmoe_ds.clients.client import Client, tiers_of
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.local_training import Wave
from fedmoe_ds.clients.out_of_memory import OutOfMemory, release_memory
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.phase_timer import PhaseTimer
from fedmoe_ds.errors import LostError
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.schedule import schedule


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `interrupted` names the signal, or is None after the last round."""

    digest: str
    interrupted: str | None


class Federation:
    """One run, built by `fedmoe_ds.federation.build.build_parts`."""

    def __init__(self, parts: Parts, journal: Journal) -> None:
        self.parts, self.journal = parts, journal
        self.state = parts.state
        saving = parts.config.checkpoint
        self.writer = CheckpointWriter(parts.checkpoints, parts.runtime, saving.keep, saving.background)

    def run(self) -> Outcome:
        """Train the remaining rounds; at the end every checkpoint is on disk. Raises UserError when one cannot be written."""
        try:
            outcome = self._rounds()
            self._finish_checkpoint()
        except BaseException:
            self.writer.drop()
            raise
        return outcome

    def _rounds(self) -> Outcome:
        config = self.parts.config
        if self.state.round == 0 and self.state.partial is None:
            if self._stop_agreed():  # asked while the model and the data were loaded
                self._save()
                return self._stopped()
            self._evaluate(0)
        for round_index in range(self.state.round + 1, config.federation.rounds + 1):
            if self._round(round_index):
                return self._stopped()
            if round_index < config.federation.rounds and self._stop_agreed():
                if round_index % config.checkpoint.every:
                    self._save()
                return self._stopped()
        return Outcome(self._digest(), None)

    def _stopped(self) -> Outcome:
        return Outcome(self._digest(), self.parts.stop.name or "a signal on another rank")

    def _round(self, round_index: int) -> bool:
        """One round; True when it was interrupted (and saved unfinished)."""
        config, parts = self.parts.config, self.parts
        timer = PhaseTimer()
        activity.take()
        chosen = parts.participants(round_index)
        partial = self.state.partial or PartialRound()
        sums = self.state.sums or parts.new_sums(round_index)
        self.state.partial, self.state.sums = None, None
        absent = parts.skipped.of(round_index)
        partial.done |= {c.index: self.journal.absent(c) for c in chosen if c.index in absent}
        waiting = [client for client in chosen if client.index not in partial.done]
        plan = schedule(waiting, parts.spec.cost, config.local, parts.topology.layout.clusters, config.topology.ep_size,
                        config.execution.clients_in_flight)  # fmt: skip
        mine = plan[parts.topology.cluster]
        self.journal.start_round(round_index, config.federation.rounds, len(mine))
        timer.lap("schedule")
        activity.enter("train", round_index)
        places = {client.index: place for place, client in enumerate(chosen)}
        parts.trainer.timer = PhaseTimer()
        self._train(round_index, mine, places, partial, sums)
        timer.lap("train")
        activity.enter("aggregate")
        parts.runtime.barrier()  # waiting for slower clusters is no part of the checkpoint's time
        timer.lap("aggregate")
        self._finish_checkpoint()  # of the round before: its figures and those of this one are never both at risk
        timer.resume()
        activity.enter("aggregate")
        sums.reduce(parts.topology)
        self._share(partial)
        if any(client.index not in partial.done for client in chosen) or self._stop_agreed():
            partial.seconds += timer.total()
            self.state.partial, self.state.sums = partial, sums
            self._save()
            return True
        self._tell_averaged(round_index, sums, partial)
        parts.server.step(sums, self.state.adapters, self.state.server, round_index)
        self.state.utilisation_LE = sum(partial.activation.values(), np.zeros(parts.counts_shape, dtype=np.int64))
        self.state.round = round_index
        timer.lap("aggregate")
        last = round_index == config.federation.rounds
        if last or round_index % config.evaluation.every == 0:
            self._evaluate(round_index)
        timer.lap("evaluate")
        busiest = max(len(waves) for waves in plan)
        self.journal.round(round_index, [partial.done[c.index] for c in chosen], partial, timer, parts.trainer.timer, busiest)
        if last or round_index % config.checkpoint.every == 0:
            self._save()
        return False

    def _train(
        self,
        round_index: int,
        waves: list[list[list[Client]]],
        places: dict[int, int],
        partial: PartialRound,
        sums: RoundSums,
    ) -> None:
        """Train this cluster's waves and fold every finite client into the sums."""
        parts = self.parts
        for number, wave in enumerate(waves, start=1):
            trained = self._train_wave(round_index, wave, partial)
            for view, update in trained:
                self._fold(view, update, places[update.client.index], partial, sums)
            updates = [update for _, update in trained]
            tokens = sum(update.tokens for update in updates)
            seconds = max((update.seconds for update in updates), default=0.0)
            self.journal.wave_done(number, len(waves), tokens * parts.topology.layout.clusters, seconds)
            if self._stop_requested_here():
                return

    def _train_wave(self, round_index: int, wave: Wave, partial: PartialRound) -> list[tuple[ClientView, ClientUpdate]]:
        """Train one wave. A client that does not fit into memory leaves it, and the others begin again.

        Raises:
            LostError: that happened in the middle of the cluster's all-to-all, where the peers cannot be called back. The next
                start leaves the client out of this round.
        """
        parts = self.parts
        while any(wave):
            try:
                return parts.trainer.train(
                    wave, round_index, self.state.adapters, self.state.personal.values, parts.training_data.train
                )
            except OutOfMemory as shortage:
                lost, words = shortage.client, str(shortage)
            parts.skipped.add(round_index, lost.index)
            if parts.topology.layout.ep_size > 1:
                where = f"rank {parts.runtime.rank} on {parts.topology.hosts[parts.runtime.rank]}, round {round_index}"
                raise LostError(f"{where}: {words}; start again with --resume auto: the round goes on without it")
            partial.done[lost.index] = self.journal.absent(lost)
            wave = [[client for client in home if client.index != lost.index] for home in wave]
            release_memory()
        return []

    @torch.no_grad()
    def _fold(self, view: ClientView, update: ClientUpdate, place: int, partial: PartialRound, sums: RoundSums) -> None:
        parts, shard = self.parts, self.parts.topology.shard
        at_home = update.home == shard
        if update.finite:
            parts.server.fold(sums, place, view, update)
            for spec in view.blocks():
                if spec.personal:
                    self.state.personal.store(update.client.index, spec.name, view.value(spec))
            for name, value in update.remembered.items():
                self.state.personal.store(update.client.index, name, value)
            if at_home:
                for name, value in parts.spec.method.remember(update).items():
                    self.state.personal.store(update.client.index, name, value)
        if shard == 0:
            tier = partial.activation.setdefault(update.client.tier, np.zeros_like(update.counts_LE))
            tier += update.counts_LE
        if at_home:
            spent = parts.spec.cost.spent(
                update.tokens,
                int(update.counts_LE.sum()),
                int(update.trained_LE.sum()),
                update.assignment.rank(parts.config.adapters.rank),
            )
            status = "ok" if update.finite else "non-finite"
            partial.done[update.client.index] = self.journal.client(update, status, spent, self.state.personal)

    def _share(self, partial: PartialRound) -> None:
        """Make what each cluster knows about the round known everywhere: reports, personal state, activation counts."""
        parts = self.parts
        self.state.personal.share(parts.runtime, parts.topology)
        done = {index: report for part in parts.runtime.gather(_texts(partial.done)) for index, report in part.items()}
        partial.done = {int(index): report for index, report in done.items()}
        tiers = list(tiers_of(parts.clients))
        total = torch.zeros(len(tiers), *parts.counts_shape, dtype=torch.int64)
        for i, tier in enumerate(tiers):
            if tier in partial.activation:
                total[i] += torch.from_numpy(partial.activation[tier])
        parts.runtime.control.sum(total)
        partial.activation = {tier: total[i].numpy() for i, tier in enumerate(tiers)}

    def _tell_averaged(self, round_index: int, sums: RoundSums, partial: PartialRound) -> None:
        """Say so when clients trained a block and the round averages nothing of it; it keeps its value."""
        if all(report["status"] != "ok" for report in partial.done.values()):
            return  # nobody came back: the round's line names them
        found = self.parts.runtime.gather(sums.weighted())
        kept = [name for name in found[0] if not any(part[name] for part in found)]
        if kept:
            self.journal.not_averaged(round_index, kept)

    def _evaluate(self, round_index: int) -> None:
        activity.enter("evaluate", round_index)
        config = self.parts.config.evaluation
        last = round_index in (0, self.parts.config.federation.rounds)
        per_client = config.client_sequences > 0 and (
            last or (config.clients_every and round_index % config.clients_every == 0)
        )
        self.journal.evaluation(
            round_index, self.parts.evaluator.scores(self.state.personal, bool(per_client), round_index == 0)
        )

    def _save(self) -> None:
        """Begin a checkpoint of the state as it is now."""
        self._finish_checkpoint()
        activity.enter("checkpoint")
        parts = self.parts
        position = parts.runtime.run_on_rank0(self.journal.position)
        states.save(self.writer, parts.topology, self.state, parts.identity, parts.config_text, position)

    def _finish_checkpoint(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        activity.enter("checkpoint")
        done = self.writer.finish()
        if done is not None:
            self.journal.event("checkpoint", round=done.round, partial=done.partial, seconds=done.held, written_s=done.seconds)

    def _stop_requested_here(self) -> bool:
        """Whether any rank of this cluster was asked to stop; all of its ranks agree."""
        return any(self.parts.topology.control.gather(b"!" if self.parts.stop.requested else b""))

    def _stop_agreed(self) -> bool:
        return any(self.parts.runtime.gather(self.parts.stop.requested))

    def _digest(self) -> str:
        parts = self.parts
        return global_digest(parts.result_tensors(), parts.runtime, parts.config.topology.ep_size)


def _texts(done: dict[int, dict[str, object]]) -> dict[str, dict[str, object]]:
    return {str(index): report for index, report in done.items()}
