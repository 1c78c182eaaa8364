"""Huge pages: a process asks for them once, keeps its id and its words, and leaves alone what somebody else has said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmoe_ds.commands import program
from fedmoe_ds.distributed import huge_pages

ASKING = """
import os, sys
from fedmoe_ds.distributed import huge_pages
print(os.getpid(), flush=True)
huge_pages.begin_again(sys.argv[1:])
print(os.environ.get("GLIBC_TUNABLES"), sys.flags.utf8_mode, *sys.argv[1:])
"""
OFFERS = {"always [madvise] never": True, "[always] madvise never": False, "always madvise [never]": False}


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system that gives huge pages on request."""
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_OFFERED", file)
    monkeypatch.setattr(huge_pages, "_glibc", lambda: (2, 36))
    return file


@pytest.mark.parametrize(("text", "asks"), OFFERS.items())
def test_only_where_it_makes_a_difference(offered: Path, text: str, asks: bool) -> None:
    offered.write_text(text)
    assert bool(huge_pages.variables({})) is asks
    offered.unlink()
    assert huge_pages.variables({}) == {}


@pytest.mark.parametrize("version", [(), (2, 34)])
def test_other_libraries_are_not_asked(offered: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]) -> None:
    monkeypatch.setattr(huge_pages, "_glibc", lambda: version)
    assert huge_pages.variables({}) == {}


def test_what_a_user_has_said_stands(offered: Path) -> None:
    assert huge_pages.variables({}) == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    kept = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}
    assert huge_pages.variables(kept) == {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"}
    assert huge_pages.variables({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) == {}
    assert huge_pages.variables(huge_pages.variables({})) == {}, "a process begins again once"


def test_a_process_begins_again_under_its_id() -> None:
    clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "utf8", "-c", ASKING, "a=b", "--c"]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    *numbers, last = done.stdout.split("\n")[:-1]
    asked = huge_pages.variables({}).get("GLIBC_TUNABLES")
    assert last == f"{asked} 1 a=b --c" and len(numbers) == (1 if asked is None else 2) and len(set(numbers)) == 1


def test_who_calls_from_within_goes_on(offered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the subcommands only training begins again, and only in a process that was started for it."""
    begun = list[list[str]]()
    monkeypatch.setattr(huge_pages.os, "execve", lambda _, words, __: begun.append(words))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    huge_pages.begin_again(["train", "--config", "x.yaml"])
    huge_pages.begin_again([])
    assert begun == []
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "train.py", "--config", "x.yaml"])
    huge_pages.begin_again(["--config", "x.yaml"])
    assert begun == [[sys.executable, "-u", "train.py", "--config", "x.yaml"]]
    asked = list[list[str]]()
    monkeypatch.setattr(huge_pages, "begin_again", asked.append)
    for words in (["train", "--help"], ["cache", "--help"], ["plan", "--help"]):
        monkeypatch.setattr(sys, "argv", ["fedmoe", *words])
        with pytest.raises(SystemExit):
            program.main()
    assert asked == []
