"""docs/python.md: every example is executed, and the table of public names is complete."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fedmoe_ds

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
FILES = {match[1]: block for block in BLOCKS if (match := re.match(r"# (\w+\.py)\n", block))}
"""Examples that are modules of their own; the others are one program."""


def test_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program: dict[str, Any] = {}
    blocks = [block for block in BLOCKS if block not in FILES.values()]
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), program)  # noqa: S102  (our own page)
    out = capsys.readouterr().out
    assert len(blocks) == 5 and len(FILES) == 2
    assert f"digest: {program['result'].digest}\nrun: tiny/runs/first\n" in out
    assert "4 clusters x ep_size 4 = 16 ranks" in out and "round 2  tier 8  perplexity " in out
    assert "('fedit', '8'): " in out and "federation.round: unknown key; did you mean 'rounds'?" in out


@pytest.mark.cluster
def test_the_method_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, block in FILES.items():
        (tmp_path / name).write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        importlib.import_module("test_equal").test_equal(tmp_path / "check")
    finally:
        for name in ("equal", "test_equal"):
            sys.modules.pop(name, None)


def test_public_names() -> None:
    rows = dict(re.findall(r"^\| `(fedmoe_ds[.\w]*)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows["fedmoe_ds"])) == set(fedmoe_ds.__all__)
    assert set(re.findall(r"`(\w+)`", rows["fedmoe_ds.testing"])) == set(importlib.import_module("fedmoe_ds.testing").__all__)
    assert set(re.findall(r"^\| `(\w+)`?", PAGE.read_text(), re.MULTILINE)) >= {"evaluations", "adapters", "digest"}
    members = [name for name in vars(fedmoe_ds.Result) if not name.startswith("_")]
    table = PAGE.read_text()[PAGE.read_text().index("## What comes back") :]
    assert [name for name in [*members, "folder", "interrupted"] if f"`{name}" not in table] == []
