"""The kinds of trouble and their exit codes: a user's mistake, a lost rank, and everything else.

A `UserError` carries one line that names the field, the value and the fix. Entry scripts turn it into that line on standard
error and exit code 2 (`runtime.run_entry`); a rank that is gone is one line, too (`watchdog`); any other exception is a bug or
a machine failure and keeps its traceback and exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fedmoe_ds.terminal import visible

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
"""Ended by Ctrl-C where there is nothing to save (130: what shells say of a process that SIGINT has ended)."""
EXIT_STOPPED = 75
"""Asked to stop; a checkpoint was written, or loading had not ended. The same command with `--resume auto` continues (75: BSD's
temporary failure)."""
EXIT_LOST = 76
"""A rank died, hung or lost its network; the last checkpoint is intact. The same command with `--resume auto` continues."""

_LONGEST, _TAIL = 4000, 1000
"""Characters of a line, and of its end, where the fix is."""


class OneLineError(Exception):
    """An error whose message is one line that prints, whatever names it quotes."""

    def __init__(self, message: str) -> None:
        # Shortened first: escapes make a text longer, and a cut could split one.
        super().__init__(visible(_shortened(" ".join(message.split()))))


class UserError(OneLineError):
    """A mistake in the configuration, the data or the environment that the user can fix."""

    exit_code = EXIT_USER_ERROR


class LostError(OneLineError):
    """The other ranks are not there, or not any more."""

    exit_code = EXIT_LOST


def _shortened(text: str) -> str:
    """A value out of somebody else's file may be a megabyte long; the middle of a line that long is left out."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - _TAIL]} ... {text[-_TAIL:]}"


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest choice, or the list of choices when none is close."""
    # Sorted: every rank says the same, whatever the order of a set.
    options = sorted(choices)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; choose one of {', '.join(options)}" if options else ""
