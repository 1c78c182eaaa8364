"""Journal: what a run tells its user, on rank 0: progress lines, metrics.jsonl, report.html.

Every method is called on all ranks. Rank 0 writes; a write that fails (a full disk) ends the run on every rank in one line: at
once, or when the ranks `settle` what a round has recorded. Nothing is written after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmoe_ds.aggregation.postprocessors import OK
from fedmoe_ds.clients.pass_limits import PassLimits
from fedmoe_ds.clients.tiers import tier_order, tier_top_k
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.runtime import Runtime, attempt
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import monitors
from fedmoe_ds.federation.evaluation import Score
from fedmoe_ds.federation.generation import Generation
from fedmoe_ds.federation.shortage import limit_fields, limit_line
from fedmoe_ds.report import MetricsLog, Progress, write_report
from fedmoe_ds.report.client_tables import MOST_LINES
from fedmoe_ds.storage.file_modes import keep_private
from fedmoe_ds.storage.files import write_whole

if TYPE_CHECKING:
    from fedmoe_ds.checkpoint.state import PartialRound
    from fedmoe_ds.clients.local_training import WaveTrainer
    from fedmoe_ds.distributed.phase_timer import PhaseTimer


MOST_NAMES = 20
"""Clients that a line of progress names."""


class Journal:
    """Writes for one run folder."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.folder, self.runtime = folder, runtime
        self.progress = Progress(enabled=runtime.is_main)
        self.monitor: Any = None  # a DeepSpeed MonitorMaster, if the configuration asks for one
        self._log: MetricsLog | None = None
        self._limits = PassLimits()
        self._failure: str | None = None  # rank 0's, of which the others do not know yet
        # On rank 0 alone, but a folder that cannot be written is every rank's error.
        self._write(self._open)

    def _open(self) -> None:
        self._log = MetricsLog(self.folder / "metrics.jsonl")

    @property
    def log(self) -> MetricsLog:
        assert self._log is not None, "only rank 0 writes metrics"
        return self._log

    def _write(self, action: Callable[[], Any]) -> Any:
        # Collective on purpose: without it the other ranks would wait for rank 0 in the next collective, in vain.
        return self.runtime.run_on_rank0(lambda: self._guarded(action))

    def _guarded(self, action: Callable[[], Any]) -> Any:
        if self._failure is not None:
            raise UserError(self._failure)
        try:
            return action()
        except OSError as error:
            raise UserError(
                f"output: {self.folder}: cannot write: {error.strerror or error}; make room, then start again with "
                "--resume auto"
            ) from None

    def _record(self, action: Callable[[], Any]) -> None:
        """As `_write`, without asking rank 0 how it went: a message for every line would cost more than the lines."""
        if self.runtime.is_main:
            _, self._failure = attempt(lambda: self._guarded(action))

    @property
    def failed(self) -> bool:
        """Whether this rank could not write something that the others do not know of yet."""
        return self._failure is not None

    def settle(self) -> None:
        """Raise on every rank what rank 0 could not write."""
        self._write(lambda: None)

    def data(self, facts: dict[str, Any]) -> None:
        """The `data` event; many clients go into a table."""
        self._write(lambda: self.log.write_data(**facts))

    def event(self, event: str, **fields: Any) -> None:
        """One line of metrics.jsonl."""
        self._record(lambda: self.log.write(event, **fields))

    def config(self, text: str) -> None:
        """The resolved configuration, beside the metrics."""
        self._write(lambda: write_whole(self.folder / "config.yaml", text))

    def position(self) -> int:
        """Bytes of metrics.jsonl so far (rank 0 only)."""
        return int(self._guarded(self.log.position))

    def truncate(self, position: int) -> None:
        """Forget what was written after the checkpoint that is resumed, tables included."""
        self._write(lambda: self.log.truncate(position))

    def note(self, text: str) -> None:
        self.progress.note(text)

    def detail(self, text: str) -> None:
        """A note for `--verbose`."""
        self.progress.detail(text)

    def start_round(self, round_index: int, rounds: int, waves: int) -> None:
        self.progress.start_round(round_index, rounds, waves)

    def wave_done(self, wave: int, waves: int, tokens: int, seconds: float) -> None:
        self.progress.wave_done(wave, waves, tokens, seconds)

    def limits(self, round_index: int, limits: PassLimits) -> None:
        """How the passes of a round are cut, where memory ran out before; nothing where that has been told."""
        if limits != self._limits:
            self._limits = limits
            self.event("limits", round=round_index, **limit_fields(limits))
            self.note(f"round {round_index}: {limit_line(limits)}")

    def evaluation(
        self,
        round_index: int,
        rows: list[Score],
        plain: bool,
        best: str | None = None,
        spent: Mapping[str, float] | None = None,
    ) -> None:
        """Evaluation rows, and one progress line.

        Args:
            plain: of the foundation itself.
            best: what it says of the best round.
            spent: virtual time and energy so far, on simulated devices.
        """
        so_far = spent or {}

        def write() -> None:
            own = [row for row in rows if row.client is not None]
            many = len(own) > MOST_LINES
            for row in rows:
                if row.client is None or not many:
                    self.log.write("eval", round=round_index, **_score_fields(row), **so_far)
            if many:
                self.log.write_table("eval", round_index, (_score_fields(row) for row in own))

        self._record(write)
        self._monitored(lambda: monitors.of_evaluation(round_index, rows))
        head = "foundation" if plain else "start" if round_index == 0 else f"round {round_index}"
        pooled = [row for row in rows if row.split == "global"]
        tiers = "  ".join(f"k={row.label}: {row.perplexity:.2f}" for row in pooled)
        for name in pooled[0].metrics if pooled else ():
            shares = "  ".join(f"k={row.label}: {row.metrics[name]:.1%}" for row in pooled)
            tiers += f"; {name.replace('_', ' ')} {shares}"
        self.note(f"{head}: perplexity {tiers}{f'; {best}' if best else ''}")

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """Samples as text; the record becomes this user's alone, as with answers."""

        def write() -> None:
            keep_private(self.log.path)
            for row in rows:
                self.log.write("sample", **row)

        if rows:
            self._write(write)

    def generations(self, round_index: int, rows: list[Generation]) -> None:
        """Answers as text. What clients have written is in them: the record becomes this user's alone, and no line of progress
        shows any."""

        def write() -> None:
            if rows:
                keep_private(self.log.path)
            for row in rows:
                fields = {"round": round_index, "tier": row.tier, "tier_label": row.label, "sample": row.sample}
                fields |= {"prompt": row.prompt, "reference": row.reference, "answer": row.answer}
                self.log.write("generation", **fields, exact=row.exact, ended=row.ended, client=row.client)

        self._record(write)

    def round(
        self,
        round_index: int,
        clients: list[dict[str, Any]],
        partial: PartialRound,
        timer: PhaseTimer,
        trainer: WaveTrainer,
        waves: int,
        more: Mapping[str, Any],
    ) -> None:
        """Client, expert and round rows of a finished round; the trainer tells the phases inside its waves, and its rate.

        `more`: fields of its plan, of what it was on simulated devices, and of products that it moved into frozen weights.
        """
        dropped = [client["client"] for client in clients if client["status"] != OK]
        reasons = sorted({client["status"] for client in clients} - {OK})
        tokens = sum(client["tokens"] for client in clients)
        seconds = timer.total() + partial.seconds
        fields = {
            "participants": len(clients),
            "dropped": len(dropped),
            # With very many of them, `status` in the table of clients names the others.
            "dropped_clients": dropped[:MOST_LINES],
            "tokens": tokens,
            # An unfinished round of an older version has clients that did not count them.
            "targets": sum(client["targets"] for client in clients) if all("targets" in client for client in clients) else None,
            "seconds": seconds,
            # Training, and what an interrupted start spent on this round; evaluation is no part of the speed.
            "tokens_per_s": tokens / max(timer.phases.get("train", 0.0) + partial.seconds, 1e-9),
            "phases": timer.phases,
            "wave_seconds": trainer.timer.phases,
            # Taking resets the tallies: each round reports its own.
            "collectives": activity.take(),
            "waves": waves,
            "lr": trainer.round_rate(round_index),
            **more,
        }

        def write() -> None:
            if len(clients) > MOST_LINES:
                self.log.write_table("client", round_index, clients)
            else:
                for client in clients:
                    self.log.write("client", round=round_index, **client)
            for label in sorted(partial.activation, key=tier_order):
                counts_LE = partial.activation[label]
                # A tier whose clients were all left out has no shares.
                if counts_LE.sum():
                    tier = {"tier": tier_top_k(label), "tier_label": label}
                    share = counts_LE / counts_LE.sum(1, keepdims=True).clip(1)
                    self.log.write("experts", round=round_index, **tier, activation=share.round(6))
            self.log.write("round", round=round_index, **fields)

        self._record(write)
        self._monitored(lambda: monitors.of_round(round_index, clients, fields))
        self.progress.end_round(_round_line(fields, dropped, reasons))
        self.progress.detail(f"round {round_index}: {_spent(fields)}")

    def _monitored(self, figures: Callable[[], list[monitors.Figure]]) -> None:
        # DeepSpeed's writers exist on rank 0 only; a full disk ends the run as everywhere.
        if self.monitor is not None:
            for line in self._write(lambda: monitors.write_figures(self.monitor, figures())):
                self.note(line)

    def not_averaged(self, round_index: int, reports: Iterable[dict[str, Any]], blocks: list[str]) -> None:
        """Say so when clients trained a block and the round averages nothing of it; not where nobody came back."""
        if not blocks or not any(report["status"] == OK for report in reports):
            return
        self.event("not_averaged", round=round_index, blocks=blocks)
        self.note(
            f"round {round_index}: nothing of what clients trained was averaged in {', '.join(blocks)}; they keep their values"
        )

    def report(self) -> None:
        """Build report.html."""
        self._write(lambda: str(write_report(self.folder)))

    def close_monitor(self, failed: bool) -> None:
        """Bring out what monitors hold; no collective, so that a rank that leaves with an error can do it, too."""
        master, self.monitor = self.monitor, None
        if master is not None and self.runtime.is_main:
            for line in monitors.close_monitors(master, failed):
                self.note(line)

    def close(self) -> None:
        self.progress.close()
        if self._log is not None:
            self._log.close()


