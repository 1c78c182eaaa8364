"""Modes: of every file and folder that a run writes: results follow the umask, clients' own is private, nobody else writes the
cache."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import federations
import pytest
import torch
from launching import changed, run
from transformers import OlmoeForCausalLM

from fedmoe_ds.checkpoint.reader import PRIVATE, Snapshot, newest_intact
from fedmoe_ds.checkpoint.writer import CheckpointWriter
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.builtin import pretrain
from fedmoe_ds.foundation.builtin.presets import find_preset
from fedmoe_ds.foundation.mapped_weights import MappedWeights, Slot
from fedmoe_ds.storage import cache
from fedmoe_ds.storage.file_modes import follow_umask, umask
from fedmoe_ds.studies.runner import locked

MASKS = [0o027, 0o002, 0o077]


@contextmanager
def masked(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def allowed(path: Path, root: Path) -> int:
    """The bits that a file or folder may have under an umask of 0."""
    kind = path.relative_to(root).parts[0]
    if root.name == "cache":
        own, readable = cache.KINDS[kind], 0o755
    else:
        own, readable = path.name.startswith(PRIVATE), 0o777
    most = 0o700 if own else readable
    return most if path.is_dir() else most & 0o666


def check(root: Path, mask: int, *expected: str) -> None:
    """Everything below a folder. `expected` are patterns that have to be there."""
    for pattern in expected:
        assert list(root.glob(pattern)), pattern
    for path in root.rglob("*"):
        if path.is_symlink() or path.is_socket():
            continue
        most, found = allowed(path, root), stat.S_IMODE(path.stat().st_mode)
        assert found == most & ~mask, f"{path.relative_to(root)}: {found:o}, umask {mask:o} means {most & ~mask:o}"


@pytest.mark.parametrize("mask", MASKS, ids=oct)
def test_a_file_of_a_library_and_a_folder(mask: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o600)
    (tmp_path / "folder").mkdir(0o700)
    with masked(mask):
        assert umask() == mask
        for name in ("file", "folder"):
            follow_umask(tmp_path / name)
    check(tmp_path, mask, "file", "folder")


def test_the_umask_where_the_system_does_not_tell_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fedmoe_ds.storage.file_modes._STATUS", tmp_path / "none")
    with masked(0o027):
        assert umask() == 0o027 == umask()


@pytest.mark.parametrize("mask", MASKS[:2], ids=oct)
def test_what_a_run_in_this_process_writes(mask: int, tmp_path: Path) -> None:
    """A pre-trained foundation, prepared data, checkpoints, the run folder, mapped weights, absences, a study's folder."""
    with masked(mask):
        with cache.draft(tmp_path / "cache" / "foundations" / "key", bool) as draft:  # to train would take long
            pretrain._save([OlmoeForCausalLM(find_preset("nano-olmoe").config())], {}, draft)
        (tmp_path / "inputs").mkdir()
        federations.write_inputs(tmp_path / "inputs")
        config = federations.make_config(
            tmp_path / "inputs",
            "small",
            {
                "output": str(tmp_path / "runs"),
                "foundation": {"cache": str(tmp_path / "cache")},
                "method": {"name": "fedsa-lora"},
            },
        )
        parts, journal = federations.build(config, *federations.alone())
        parts.skipped.add(2, 5)
        federations.finish(parts, journal)
        journal.report()
        weights = MappedWeights(tmp_path / "cache" / "shared", "f", "dense", [Slot("x", (3,), torch.float32)])
        weights.ensure(lambda memory: None)
        with locked(tmp_path / "study"):
            pass
    files = ("foundations/*/model.safetensors", "data/**/header.json", "shared/*/weights.bin")
    check(tmp_path / "cache", mask, *files)
    check(tmp_path / "runs", mask, "small/checkpoints/round-*/personal-*.safetensors", "small/absent.jsonl", "small/*.html")
    check(tmp_path / "study", mask, ".lock")


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_what_the_command_writes(nano: dict[str, Any], tmp_path: Path) -> None:
    """Two ranks and an empty cache: kernels are built, the foundation is pre-trained, weights are shared."""
    mask = 0o027
    foundation = {"preset": "nano-olmoe", "cache": str(tmp_path / "cache"), "pretrain": {"steps": 2}}
    tree = changed(nano, output=str(tmp_path / "runs"), foundation=foundation)
    assert run(tree, tmp_path, ranks=2, prepare=lambda: os.umask(mask) and None).digest
    check(tmp_path / "cache", mask, "foundations/*/model.safetensors", "shared/*/weights.bin", "data/**/header.json")
    check(tmp_path / "runs", mask, "nano/checkpoints/round-*/*.safetensors", "nano/metrics.jsonl")


@pytest.mark.parametrize("mask", MASKS, ids=oct)
def test_what_of_a_checkpoint_is_a_clients_own(mask: int, tmp_path: Path) -> None:
    files = {
        f"{part}-00000-of-00001.safetensors": {"x": torch.zeros(3)} for part in ("adapters", "personal", "server.m", "sums")
    }
    with masked(mask):
        writer = CheckpointWriter(tmp_path / "checkpoints", federations.alone()[0], 2, background=False)
        writer.begin(Snapshot(1, {}, 0), files, {"config.yaml": "name: x\n"})
        assert writer.finish() is not None
    check(tmp_path / "checkpoints", mask, *(f"round-00001/{name}" for name in files))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_checkpoint_that_another_user_wrote_is_not_taken_for_damaged() -> None:
    """Beginning again would remove it."""
    folder = Path(tempfile.mkdtemp(prefix="fedmoe-test-"))
    try:
        folder.chmod(0o755)
        with masked(0o022):
            writer = CheckpointWriter(folder, federations.alone()[0], 2, background=False)
            writer.begin(Snapshot(1, {}, 0), {"personal-00000-of-00001.safetensors": {"x": torch.zeros(3)}}, {})
            writer.finish()
        os.setresuid(12345, 12345, 0)
        try:
            with pytest.raises(UserError, match=r"^output: .*personal-.*: cannot be read: Permission denied; .* as that user"):
                newest_intact(folder)
        finally:
            os.setresuid(0, 0, 0)
        assert newest_intact(folder) == (folder / "round-00001", [])
    finally:
        shutil.rmtree(folder)
