"""Round checkpoints: which rounds of a run are saved, and which of them stay.

A round is saved where `checkpoint.every` says so, after the last round, when it is the best so far, and when the run stops. The
newest `checkpoint.keep` stay, and the best one.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedmoe_ds.checkpoint import state
from fedmoe_ds.checkpoint.writer import CheckpointWriter
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.federation.best_round import restored_best
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.evaluation import Score
from fedmoe_ds.federation.journal import Journal


class RoundCheckpoints:
    """Those of one start; every method is called on all ranks, `drop` by the rank that fails.

    Raises:
        UserError: the run's record is damaged.
    """

    def __init__(self, parts: Parts, journal: Journal) -> None:
        self.parts, self.journal, saving = parts, journal, parts.config.checkpoint
        self.writer = CheckpointWriter(parts.checkpoints, parts.runtime, saving.keep, saving.background)
        self.best = restored_best(saving, journal.folder, parts.runtime, parts.state.round)
        for line in self.best.notes if self.best is not None else ():
            journal.note(line)

    def see(self, round_index: int, scores: Iterable[Score]) -> str | None:
        """Take what an evaluation has found; what there is to say about the best round."""
        if self.best is None:
            return None
        self.best.see_scores(round_index, scores)
        return self.best.told()

    def round_done(self, round_index: int, due: bool) -> None:
        """Save a finished round where one is due, and the best so far in any case."""
        if due or (self.best is not None and self.best.round == round_index):
            self.save()

    def save(self) -> None:
        """Begin a checkpoint of the state as it is now."""
        self.finish()
        activity.enter("checkpoint")
        parts, best = self.parts, None if self.best is None else self.best.round
        position = parts.runtime.run_on_rank0(self.journal.position)
        names = parts.data.names
        state.save(self.writer, parts.topology, parts.state, parts.identity, parts.config_text, position, names, best)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        activity.enter("checkpoint")
        done = self.writer.finish()
        if done is not None:
            kept = {} if done.best is None else {"best": done.best}
            spent = {"seconds": done.held, "written_s": done.seconds}
            self.journal.event("checkpoint", round=done.round, partial=done.partial, **spent, **kept)
            if done.copied:
                self.journal.note(
                    f"checkpoint of round {done.round}: this file system makes no links, so {done.copied / 2**20:.0f} MiB of "
                    "the one before were copied"
                )

    def drop(self) -> None:
        """Give up the checkpoint that is being written, on this rank alone."""
        self.writer.drop()
