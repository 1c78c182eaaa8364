"""The audit of `make check`: a vulnerability fails unless it is accepted with a reason, a missing network is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from audit import ACCEPTED, accepted, installed, judge, probe
from every import every


def found(*packages: tuple[str, list[tuple[str, list[str]]] | str]) -> str:
    """What pip-audit writes: a package has faults (id, aliases), or a reason why it was skipped."""
    told: list[dict[str, Any]] = []
    for name, content in packages:
        if isinstance(content, str):
            told.append({"name": name, "skip_reason": content})
            continue
        faults = [{"id": fault, "aliases": aliases, "fix_versions": ["9.9"], "description": "x"} for fault, aliases in content]
        told.append({"name": name, "version": "1.0", "vulns": faults})
    return json.dumps({"dependencies": told, "fixes": []})


FAULT = ("PYSEC-1", ["CVE-1", "GHSA-1"])
CASES: dict[str, tuple[str, str, str, int, str]] = {
    "nothing": (found(("torch", []), ("numpy", [])), "", "", 0, "audit: 2 packages, 0 known vulnerabilities that"),
    "a fault": (found(("torch", [FAULT])), "Found 1 known vulnerability", "", 1, "error: torch 1.0: PYSEC-1 (fixed in 9.9)"),
    "accepted": (found(("Torch", [FAULT])), "", "PYSEC-1 torch not reachable here", 0, "audit: 1 packages, 0 known"),
    "accepted by another name": (found(("torch", [FAULT])), "", "CVE-1 torch because", 0, "0 known"),
    "of another package": (found(("torch", [FAULT])), "", "PYSEC-1 numpy because", 1, "error: torch"),
    "one of two": (found(("torch", [FAULT, ("PYSEC-2", [])])), "", "PYSEC-1 torch because", 1, "error: torch 1.0: PYSEC-2"),
    "some unknown": (
        found(("torch", "not on PyPI"), ("numpy", [])),
        "",
        "",
        0,
        "that are not accepted; not in the database: torch",
    ),
    "all unknown": (
        found(("torch", "not on PyPI"), ("numpy", "neither")),
        "",
        "",
        0,
        "cannot be reached (it knows none of 2 packages)",
    ),
    "no name server": (
        "",
        "x\nrequests.exceptions.ConnectionError: Max retries exceeded",
        "",
        0,
        "audit skipped: the database",
    ),
    "no answer": ("", "ServiceError: Could not connect to PyPI's vulnerability feed", "", 0, "audit skipped: the database"),
    "a gateway": ("", "HTTPError: 502 Server Error: Bad Gateway for url", "", 0, "audit skipped: the database"),
    "not installed": (
        "",
        "pip-audit: error: no such option",
        "",
        1,
        "error: pip-audit failed: pip-audit: error: no such option",
    ),
    "a bug": ("[]", "Traceback ...\nKeyError: 'x'", "", 1, "error: pip-audit failed: KeyError: 'x'"),
    "silence": ("", "", "", 1, "error: pip-audit failed: it said nothing"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_told_and_whether_it_fails(case: str) -> None:
    out, err, known, code, line = CASES[case]
    ended, lines = judge(out, err, accepted(known))
    assert ended == code and any(line in told for told in lines), lines
    assert (code == 0) == (not any(told.startswith("error: ") for told in lines))
    assert every("\n" not in told for told in lines)


def test_the_database_is_asked_first(tmp_path: Path) -> None:
    """A mirror may answer with something else, or without what is known of a release that has vulnerabilities."""
    page = tmp_path / "page"
    assert "No such file" in str(probe(page.as_uri()))
    for text in ("<html>", "{}", "[]", '{"vulnerabilities": []}'):
        page.write_text(text)
        assert str(probe(page.as_uri())).startswith(page.as_uri())
    page.write_text('{"vulnerabilities": [{"id": "PYSEC-1"}]}')
    assert probe(page.as_uri()) is None


def test_what_is_installed_has_published_versions() -> None:
    found = dict(line.split("==") for line in installed())
    assert {"torch", "deepspeed", "numpy"} <= found.keys() and "fedmoe-ds" not in found
    assert not any("+" in version for version in found.values())


def test_what_is_accepted_has_a_reason() -> None:
    accepted(ACCEPTED.read_text())
    with pytest.raises(ValueError, match="id, package and the reason"):
        accepted("# of nobody\nCVE-1 torch\n")
