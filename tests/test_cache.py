"""The cache: every kind of entry, made and found as a run does, among strangers, damage, killed writers and full disks."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import os
import resource
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import every

from fedmoe_ds.config import PretrainConfig
from fedmoe_ds.data import federated, wheels
from fedmoe_ds.data.dealing import Prepared
from fedmoe_ds.data.omissions import Omissions
from fedmoe_ds.data.ragged import Ragged
from fedmoe_ds.data.sequences import Sequences
from fedmoe_ds.data.wheels import Wheel
from fedmoe_ds.errors import EXIT_LOST, UserError
from fedmoe_ds.foundation import file_sums
from fedmoe_ds.foundation.builtin import pretrain
from fedmoe_ds.foundation.mapped_weights import MappedWeights, Memory, Slot
from fedmoe_ds.kernels import compiling, fault
from fedmoe_ds.storage import cache

STRANGER = 12345
LARGE = 1 << 20
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away or become another user")


def use_data(root: Path) -> federated.FederatedData:
    tokens = np.arange(LARGE // 8, dtype=np.int64)
    owned = Ragged.joined([np.zeros(1, np.int64)] * 3)  # one sequence, in the training set and both hold-outs
    made = Prepared(["ann"], Sequences([tokens], [tokens > 0]), owned, ["all"], np.ones((1, 1), np.int64), Omissions(rows=1))
    return federated._found_or_made(cache.place(root, "data") / "key", lambda: made, {"sequence_length": len(tokens)})


def use_native(root: Path) -> Any:
    os.environ["FEDMOE_CACHE"] = str(root)
    compiling.library.cache_clear()
    return compiling.library("fault")


def use_foundations(root: Path) -> Path:
    return pretrain.pretrain_preset("nano-olmoe", PretrainConfig(), 0, root, lambda text: None)


def use_shared(root: Path) -> Memory:
    def fill(memory: Memory) -> None:
        memory["x"].fill_(1.5)

    weights = MappedWeights(cache.place(root, "shared"), "f", "dense", [Slot("x", (LARGE // 4,), torch.float32)])
    weights.ensure(fill)
    return weights.map()


def use_wheels(root: Path) -> Path:
    def bring(wheel: Wheel, folder: Path, where: str) -> Path:
        (folder / "brought.whl").write_bytes(b"x" * LARGE)
        return folder / "brought.whl"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheels, "_download", bring)
        return Wheel("a", "1", hashlib.sha256(b"x" * LARGE).hexdigest()).fetch(root, "data.source: a")


def use_sums(root: Path) -> str:
    model = Path(str(shutil.which("g++"))).with_name("model.safetensors")  # where every user can read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_sums, "WORTH", LARGE)
        patch.setattr(file_sums, "_SETTLED_NS", 0)  # it has just been written
        return file_sums.file_sum(model, cache.place(root, "sums"))


USES: dict[str, Callable[[Path], Any]] = {
    "data": use_data,
    "native": use_native,
    "foundations": use_foundations,
    "shared": use_shared,
    "sums": use_sums,
    "wheels": use_wheels,
}
"""Find an entry or make it, as a run does."""


class Trained:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"x" * LARGE)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Path]:
    """A folder with a g++ that has compiled fault.cpp once and hands out copies of it."""
    folder = Path(tempfile.mkdtemp(prefix="fedmoe-test-"))
    folder.chmod(0o755)
    command = [str(shutil.which("g++")), *compiling.FLAGS, str(Path(compiling.__file__).with_name("fault.cpp"))]
    compiling.subprocess.run([*command, "-o", str(folder / "built.so")], check=True)
    script = f'case "$1" in --version) echo 1;; *) for last; do :; done; cat {folder}/built.so > "$last";; esac'
    (folder / "g++").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "model.safetensors").write_bytes(b"x" * LARGE)
    for path in folder.iterdir():
        path.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def root(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder that is not there yet, in a folder that every user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="fedmoe-test-"))
    folder.chmod(0o755)
    monkeypatch.setenv("PATH", f"{compiler}:{os.environ['PATH']}")
    monkeypatch.setenv("FEDMOE_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setattr(pretrain, "_plan", lambda *_: ("key", lambda state: ([Trained()], {})))
    before = os.umask(0o002)  # the group could write, if it were for the umask
    cache.passed_over()
    yield folder / "cache"
    os.umask(before)
    cache.passed_over()
    compiling.library.cache_clear()
    shutil.rmtree(folder)


def entries(root: Path) -> dict[Path, int]:
    """Everything below the kinds' folders, wherever these are, with its inode: drafts and leftovers as well."""
    kinds = [path for path in root.rglob("*") if path.name in cache.KINDS and path.is_dir()]
    return {path: path.stat().st_ino for kind in kinds for path in kind.iterdir()}


