"""Checkpoints as files: what is written is read back, damage is seen, old ones go, nothing half-written counts."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import alone
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fedmoe_ds.checkpoint import reader as checkpoint
from fedmoe_ds.checkpoint.reader import MANIFEST, Snapshot, TensorReader
from fedmoe_ds.checkpoint.writer import CheckpointWriter
from fedmoe_ds.errors import UserError

PARTIAL: dict[str, Any] = {
    "done": {"3": {"client": "c", "status": "ok", "tokens": 4, "loss_last": 0.1}},
    "activation": {},
    "seconds": 1.5,
}


def tensors(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"layers.0.a": torch.randn(3, 4, generator=draw), "layers.1.a": torch.randn(3, 4, generator=draw).t()}


@pytest.fixture(params=[False, True], ids=["at once", "background"])
def background(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def save(root: Path, round_index: int, partial: dict[str, Any] | None = None, keep: int = 2, background: bool = False) -> Path:
    snapshot = Snapshot(round_index, {"seed": 1, "local": {"lr": 1e-3}}, 100 * round_index, partial)
    files = {"adapters-00000-of-00001.safetensors": tensors(round_index)}
    writer = CheckpointWriter(root, alone()[0], keep, background)
    writer.begin(snapshot, files, {"config.yaml": "name: x\n"})
    done = writer.finish()
    assert done is not None and (done.round, done.partial) == (round_index, partial is not None)
    assert done.held > 0 and done.seconds > 0 and writer.finish() is None
    return root / checkpoint.folder_name(round_index, partial is not None)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip(tmp_path: Path, background: bool) -> None:
    path = save(tmp_path, 4, PARTIAL, background=background)
    assert names(tmp_path) == ["round-00004-partial"], "nothing else is left"
    assert names(path) == ["adapters-00000-of-00001.safetensors", "config.yaml", "manifest.json"]
    assert path.name == "round-00004-partial" and checkpoint.find_damage(path) is None
    found = checkpoint.read_snapshot(path)
    assert (found.round, found.identity, found.metrics_position, found.partial) == (
        4,
        {"seed": 1, "local": {"lr": 1e-3}},
        400,
        PARTIAL,
    )
    with TensorReader(path, "adapters") as reader:
        assert sorted(reader) == ["layers.0.a", "layers.1.a"] and "layers.2.a" not in reader
        for name, value in tensors(4).items():
            place = torch.zeros_like(value)
            reader.read_into(name, place)
            assert torch.equal(place, value)
        with pytest.raises(UserError, match=r"^checkpoint: layers.2.a: the checkpoint has no such tensor"):
            reader.read_into("layers.2.a", torch.zeros(1))
        with pytest.raises(UserError, match=r"^checkpoint: layers.0.a: shape \(3, 4\), but this run needs \(4, 3\)"):
            reader.read_into("layers.0.a", torch.zeros(4, 3))
    assert (path / "config.yaml").read_text() == "name: x\n"
    assert not list(path.rglob("*.pt")) and not list(path.rglob("*.pkl"))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for round_index in range(1, 5):
        save(tmp_path, round_index)
    assert names(tmp_path) == ["round-00003", "round-00004"]
    save(tmp_path, 4, PARTIAL)  # round 5, interrupted
    assert names(tmp_path) == ["round-00003", "round-00004", "round-00004-partial"]
    assert checkpoint.newest_intact(tmp_path) == (tmp_path / "round-00004-partial", [])
    save(tmp_path, 4, PARTIAL)  # interrupted again
    assert names(tmp_path) == ["round-00003", "round-00004", "round-00004-partial"]
    save(tmp_path, 5)
    assert names(tmp_path) == ["round-00004", "round-00005"], "the interrupted round is finished: its sums go"
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["round-00006"]


def test_order_of_candidates(tmp_path: Path) -> None:
    for name in ("round-00009", "round-00010", "round-00009-partial", "round-00010x", ".writing-round-00011", "notes"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["round-00010", "round-00009-partial", "round-00009"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit of the tensors": lambda path: flip(path / "adapters-00000-of-00001.safetensors"),
    "a bit of the manifest": lambda path: flip(path / MANIFEST),
    "another round number": lambda path: (path / MANIFEST).write_text(
        (path / MANIFEST).read_text().replace('"round": 2', '"round": 7')
    ),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "an empty manifest": lambda path: (path / MANIFEST).write_text(""),
    "a list for a manifest": lambda path: (path / MANIFEST).write_text("[]"),
    "half of the tensors": lambda path: (path / "adapters-00000-of-00001.safetensors").write_bytes(b"x" * 8),
    "a missing file": lambda path: (path / "config.yaml").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    DAMAGES[damage](newest)
    found, notes = checkpoint.newest_intact(tmp_path)
    assert found == before
    assert len(notes) == 1 and notes[0].startswith("checkpoint round-00002 is damaged (")
    assert save(tmp_path, 2) == newest and checkpoint.newest_intact(tmp_path) == (newest, []), "it is written anew"


def test_what_claims_to_be_newer_than_a_new_save_goes(tmp_path: Path) -> None:
    """After a fall-back the damaged one must not survive and be found first by a later start."""
    save(tmp_path, 1)
    damaged = save(tmp_path, 3, keep=5)
    flip(damaged / MANIFEST)
    save(tmp_path, 2, keep=5)
    assert names(tmp_path) == ["round-00001", "round-00002"]


class SlowDisk:
    """Every fsync waits until it is let through, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.full = threading.Event(), False
        self.real = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, handle: int) -> None:
        assert self.open.wait(30)
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.real(handle)


