"""Terminal: the one way to standard output and standard error, on which the text of others stays text.

Names of clients, labels, paths and messages come from files that somebody else may have written. A terminal obeys what it is
sent (escape sequences, carriage returns, text that runs backwards), and whoever reads a log trusts its lines. What does not
print is therefore shown as its escape: `\\x1b`, `\\n`, `\\u202e`. Spaces of every width are left as they are.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from typing import TextIO

# Candidates only: `_escape` keeps those that print.
_DOUBTFUL = re.compile(r"[^ -~]")
_DOUBTFUL_IN_LINES = re.compile(r"[^ -~\n]")


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
    text = visible(block, lines=True) + "\n"
    try:
        stream.write(text)
    except UnicodeEncodeError:  # a terminal that cannot show every letter
        stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))


def note(line: object) -> None:
    """Write one line to standard error."""
    show(visible(line), sys.stderr)