def told() -> str | None:
    return cache.line([cache.passed_over()])


@contextlib.contextmanager
def user(number: int) -> Iterator[None]:
    """This process as another user's."""
    os.setresuid(number, number, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def in_child(action: Callable[[], Any]) -> int:
    """The id of a forked process that runs an action and ends; 3 if it failed."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return pid


def ending(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_every_kind_is_used_here() -> None:
    # Of scratch no entry is ever seen; tests/test_personal_state.py uses it.
    assert USES.keys() | {"scratch"} == cache.KINDS.keys()


@pytest.mark.parametrize("kind", USES)
def test_an_entry_is_made_once_and_nobody_else_can_write_it(kind: str, root: Path) -> None:
    assert USES[kind](root)
    first = entries(root)
    assert len(first) == 1 and USES[kind](root) and entries(root) == first and told() is None
    private = kind in ("data", "native")
    for path in (root, root / kind, *(root / kind).rglob("*")):
        most = 0o777 if path.is_dir() else 0o666
        expected = most & 0o700 if private and path != root else most & 0o755
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


WAYS = {"its owner": None, "its group's bits": 0o020, "everybody's bits": 0o002}
PLACES = ("entry", "file", "kind", "root")


@NEEDS_ROOT
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", USES)
def test_what_somebody_else_may_have_written_is_made_anew(kind: str, way: str, place: str, root: Path) -> None:
    """An entry in doubt is replaced; with the folders above it in doubt, entries are kept in a folder of this user's own."""
    USES[kind](root)
    (entry,) = first = entries(root)
    there = {"entry": entry, "file": next(entry.iterdir()), "kind": root / kind, "root": root}[place]
    if WAYS[way] is None:
        os.chown(there, STRANGER, STRANGER)
    else:
        there.chmod(there.stat().st_mode | (WAYS[way] or 0))
    assert USES[kind](root)
    line = told()
    assert line is not None and line.startswith(f"foundation.cache: {there} ") and "\n" not in line and "more" not in line
    assert f"belongs to user {STRANGER}" in line if WAYS[way] is None else "can be written by its group or by everybody" in line
    second = entries(root)
    if place in ("entry", "file"):
        assert second.keys() == first.keys() and second != first and "made anew" in line
    else:
        own = root / f"user-{os.geteuid()}" / kind
        assert second.keys() - first.keys() == {own / entry.name} and f"entries are kept in {own.parent}" in line
        assert stat.S_IMODE(own.parent.stat().st_mode) == 0o700
    assert USES[kind](root) and entries(root) == second
    assert (told() is None) == (place in ("entry", "file"))


@NEEDS_ROOT
@pytest.mark.parametrize("kind", USES)
def test_a_cache_of_root_serves_everybody(kind: str, root: Path) -> None:
    """As far as others may read it: not clients' data, and compiled code only where root has opened the folder."""
    USES[kind](root)
    first = entries(root)
    if kind == "native":
        for path in (root / kind, *(root / kind).rglob("*")):
            path.chmod(0o755)
    with user(STRANGER):
        if kind == "data":
            with pytest.raises(UserError, match=r"^foundation\.cache: .*data cannot be read by this user: not used"):
                USES[kind](root)
        else:
            assert USES[kind](root) and told() is None
    assert entries(root) == first


@NEEDS_ROOT
@pytest.mark.parametrize("kind", USES)
def test_a_colleagues_cache(kind: str, root: Path) -> None:
    """It cannot be written: the folder at home is used, and where there is no home, too, one line says so."""
    root.mkdir(mode=0o755)
    os.chown(root, STRANGER + 1, STRANGER + 1)
    with user(STRANGER + 1):
        USES[kind](root)
        cache.passed_over()
    home = root.parent / "home"
    with user(STRANGER):
        if kind == "native":
            assert USES[kind](root)  # built for this process alone
            line = told()
            assert line is not None and "every process builds its own" in line and str(root) in line
        else:
            with pytest.raises(
                UserError, match=rf"^foundation\.cache: {root} belongs to user {STRANGER + 1}, .*choose another"
            ):
                USES[kind](root)
    home.mkdir()
    os.chown(home, STRANGER, STRANGER)
    with user(STRANGER):
        assert USES[kind](root)
        line = told()
        assert line is not None and line.endswith(f"entries are kept in {home / '.cache' / 'fedmoe_ds'}")
        kept = entries(home)
        assert len(kept) == 1 and USES[kind](root) and entries(home) == kept


@NEEDS_ROOT
def test_a_folder_that_somebody_has_prepared_for_this_user(root: Path) -> None:
    """In a folder where everybody may write, as /tmp, a stranger can take this user's name first."""
    root.mkdir()
    root.chmod(0o1777)
    (root / f"user-{os.geteuid()}").mkdir()
    os.chown(root / f"user-{os.geteuid()}", STRANGER, STRANGER)
    use_data(root)
    assert not entries(root) and len(entries(root.parent / "home")) == 1


@pytest.mark.parametrize("kind", USES)
def test_killed_writers_leave_nothing_for_long(kind: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start removes drafts without a writer, at any size, and leaves alone those that are being written."""

    def pause(*_: Any) -> None:
        os.write(ready[1], b"x")
        time.sleep(60)

    ready, publish = os.pipe(), cache._publish
    monkeypatch.setattr(cache, "_publish", pause)
    writer = in_child(lambda: USES[kind](root))
    assert os.read(ready[0], 1)
    (living,) = entries(root)
    monkeypatch.setattr(cache, "_publish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert ending(in_child(lambda: USES[kind](root))) == -signal.SIGKILL
    drafts = entries(root)
    assert len(drafts) == 2 and every(any(path.rglob("*")) for path in drafts)
    monkeypatch.setattr(cache, "_publish", publish)
    assert USES[kind](root)
    assert len(entries(root)) == 2 and living in entries(root), "a living writer's draft and the entry"
    os.kill(writer, signal.SIGKILL)
    assert ending(writer) == -signal.SIGKILL
    assert USES[kind](root)
    assert len(entries(root)) == 1 and living not in entries(root), "it goes even if nothing is to be written"


@pytest.mark.parametrize("kind", USES)
def test_leftovers_of_earlier_versions(kind: str, root: Path) -> None:
    """Their drafts hold no lock: they go after a day."""
    USES[kind](root)
    yesterday = time.time() - 90_000
    for name in (".staging-old", ".partial-old", "tmpabcdefgh", ".replaced-old"):
        (root / kind / name).mkdir()
        (root / kind / name / "large").write_bytes(b"x")
        os.utime(root / kind / name, (yesterday, yesterday))
    (root / kind / ".staging-new").mkdir()
    (root / kind / ".replaced-new").mkdir()
    USES[kind](root)
    assert {path.name for path in entries(root)} >= {".staging-new"} and len(entries(root)) == 2


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("kind", USES)
def test_six_writers_of_one_entry(kind: str, damaged: bool, root: Path) -> None:
    if damaged:
        USES[kind](root)
        (entry,) = entries(root)
        for path in entry.iterdir():
            path.unlink()
    writers = [in_child(lambda: USES[kind](root)) for _ in range(6)]
    assert [ending(pid) for pid in writers] == [0] * 6
    assert len(entries(root)) == 1 and USES[kind](root)


@pytest.mark.parametrize("kind", USES)
def test_a_full_disk_leaves_nothing_behind(kind: str, root: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 if kind == "sums" else 4096, hard))
    try:
        if kind == "native":
            assert USES[kind](root) is None
        elif kind == "sums":  # it costs time alone
            assert USES[kind](root) and "cannot be written" in str(told())
        else:
            with pytest.raises((UserError, OSError), match=r"too large|cannot be written"):
                USES[kind](root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not entries(root)
    assert USES[kind](root) and len(entries(root)) == 1


@NEEDS_ROOT
@pytest.mark.parametrize("kind", USES)
def test_a_folder_that_cannot_be_written(kind: str, root: Path) -> None:
    """An entry of root's is found there; a missing one is one line, or built for this process alone."""
    (root / kind).mkdir(parents=True)
    for path in (root, root / kind):
        path.chmod(0o755)
    with user(STRANGER):
        if kind == "native":
            assert USES[kind](root)
            assert "every process builds its own" in str(told())
        elif kind == "sums":
            assert USES[kind](root)
            assert "cannot be written: Permission denied" in str(told())
        else:
            with pytest.raises((UserError, OSError), match="Permission denied"):
                USES[kind](root)
    assert not entries(root)


def test_clients_data_of_earlier_versions_is_closed(root: Path) -> None:
    use_data(root)
    first = entries(root)
    everything = [root / "data", *(root / "data").rglob("*")]
    for path in everything:
        path.chmod(0o755 if path.is_dir() else 0o644)
    use_data(root)
    assert entries(root) == first and not any(path.stat().st_mode & 0o077 for path in everything)


def change(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def detach(path: Path) -> None:
    """Put a copy in the place of a file. This process has libraries mapped: what is cut off a file is gone in memory, too, and
    the process that ends would jump to nowhere."""
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "its first bit": lambda path: change(path, 0),
    "a bit in the middle": lambda path: change(path, 0.3),
    "its last bit": lambda path: change(path, 1),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "no text": lambda path: path.write_bytes(b"\xff" * 64),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("part", ["largest", "smallest"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", USES)
def test_a_damaged_entry_is_made_anew_once(
    kind: str, damage: str, part: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two files, what was kept or what tells its checksum. A damaged library is never loaded: it may do anything."""

    def load(name: str) -> Any:
        assert Path(name).read_bytes() == built
        return loaded(name)

    USES[kind](root)
    (entry,) = entries(root)
    before = {path: path.read_bytes() for path in entry.iterdir()}
    path = (max if part == "largest" else min)(before, key=lambda path: len(before[path]))
    loaded, built = compiling.ctypes.CDLL, before.get(entry / compiling.LIBRARY)
    monkeypatch.setattr(compiling.ctypes, "CDLL", load)
    detach(path)
    DAMAGES[damage](path)
    assert USES[kind](root)
    assert {path: path.read_bytes() for path in entry.iterdir()} == before
    assert told() == f"foundation.cache: {entry} is damaged: made anew"
    assert USES[kind](root) and told() is None and len(entries(root)) == 1


@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize("kind", ["data", "shared"])
def test_a_file_that_is_cut_while_it_is_mapped(kind: str, compiles: bool, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends with one line that names it, and EXIT_LOST; without a compiler, with a traceback."""
    opened = USES[kind](root)
    file = max((root / kind).rglob("*"), key=lambda path: path.stat().st_size)
    compiling.library.cache_clear()
    if not compiles:
        monkeypatch.setenv("PATH", "/nowhere")
    reading, writing = os.pipe()

    def read() -> None:
        os.dup2(writing, 2)
        faulthandler.disable()  # pytest's; and other tests may have guarded this process already
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        fault.guard("rank 3 on here")
        os.truncate(file, 4096)
        values = opened["x"].numpy() if kind == "shared" else opened.train(0).input_ids[0]
        values.sum()

    pid = in_child(read)
    code = ending(pid)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    if compiles:
        assert code == EXIT_LOST and said.count("\n") == 1, (code, said)
        assert said.startswith(f"error: rank 3 on here: {file} was mapped") and "--resume auto" in said
    else:
        assert code == -signal.SIGBUS and "Fatal Python error: Bus error" in said


def test_a_bus_error_of_another_kind_stays_what_it_is(root: Path) -> None:
    def die() -> None:
        fault.guard("rank 0 on here")
        os.kill(os.getpid(), signal.SIGBUS)

    use_native(root)
    assert ending(in_child(die)) == -signal.SIGBUS


def test_one_line_for_all_ranks() -> None:
    assert cache.line([[], []]) is None
    assert cache.line([["a"], ["a"], ["a"]]) == "foundation.cache: a"
    assert cache.line([["a", "b"], ["a"], ["c"]]) == "foundation.cache: a (and 2 more)"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(UserError, match=r"^foundation\.cache: ~/cache: this user has no home folder; set another one"):
        cache.root("~/cache")


@NEEDS_ROOT
@pytest.mark.parametrize("kind", USES)
def test_an_entry_of_a_colleague_in_this_users_own_cache(kind: str, root: Path) -> None:
    """It was made when the folder was open to both; only its owner can remove it, but it no longer stands in the way."""
    root.mkdir(mode=0o755)
    os.chown(root, STRANGER, STRANGER)
    with user(STRANGER):
        USES[kind](root)
        (entry,) = first = entries(root)
        for path in (entry, *entry.iterdir()):
            path.chmod(0o755)
    for path in (entry, *entry.iterdir()):
        os.chown(path, STRANGER + 1, STRANGER + 1)
    with user(STRANGER):
        assert USES[kind](root)
        assert str(told()).startswith(f"foundation.cache: {entry} belongs to user {STRANGER + 1}")
        second = entries(root)
        assert entry in second and second[entry] != first[entry]
        assert USES[kind](root) and told() is None and entries(root) == second
