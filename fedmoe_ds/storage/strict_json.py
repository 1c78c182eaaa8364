"""Strict JSON: one way to read JSON that somebody else may have written, with one kind of error.

Python's parser ends in four kinds of exceptions, and it lets pass what breaks whoever goes on with it: nesting that no other
function can follow, NaN, numbers beyond a float, half of a surrogate pair. Data files have stricter rules of their own
(`data/readers/json_rows.py`); what is common to both is here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

DEEPEST = 64
"""Levels of nesting: files of this package and of Hugging Face have fewer than ten, the stack of Python about 300."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_HUGE = re.compile(r"[eE]\+?0*[1-9]\d\d|\d{200}")
"""What a text must have somewhere for a number in it to be beyond a float, which ends at 1.8e308."""


def parse_json(content: str | bytes, constants: bool = False, halves: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        constants: take NaN and Infinity, too, as transformers writes them.
        halves: take halves of surrogate pairs, too, with which Python names files that are no UTF-8.
    Raises:
        ValueError: with a message of one line: no UTF-8, no JSON (RFC 8259), nested deeper than `DEEPEST` levels, an integer of
            more digits than Python reads, a number beyond a float, or half of a surrogate pair, which is no character.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        # A byte order mark: the codec drops it from bytes, a text may still begin with one.
        # A function for every number would make large files slow, and almost no text needs it.
        numbers = finite if _HUGE.search(text) else None
        value = json.loads(text.removeprefix("\ufeff"), parse_constant=None if constants else _no_constant, parse_float=numbers)
    except (ValueError, RecursionError) as error:
        raise ValueError(trouble(error)) from None
    check_depth(text, value)
    # The escape may be half of a whole pair: it only tells that the value is worth a closer look.
    if not halves and _SURROGATE.search(text) and not _is_text(value):
        raise ValueError("half of a surrogate pair, which is no character")
    return value


def read_json(path: Path, constants: bool = False) -> Any:
    """Return the value in a file; see `parse_json`. Raises OSError, too."""
    return parse_json(path.read_bytes(), constants)


def tree_sha256(tree: Any) -> str:
    """SHA-256 of a tree that JSON can hold, 64 hex digits, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def trouble(error: ValueError | RecursionError) -> str:
    """What Python's parser did not like about a text, in a few words."""
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text at byte {error.start}"
    if not isinstance(error, json.JSONDecodeError) and "digits" in str(error):
        return "an integer has too many digits"
    return str(error)


def check_depth(text: str, value: Any) -> None:
    """Raise ValueError where `value`, which `text` says, is nested deeper than `DEEPEST` levels."""
    # An upper bound that costs little: most texts have too few brackets to be nested so deep.
    if text.count("[") + text.count("{") > DEEPEST and _is_deeper(value):
        raise ValueError(_TOO_DEEP)


def _is_deeper(value: Any) -> bool:
    """Goes level by level, so that no stack is needed."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


_TOO_DEEP = f"nested deeper than {DEEPEST} levels"


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def finite(word: str) -> float:
    """The value of a JSON number with a point or an exponent. Raises ValueError where no float reaches so far."""
    value = float(word)
    if math.isinf(value):
        raise ValueError(f"{word if len(word) <= 40 else word[:37] + '...'} is beyond a float")
    return value


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