def begin(root: Path, round_index: int) -> CheckpointWriter:
    writer = CheckpointWriter(root, alone()[0], 2, background=True)
    writer.begin(Snapshot(round_index, {}, 0), {"adapters-00000-of-00001.safetensors": tensors(round_index)}, {})
    return writer


def test_nobody_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save(tmp_path, 1)
    disk = SlowDisk(monkeypatch)
    writer = begin(tmp_path, 2)
    assert checkpoint.candidates(tmp_path) == [before], "it is there when all of it is on disk, and not before"
    disk.open.set()
    deadline = time.monotonic() + 30
    while checkpoint.candidates(tmp_path)[0] == before:  # without `finish`
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert checkpoint.newest_intact(tmp_path) == (tmp_path / "round-00002", [])
    done = writer.finish()
    assert done is not None and done.round == 2


def test_what_is_written_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next round changes the adapters before anything of them has reached the disk."""
    changed = threading.Event()

    def save_later(content: dict[str, Tensor], path: Path, metadata: Any) -> None:
        assert changed.wait(30)
        save_file(content, path)

    monkeypatch.setattr("fedmoe_ds.checkpoint.writer.save_file", save_later)
    mine = tensors(1)
    writer = CheckpointWriter(tmp_path, alone()[0], 2, background=True)
    writer.begin(Snapshot(1, {}, 0), {"adapters-00000-of-00001.safetensors": mine}, {})
    for tensor in mine.values():
        tensor.zero_()
    changed.set()
    writer.finish()
    with TensorReader(tmp_path / "round-00001", "adapters") as reader:
        for name, value in tensors(1).items():
            place = torch.zeros_like(value)
            reader.read_into(name, place)
            assert torch.equal(place, value)


def test_a_disk_that_fills_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save(tmp_path, 1)
    disk = SlowDisk(monkeypatch)
    disk.full = True
    writer = begin(tmp_path, 2)
    disk.open.set()
    with pytest.raises(UserError, match=r"^checkpoint: .*: cannot write: .*No space left on device.*--resume auto$"):
        writer.finish()
    assert names(tmp_path) == ["round-00001"] and checkpoint.newest_intact(tmp_path) == (before, [])


def test_a_run_that_ends_with_an_error_leaves_nothing_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    disk = SlowDisk(monkeypatch)
    disk.full = True
    writer = begin(tmp_path, 2)
    disk.open.set()
    writer.drop()
    assert names(tmp_path) == ["round-00001"] and writer.finish() is None


def test_half_written_ones_do_not_count(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    shutil.copytree(good, tmp_path / ".writing-round-00002")
    assert checkpoint.newest_intact(tmp_path) == (good, [])
    save(tmp_path, 2)
    assert names(tmp_path) == ["round-00001", "round-00002"], "the remains of a killed save are cleared"


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99: this version reads formats 2 and 3"):
        checkpoint.read_snapshot(path)


MANIFESTS: dict[str, tuple[Any, str]] = {
    "format": (None, "format: missing"),
    "round": ("1", "round: Input should be a valid integer"),
    "identity": ([], "identity: Input should be"),
    "metrics_position": (-1, "metrics_position: Input should be greater than or equal to 0"),
    "partial": ({}, "partial.done: Field required"),
    "utilisation": ([[1, 2], [3]], "utilisation: .*rows of one length"),
    "files": ({"x": 1}, "files: .*missing|files.x: Input should be a valid string|does not match its checksum"),
}


@pytest.mark.parametrize("field", MANIFESTS)
def test_a_manifest_with_a_field_of_another_type_is_one_line(field: str, tmp_path: Path) -> None:
    """Its checksum may be right all the same."""
    path = save(tmp_path, 1)
    value, message = MANIFESTS[field]
    tree = {**json.loads((path / MANIFEST).read_text()), field: value}
    del tree["checksum"]
    if value is None:
        del tree[field]
    (path / MANIFEST).write_text(json.dumps({**tree, "checksum": checkpoint.checksum(tree)}))
    with pytest.raises(UserError, match=rf"^checkpoint: .*manifest\.json: {message}") as caught:
        checkpoint.read_snapshot(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "content", ["", "[]", "7", "[" * 5000, '{"files": 1}', "9" * 5000, '{"checksum": "\\ud800", "files": {}}']
)
def test_a_manifest_of_anything_is_damage(content: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / MANIFEST).write_text(content)
    assert checkpoint.find_damage(path) is not None
    found, notes = checkpoint.newest_intact(tmp_path)
    assert found is None and len(notes) == 1


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.newest_intact(tmp_path) == (None, [])


@settings(max_examples=60)
@given(
    st.sets(
        st.tuples(
            st.sampled_from([0, 1, 9, 10, 99_998, 99_999, 100_000, 999_999, 10**6]) | st.integers(0, 10**12), st.booleans()
        )
    )
)
def test_candidates_are_ordered_by_number(rounds: set[tuple[int, bool]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for place in rounds:
            (root / checkpoint.folder_name(*place)).mkdir()
        for other in ("round-0000001", "round-٠٠٠٠١", "round-1", "round-00001-partial-partial", "round-", "round-00001 "):
            (root / other).mkdir()
        found = checkpoint.candidates(root)
        assert [checkpoint.progress_of(path) for path in found] == sorted(rounds, reverse=True), "and other names are none"


def test_the_newest_are_kept_beyond_five_digits(tmp_path: Path, background: bool) -> None:
    for round_index in (99_998, 99_999, 100_000):
        save(tmp_path, round_index, background=background)
    assert names(tmp_path) == ["round-100000", "round-99999"]
    assert checkpoint.newest_intact(tmp_path) == (tmp_path / "round-100000", [])
    save(tmp_path, 100_000, PARTIAL, background=background)
    assert checkpoint.newest_intact(tmp_path)[0] == tmp_path / "round-100000-partial"
    save(tmp_path, 100_001, background=background)
    assert names(tmp_path) == ["round-100000", "round-100001"]
    flip(save(tmp_path, 1_000_000, keep=9) / MANIFEST)
    save(tmp_path, 100_002, keep=9)
    assert names(tmp_path) == ["round-100000", "round-100001", "round-100002"], "what claims to be newer was damaged"


def sign(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and let it say so, as whoever wrote it on purpose would."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["checksum"]
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest | {"checksum": checkpoint.checksum(manifest)}))


ELSEWHERE = ["../secret", "/etc/passwd", "..", ".", "", "a/b", "a\0b", "./config.yaml", "../round-00002/config.yaml", "a\\b"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_manifest_names_files_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("mine")
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    sign(newest, lambda manifest: manifest["files"].update({name: checkpoint.sha256_of(tmp_path / "secret")}))
    found, notes = checkpoint.newest_intact(tmp_path)
    assert found == before and "no name of a file in this folder" in notes[0]


@pytest.mark.parametrize("kept", [[], ["config.yaml"]])
def test_a_manifest_without_tensors_is_damaged(tmp_path: Path, kept: list[str]) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    sign(newest, lambda manifest: manifest.update(files={name: manifest["files"][name] for name in kept}))
    assert checkpoint.newest_intact(tmp_path) == (
        before,
        ["checkpoint round-00002 is damaged (manifest.json lists no tensors); falling back to the one before"],
    )


def test_what_is_not_listed_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    listed = set(checkpoint.read_snapshot(path).files)
    save_file({"layers.0.a": torch.ones(3, 4), "layers.9.a": torch.ones(1)}, path / "adapters-00001-of-00001.safetensors")
    (path / "other").mkdir()
    assert checkpoint.newest_intact(tmp_path) == (path, [])
    for files in (None, listed):
        with TensorReader(path, "adapters", files) as reader:
            assert sorted(reader) == ["layers.0.a", "layers.1.a"]
            place = torch.zeros(3, 4)
            reader.read_into("layers.0.a", place)
            assert torch.equal(place, tensors(1)["layers.0.a"])


@pytest.mark.parametrize("file", ["config.yaml", MANIFEST, "adapters-00000-of-00001.safetensors", ""])
def test_links_and_pipes_in_a_checkpoint_are_damage(tmp_path: Path, file: str) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    place = newest / file
    moved = place.rename(tmp_path / "moved")
    place.symlink_to(moved)
    assert checkpoint.newest_intact(tmp_path)[0] == before
    place.unlink()
    if file:
        os.mkfifo(place)
        assert checkpoint.newest_intact(tmp_path)[0] == before, "and nobody waits for the other end"
