"""What rank 0 tells the person who waits: a live bar on a terminal, plain lines elsewhere, and the final table."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from fedmoe_ds.report.formats import targets_of, wilson
from fedmoe_ds.report.history import TASK_METRICS, Event, TierResult, tier_results
from fedmoe_ds.terminal import visible, voice

MISSING = "-"


class Progress:
    """Progress of a run on standard error. With `enabled=False` (every rank but 0) notes go to the rank's own log, if there is
    one, and with `--verbose` to standard error as well; there is no bar. With `--quiet` the log alone has all of it.

    `interval` is the shortest time between two wave lines, in seconds, where standard error is no terminal.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None, interval: float = 5.0) -> None:
        self._enabled = enabled
        self._interval = interval
        # A notebook's stream says that it is a terminal, but knows no bar: there it is plain lines, on standard error as ever.
        bar = False if Console().is_jupyter else None
        # No markup and no emoji: names of users are shown as they are.
        self._console = Console(
            file=stream or sys.stderr, highlight=False, markup=False, emoji=False, force_jupyter=False, force_terminal=bar
        )
        self._bar: Bar | None = None
        self._round = self._rounds = 0
        self._first_round = 0
        self._began = self._last_line = time.monotonic()
        self._tokens = self._seconds = 0.0
        if enabled and not voice.quiet and self._console.is_terminal:
            # A bar in a log file would be thousands of lines of control characters.
            self._bar = _new_bar(self._console)
            self._task = self._bar.add_task("starting", total=1.0, start=False, visible=False, state="")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def note(self, text: str) -> None:
        """One line of text, above the bar where there is one."""
        voice.record(text)
        if voice.quiet or not (self._enabled or voice.verbose):
            return
        # Every rank's notes, where they are asked for: without its number nobody could tell them apart.
        line = visible(text) if self._enabled else f"[rank {voice.rank}] {visible(text)}"
        if self._bar is None:
            line = f"[{time.strftime('%H:%M:%S')}] {line}"
        self._console.print(line, soft_wrap=True)

    def detail(self, text: str) -> None:
        """One line that only `--verbose` shows."""
        if voice.verbose:
            self.note(text)

    def start_round(self, round: int, rounds: int, waves: int) -> None:
        """Rounds count from 1; a resumed run starts later, and its ETA counts from there."""
        if not self._first_round:
            self._first_round, self._began = round, time.monotonic()
        self._round, self._rounds = round, rounds
        self._tokens = self._seconds = 0.0
        if self._bar is not None:
            self._bar.start()
            self._bar.start_task(self._task)
            self._show(round - 1, f"wave 0/{waves}")

    def wave_done(self, wave: int, waves: int, tokens: int, seconds: float) -> None:
        """Wave `wave` (from 1) of `waves` is done; `tokens` and `seconds` are those of this wave alone."""
        self._tokens += tokens
        self._seconds += seconds
        # Aggregation and evaluation still follow: counted as one more wave, so that the bar does not wait at the end.
        done = self._round - 1 + wave / (waves + 1)
        # Over all waves so far: a single wave's speed jumps with its clients' lengths.
        speed = f"{self._tokens / self._seconds:,.0f} tokens/s" if self._seconds > 0 else ""
        state = f"wave {wave}/{waves}  {speed}  ETA {_clock(self._remaining(done))}"
        if self._bar is not None:
            self._show(done, state)
        # In a log, a line every few seconds is enough; waves may be much shorter.
        elif time.monotonic() - self._last_line >= self._interval:
            self._last_line = time.monotonic()
            self.note(f"round {self._round}/{self._rounds}  {state}")

    def end_round(self, summary: str) -> None:
        """The round is complete: one line that stays."""
        remaining = self._remaining(self._round)
        self._last_line = time.monotonic()
        self.note(f"round {self._round}/{self._rounds}  {summary}" + (f"  ETA {_clock(remaining)}" if remaining else ""))
        if self._bar is not None:
            self._show(self._round, f"ETA {_clock(remaining)}")

    def close(self) -> None:
        """Take the bar down; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, done: float, state: str) -> None:
        assert self._bar is not None
        title, total = f"round {self._round}/{self._rounds}", float(self._rounds)
        # Waves take far longer than one redraw, so every change is shown at once.
        self._bar.update(self._task, description=title, total=total, completed=done, state=state, visible=True, refresh=True)

    def _remaining(self, done: float) -> float:
        """Seconds left at the pace of this process, `done` rounds (with a fraction) being complete."""
        # Rounds of this process only: those before a resume took no time of it.
        paced = done - (self._first_round - 1)
        return (time.monotonic() - self._began) / paced * (self._rounds - done) if paced > 0 else 0.0


def _new_bar(console: Console) -> Bar:
    # Standard output stays untouched: its last lines are an interface, and the bar lives on standard error.
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    return Bar(*columns, console=console, transient=True, redirect_stdout=False, refresh_per_second=4)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def final_table(rows: Iterable[Event]) -> str:
    """Tiers x before/after as plain text, one line per (hold-out, tier).

    Accuracies have the decimals that their numbers of targets can tell; the column after them is Wilson's 95 % interval. Task
    metrics follow where there are any, with the interval for their numbers of samples.

    Args:
        rows: `eval` events (fields as in docs/outputs.md); other events are passed over, so `read_metrics(...)` fits.
    """
    results = tier_results(rows)
    metrics = [name for name in TASK_METRICS if any(name in result.metrics for result in results)]
    head = ("hold-out", "top-k", "perplexity before", "after", "ratio", "accuracy before", "after", "change", "95 % of after")
    lines = [(*head, *(text for name in metrics for text in (f"{TASK_METRICS[name]} before", "after", "95 % of after")))]
    for result in results:
        lines.append(
            (
                result.split,
                result.tier,
                _text(result.before.get("perplexity", MISSING), "{:.2f}"),
                _text(result.after.get("perplexity", MISSING), "{:.2f}"),
                _text(MISSING if result.ratio is None else result.ratio, "{:.3f}"),
                _text(result.before.get("accuracy", MISSING), f"{{:.{result.digits}%}}"),
                _text(result.after.get("accuracy", MISSING), f"{{:.{result.digits}%}}"),
                _text(MISSING if result.gain is None else 100 * result.gain, f"{{:+.{result.digits}f}}"),
                _interval(result.after, "accuracy", targets_of(result.after), result.digits),
                *(cell for name in metrics for cell in _task_cells(result, name)),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    ruled = [lines[0], tuple("-" * width for width in widths), *lines[1:]]
    return "\n".join("  ".join(_aligned(line, widths)) for line in ruled)


def _aligned(line: tuple[str, ...], widths: list[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]


def _task_cells(result: TierResult, name: str) -> list[str]:
    """Before, after, and the interval of a task metric."""
    digits = result.task_digits(name)
    shares = [_text(event.get(name, MISSING), f"{{:.{digits}%}}") for event in (result.before, result.after)]
    return [*shares, _interval(result.after, name, result.after.get("samples"), digits)]


def _interval(event: Event, field: str, count: int | None, digits: int) -> str:
    share = event.get(field)
    if share is None or not count or not 0 <= share <= 1:
        return MISSING
    return "-".join(f"{100 * end:.{digits}f}" for end in wilson(share, count)) + "%"


def _text(value: float | str | None, form: str) -> str:
    # Missing is one thing, null another: null was recorded because it was not finite.
    if value == MISSING:
        return MISSING
    if value is None:
        return "not finite"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) >= 1e6 else form.format(value)