def _score_fields(row: Score) -> dict[str, Any]:
    """What an evaluation row says beside its round."""
    fields: dict[str, Any] = {"tier": row.tier, "tier_label": row.label, "split": row.split}
    fields |= {"perplexity": row.perplexity, "accuracy": row.accuracy, "loss": row.loss}
    fields["targets"] = fields["tokens"] = row.targets  # the old name, too: it is an interface
    if row.metrics:
        fields |= {**row.metrics, "samples": row.samples}
    if row.client is not None:
        fields["client"] = row.client
    return fields


def _round_line(fields: dict[str, Any], dropped: list[str], reasons: list[str]) -> str:
    """What is said of a finished round; `dropped` and why are named up to a number."""
    text = f"{fields['participants']} clients, {fields['tokens']} tokens, {fields['seconds']:.1f} s"
    if "virtual_s" in fields:
        text += f"; virtual {fields['virtual_s']:.4g} s, {fields['joules']:.4g} J"
    if "product_rows" in fields:
        text += f"; products of {fields['product_rows']} rows, {fields['product_bytes']} bytes"
    if dropped:
        text += f"; left out ({', '.join(reasons)}): {', '.join(dropped[:MOST_NAMES])}"
        text += f" and {len(dropped) - MOST_NAMES} more" if len(dropped) > MOST_NAMES else ""
    return text


def _spent(fields: dict[str, Any]) -> str:
    """Where the time of a round went, on one line."""
    phases = [f"{name} {seconds:.2f} s" for name, seconds in fields["phases"].items()]
    inside = [f"{name} {seconds:.2f} s" for name, seconds in fields["wave_seconds"].items()]
    sent = [
        f"{name} {tally['calls']} x {_known(tally['seconds'])} s {tally['bytes']:,} bytes"
        for name, tally in fields["collectives"].items()
    ]
    told = [", ".join(phases), f"waves {', '.join(inside)}" if inside else "", f"collectives {', '.join(sent)}" if sent else ""]
    return "; ".join(part for part in told if part)


def _known(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:.2f}"
