"""Strict JSON: every text gives its value or one short line, and everything that comes from outside is read with it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fedmoe_ds
from fedmoe_ds.storage.strict_json import DEEPEST, parse_json

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


@settings(max_examples=40, deadline=None)
@given(values, st.booleans(), st.booleans())
def test_what_is_written_is_read(value: Any, ascii_only: bool, mark: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text) == value
    assert parse_json(("\ufeff" if mark else "").encode() + text.encode()) == value


@settings(max_examples=80, deadline=None)
@given(
    st.binary(max_size=60)
    | st.lists(st.sampled_from(list('[]{}",:0123456789.eE+-\\ud8anulltrefsNI ')), max_size=40).map("".join)
)
@example("1e310")
@example("[-1.5E+0309]")
@example("9" * 250 + "e99")
def test_anything_gives_a_value_or_a_line(content: str | bytes) -> None:
    try:
        value = parse_json(content)
    except ValueError as error:
        assert type(error) is ValueError and str(error).isprintable() and len(str(error)) < 200
    else:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}"), ("[0, ", "]"), ('[{"a":', "}]")])
@pytest.mark.parametrize("levels", [1, DEEPEST // 2, DEEPEST, DEEPEST + 2, 400, 900, 1100, 5000, 200_000])
def test_nesting_is_bounded(opening: str, closing: str, levels: int) -> None:
    depth = levels * opening.count("[") + levels * opening.count("{")
    text = opening * levels + "0" + closing * levels
    if depth <= DEEPEST:
        assert json.dumps(parse_json(text)) == json.dumps(json.loads(text))
    else:
        with pytest.raises(ValueError, match=f"nested deeper than {DEEPEST} levels"):
            parse_json(text)


@pytest.mark.parametrize("text", ["1e310", "-1e0309", "1" + "0" * 250 + ".5e99", '{"a": [2e308]}'])
def test_a_number_beyond_a_float_is_no_infinity(text: str) -> None:
    with pytest.raises(ValueError, match=r"^-?\d+\S* is beyond a float$"):
        parse_json(text)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_what_a_float_can_hold_is_read(number: float) -> None:
    assert parse_json(json.dumps([number, 1.7e308, 1e-400])) == [number, 1.7e308, 0.0]


def test_many_brackets_are_not_deep() -> None:
    wide = [[[index]] for index in range(10_000)]
    assert parse_json(json.dumps(wide)) == wide


REFUSED = {
    b"\xff\xfe{": "not UTF-8 text at byte 0",
    b"": "Expecting value",
    b"NaN": "NaN is no JSON number",
    b"[-Infinity]": "-Infinity is no JSON number",
    b"9" * 5000: "an integer has too many digits",
    b'["\\ud800"]': "half of a surrogate pair",
    b'{"\\udfff": 1}': "half of a surrogate pair",
    b'"a\nb"': "Invalid control character",
    b"{} {}": "Extra data",
}


@pytest.mark.parametrize("content", REFUSED)
def test_what_is_refused_says_why(content: bytes) -> None:
    with pytest.raises(ValueError, match=REFUSED[content]):
        parse_json(content)
    assert parse_json(b"[NaN]", constants=True)[0] != 0
    assert parse_json(b'"\\ud83d\\ude00"') == "😀"
    assert parse_json(b'"\\udcff"', halves=True) == "\udcff"


OURS = {
    "bench": "what its own processes say",
    "storage/cache.py": "of its own tree",
    "config/reference.py": "of the package",
    "data/encoder.py": "what the tokenizer itself has said",
    "data/readers/json_rows.py": "a look at the first line; what is read is stricter, with lines",
    "federation/identity.py": "of its own configuration",
    "distributed/watchdog/json_socket.py": "what ranks say to each other",
    "distributed/devices.py": "what ranks say to each other",
    "distributed/meeting.py": "what ranks say to each other",
    "distributed/mpi.py": "what ranks say to each other",
    "distributed/runtime.py": "what ranks say to each other",
    "storage/strict_json.py": "this is it",
    "distributed/watchdog/start.py": "what ranks say to each other",
}
"""Where JSON is parsed that does not come from outside, and why it does not."""


def test_every_file_from_outside_is_read_like_this() -> None:
    package = Path(fedmoe_ds.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        source = file.read_text()
        if "json.load" not in source:
            continue
        for call in ast.walk(ast.parse(source)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("json.loads", "json.load"):
                place = file.relative_to(package)
                found.add("bench" if place.parts[0] == "bench" else str(place))
    assert found <= OURS.keys(), found - OURS.keys()
