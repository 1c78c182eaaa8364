"""Shell: words and commands as bash reads them, each on one line of characters that print."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable


def quoted(word: str) -> str:
    """One word. What does not print is written as the escape of its bytes."""
    if word.isprintable():
        return shlex.quote(word)
    letters = (chr(byte) if 32 <= byte < 127 and chr(byte) not in "'\\" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    # The one kind of quotes in which bash reads escapes.
    return f"$'{''.join(letters)}'"


def command_line(words: Iterable[str]) -> str:
    """A command to repeat."""
    return " ".join(map(quoted, words))
