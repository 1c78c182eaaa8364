"""Terminal: the one way to standard output and standard error, on which the text of others stays text.

Names of clients, labels, paths and messages come from files that somebody else may have written. A terminal obeys what it is
sent (escape sequences, carriage returns, text that runs backwards), and whoever reads a log trusts its lines. What does not
print is therefore shown as its escape: `\\x1b`, `\\n`, `\\u202e`. Spaces of every width are left as they are.

`voice` says how much of it there is, and keeps a copy of it in a log file where one was asked for.
"""

from __future__ import annotations

import re
import sys
import threading
import time
import unicodedata
from typing import TextIO

# Candidates only: `_escape` keeps those that print.
_DOUBTFUL = re.compile(r"[^ -~]")
_DOUBTFUL_IN_LINES = re.compile(r"[^ -~\n]")


class Voice:
    """How this process speaks. `commands.console` sets it, once, before anything is said.

    Attributes:
        quiet: errors and results only.
        verbose: details, and the notes of every rank.
        rank: of this process, as far as the environment tells.
    """

    def __init__(self) -> None:
        self.quiet = self.verbose = False
        self.rank = 0
        self._log: TextIO | None = None
        # The watchdog's thread speaks, too; the handler of a signal may, while this very thread writes.
        self._lock = threading.RLock()

    def log_to(self, stream: TextIO | None) -> None:
        """Copy what is said from here on into `stream`, or no longer; the one before is closed."""
        with self._lock:
            if self._log is not None:
                self._log.close()
            self._log = stream

    def record(self, block: str) -> None:
        """Write lines into the log, with the time. What the terminal does not show (`quiet`) is there all the same."""
        with self._lock:
            if self._log is None:
                return
            now = time.strftime("%Y-%m-%d %H:%M:%S%z")
            try:
                self._log.write("".join(f"{now} {visible(line)}\n" for line in block.split("\n")))
                self._log.flush()
            except (OSError, ValueError) as error:
                # A run is worth more than its log; but nobody shall believe that the log is whole.
                self._log = None
                reason = getattr(error, "strerror", None) or error
                note(f"--log: cannot be written any more: {reason}; the run goes on without it")


voice = Voice()


def visible(text: object, lines: bool = False) -> str:
    """One line of characters that print. With `lines`, newlines are kept: the text is a block whose breaks are our own."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return (_DOUBTFUL_IN_LINES if lines else _DOUBTFUL).sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    letter = match[0]
    if letter.isprintable() or unicodedata.category(letter) == "Zs":
        return letter
    return letter.encode("unicode_escape").decode()


def show(block: str, stream: TextIO | None = None) -> None:
    """Write a block of lines to standard output, or to `stream`."""
    stream = sys.stdout if stream is None else stream
    voice.record(block)
    text = visible(block, lines=True) + "\n"
    try:
        stream.write(text)
    except UnicodeEncodeError:  # a terminal that cannot show every letter
        stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))


def note(line: object) -> None:
    """Write one line to standard error."""
    show(visible(line), sys.stderr)
