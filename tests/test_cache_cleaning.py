"""The cache is listed and cleaned by hand: by age and kind, past what is in use, past links, and past strangers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmoe_ds.commands import cache as command
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage import cache, cleaning, in_use

DAY_S = 86400.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three entries that an earlier process has made."""
    for kind, key, days in (("data", "old", 9), ("data", "new", 1), ("foundations", "model", 4)):
        entry = tmp_path / "cache" / kind / key
        entry.mkdir(parents=True)
        (entry / "content.bin").write_bytes(b"x" * 1000)
        (entry / "header.json").write_text(json.dumps({"made_from": f"{key}.jsonl"}))
        os.utime(entry, (time.time() - days * DAY_S,) * 2)
    return tmp_path / "cache"


def kept(root: Path) -> set[str]:
    return {path.name for kind in cache.KINDS for path in root.glob(f"{kind}/*")}


def test_the_list_says_kind_size_age_and_source(root: Path) -> None:
    lines = cleaning.listing(root).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["foundations", "data", "data"], "the largest first"
    assert "9.0 d  old  old.jsonl" in next(line for line in lines if " old " in line)
    assert lines[-1].startswith("3 entries, 0.0 MiB in ")
    assert cleaning.listing(root, "native").endswith("nothing is kept")


def test_cleaning_by_age_and_kind_tells_what_went(root: Path) -> None:
    assert list(cleaning.clean(root, older_than_days=10))[-1].startswith("0 entries removed")
    first, last = cleaning.clean(root, older_than_days=2, kind="data")
    assert first.startswith("removed: data old, 0.0 MiB, last used 9.0 d ago  old.jsonl") and last.startswith(
        "1 entries removed"
    )
    assert kept(root) == {"new", "model"}
    list(cleaning.clean(root))
    assert kept(root) == set()


def test_what_a_process_uses_stays_until_it_ends(root: Path) -> None:
    entry, code = root / "data" / "old", "import pathlib, sys; from fedmoe_ds.storage import cache\n"
    code += "assert cache.usable(pathlib.Path(sys.argv[1]), lambda: True); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(entry)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None and user.stdout.readline()
        lines = list(cleaning.clean(root))
        assert "kept: data old: in use" in lines and kept(root) == {"old"}
        user.communicate(b"\n")
    assert kept(root) == {"old"} and "last used 0.0 h ago" in next(cleaning.clean(root)), "its age counts from that use"
    assert kept(root) == set()


def test_a_new_entry_is_in_use_by_its_writer(root: Path) -> None:
    made = root / "data" / "made"
    with cache.draft(made, lambda: False) as folder:
        (folder / "content.bin").write_bytes(b"y")
        assert "kept" not in "".join(cleaning.clean(root)), "a draft is no entry, and its writer has a lock"
    assert "kept: data made: in use" in list(cleaning.clean(root)) and (made / "content.bin").read_bytes() == b"y"
    shutil.rmtree(made)
    assert not in_use.hold(made) and not cache.usable(made, lambda: True), "one that has gone is made anew"


def test_links_and_strangers_are_left_alone(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(root / "data" / "old", elsewhere / "precious")
    (root / "data" / "linked").symlink_to(elsewhere / "precious")
    (root / "data" / "old" / "inside").symlink_to(elsewhere)
    (root / "native").symlink_to(elsewhere)
    (root / "foundations" / "model").chmod(0o777)
    list(cleaning.clean(root))
    assert (elsewhere / "precious" / "content.bin").exists() and kept(root) == {"linked", "precious", "model"}


def test_the_command_asks_nothing_and_says_what_is_missing(root: Path) -> None:
    for words, message in (
        (["clean"], "clean: say what goes: either --older-than DAYS, or --all"),
        (["clean", "--all", "--older-than", "3"], "clean: say what goes"),
        (["clean", "--older-than", "nan"], "--older-than: nan: must be 0 or more days"),
        (["list", "--all"], "list: --all and --older-than are for clean"),
    ):
        with pytest.raises(UserError, match=message):
            command.main([*words, "--cache", str(root)])
    assert kept(root) == {"old", "new", "model"}
    assert command.main(["clean", "--older-than", "3", "--cache", str(root)]) == 0 and kept(root) == {"new"}
