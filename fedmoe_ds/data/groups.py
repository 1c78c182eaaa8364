"""Groups: the names of clients and labels that a column of the source gives.

One rule for every source, so that equal groups have one name:

* text: in Unicode's composed form (NFC), without outer white space, inner white space as one space;
* whole numbers in decimal digits, also where they are stored as 1.0 (a column with gaps often is); true and false as
  `True` and `False`; the integers of a `ClassLabel` by its words.

Refused, with the row: a missing value, an empty name, a fraction, control characters, half of a surrogate pair, anything else;
and two names that differ only in invisible characters, because nobody could tell those clients apart.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.errors import UserError

EXACT = 2**53
"""Beyond it, neighbouring whole numbers are the same floating-point number."""


def row_number(row: int) -> str:
    """What a message calls a row where nothing else is known: its number from 1."""
    return f"row {row + 1}"


def group_names(
    values: Iterable[Any],
    column: str,
    words: list[str] | None = None,
    place: Callable[[int], str] = row_number,
    key_name: str = "data.partition.column",
) -> list[str]:
    """Return the name of every row's group.

    Args:
        words: those of a `ClassLabel`.
        place: what a message calls a row.
        key_name: the key that names the column.
    Raises:
        UserError: as said above.
    """
    known: dict[Any, str] = {}
    names = []
    for row, value in enumerate(values):
        # The type belongs to the key: True, 1 and 1.0 are equal in Python and may have different names.
        key = (type(value), value) if isinstance(value, str | int | float) else None
        if key not in known:
            name = group_name(value, words)
            if name is None:
                raise UserError(
                    f"{key_name}: {column}: {place(row)} holds {value!r:.40}, no group's name; mend or drop the row"
                )
            known[key] = name
        # Names are shared: a column of a million rows and ten groups holds ten strings.
        names.append(known[key])
    _check_distinguishable(set(names), column, key_name)
    return names


def group_name(value: Any, words: list[str] | None = None) -> str | None:
    """Return the name that a value stands for, or None where it stands for none."""
    # Before int: a bool is one in Python.
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if abs(value) < EXACT and value.is_integer() else None
    if isinstance(value, int):
        if words is None or not 0 <= value < len(words):
            return str(value)
        value = words[value]
    if not isinstance(value, str):
        return None
    if value.isascii() and value.isprintable():  # what is said below holds; letter by letter a million names take seconds
        return " ".join(value.split()) or None
    # NFC: the same accented letter in two spellings is one client.
    name = " ".join(unicodedata.normalize("NFC", value).split())
    return name if name and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name) else None


def coded(labels: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the different labels, sorted, and for each label its place among them."""
    names = sorted(set(labels))
    code = {name: place for place, name in enumerate(names)}
    return names, np.fromiter(map(code.__getitem__, labels), np.int64, len(labels))


def _check_distinguishable(names: set[str], column: str, key_name: str) -> None:
    seen: dict[str, str] = {"": ""}  # no name may look like nothing
    for name in sorted(names):
        # Cf: format characters, such as zero-width joiners and marks of direction; none of them is ASCII.
        shown = name if name.isascii() else "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
        visible = " ".join(shown.split())
        if (other := seen.setdefault(visible, name)) != name:
            raise UserError(
                f"{key_name}: {column}: the names {other!a} and {name!a} differ only in invisible characters; "
                "change one of them"
            )
