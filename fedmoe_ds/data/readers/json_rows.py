"""JSON: one object per line (JSONL), or an array of objects.

UTF-8 unless `data.encoding` says otherwise, and as RFC 8259 has it: no key twice, no NaN, no half of a surrogate pair in a
column that is used. A value has the type that it is written with. An array is read object by object, so that only the wanted
columns of a large file are ever in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from fedmoe_ds.data.readers.data_file import DataFile
from fedmoe_ds.data.readers.rows import Rows
from fedmoe_ds.data.table import Table, twice
from fedmoe_ds.storage.strict_json import check_depth, finite, trouble

_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_WORD = 16
"""Characters that Python's parser may look at before it finds an unfinished word, number or escape wrong."""
_WANTED = 'write [{"column": value, ...}, ...], or one object per line in a file that ends in .jsonl'


def read_jsonl(file: DataFile, wanted: Collection[str]) -> Table:
    """Return the wanted columns of a JSONL file; an absent key is a missing value. Raises UserError with the line's number."""
    rows = Rows(file, wanted)
    for number, text in file.lines():
        if not text.strip():
            continue
        try:
            value = _DECODER.decode(text)
            check_depth(text, value)
        except (ValueError, RecursionError) as error:
            raise file.error(f"not valid JSON ({_what(error)}); mend or drop the line", number) from error
        if not isinstance(value, dict):
            raise file.error(
                f'a {type(value).__name__}, not a JSON object; write one {{"column": value, ...}} per line', number
            )
        rows.add(value, number)
    return rows.table()


def read_json(file: DataFile, wanted: Collection[str]) -> Table:
    """Return the wanted columns of a JSON file: of an array of objects, or of one object per line, as some tools name them.

    Raises UserError with the number of the line.
    """
    text, rows = _Cursor(file), Rows(file, wanted)
    first = text.peek()
    if first == "{" and _has_object_lines(file):
        return read_jsonl(file, wanted)
    if first == "":  # an empty file has no rows, whatever its kind
        return rows.table()
    if first != "[":
        what = "an object" if first == "{" else "a single value"
        hint = " (pandas: to_json(orient='records'))" if first == "{" else ""
        raise file.error(f"{what}, not an array of objects{hint}; {_WANTED}", text.line)
    text.step()
    mark = text.peek()  # "]" of an array without rows
    while mark != "]":
        if text.peek() != "{":
            raise file.error(f"no JSON object where one of the array should begin; {_WANTED}", text.line)
        line = text.line
        rows.add(text.value(), line)
        if (mark := text.peek()) not in ("]", ","):
            raise file.error("not valid JSON (neither a comma nor the array's end after an object); mend the file", text.line)
        if mark == ",":
            text.step()
    text.step()
    if text.peek() != "":
        raise file.error("not valid JSON (more text after the array's end); mend the file", text.line)
    return rows.table()


class _Cursor:
    """A place in a text that comes piece by piece; what lies behind it is forgotten."""

    def __init__(self, file: DataFile) -> None:
        self.line = 1
        self._file, self._pieces, self._text, self._place = file, file.pieces(), "", 0

    def peek(self) -> str:
        """Return the next character that is no white space, and stop before it; "" at the end."""
        while True:
            self._advance(_SPACE.match(self._text, self._place).end())  # type: ignore[union-attr]
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def step(self) -> None:
        """Pass over one character."""
        self._advance(self._place + 1)

    def value(self) -> Any:
        """Return the JSON value that begins here, and pass over it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
                check_depth(self._text[self._place : end], value)
            except (ValueError, RecursionError) as error:
                line, unfinished = self.line, False
                if isinstance(error, json.JSONDecodeError):
                    line += self._text.count("\n", self._place, error.pos)
                    # The value may only go on in the next piece: then it is wrong near the end, or a text has no end.
                    unfinished = error.msg.startswith("Unterminated string") or len(self._text) - error.pos < _LONGEST_WORD
                if not (unfinished and self._more()):
                    raise self._file.error(f"not valid JSON ({_what(error)}); mend the file", line) from error
            else:
                self._advance(end)
                return value

    def _advance(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place

    def _more(self) -> bool:
        """Take in as much again as there is of a value so far: a long one is then parsed few times. False at the end."""
        parts, length = [self._text[self._place :]], 0
        while length <= len(parts[0]) and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            length += len(piece)
        self._text, self._place = "".join(parts), 0
        return length > 0


def _has_object_lines(file: DataFile) -> bool:
    """Whether the first line is a whole object and another one begins on the next: JSONL in a file that ends in `.json`."""
    lines = (text for _, text in file.lines() if text.strip())
    try:
        first = json.loads(next(lines))
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and next(lines, "").lstrip().startswith("{")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"key '{twice([key for key, _ in pairs])}' occurs twice")
    return row


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


# Python's decoder would keep the last of two equal keys, and take NaN.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=finite)


def _what(error: ValueError | RecursionError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else trouble(error)
