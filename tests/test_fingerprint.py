"""The fingerprint of a foundation: the bytes that ranks read for it, when they read them again, and hosts that differ."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from every import every

from fedmoe_ds.bench.harness.shapes import SHAPES, write_model
from fedmoe_ds.distributed.runtime import attempt
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import file_sums
from fedmoe_ds.foundation import fingerprint as prints
from fedmoe_ds.storage import cache, mounts

T = TypeVar("T")
Reads = Counter[tuple[str, str]]
"""How often each file of a host was read whole, by host and name."""


class Meeting:
    """A world of threads, with what a fingerprint needs of one."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60.0)

    def rank(self, number: int) -> Any:
        meeting = self

        class Ranks:
            rank = number

            def gather(self, value: Any) -> list[Any]:
                meeting.slots[number] = json.dumps(value)
                meeting.barrier.wait()
                found = [json.loads(text) for text in meeting.slots]
                meeting.barrier.wait()
                return found

            def run_on_all_ranks(self, action: Callable[[], T]) -> T:
                result, failure = attempt(action)
                failures = [text for text in self.gather(failure) if text is not None]
                if failures:
                    raise UserError(failures[0])
                return result  # type: ignore[return-value]

        return Ranks()


def in_world(hosts: list[str], folder: Callable[[int], Path], place: Path) -> list[Any]:
    """The fingerprint, or the error, of every rank; every host has a cache of its own."""
    meeting, found = Meeting(len(hosts)), list[Any](hosts)

    def work(rank: int) -> None:
        threading.current_thread().name = hosts[rank]
        try:
            found[rank] = prints.shared_fingerprint(
                folder(rank), place / hosts[rank] / file_sums.KIND, hosts, meeting.rank(rank)
            )
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(SHAPES["tiny"], 0, folder, "60KB")
    return folder


@pytest.fixture
def model(written: Path, tmp_path: Path) -> Path:
    """A copy of a model of several files."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in written.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Files that are read whole, counted; every file is worth an entry, and may be as new as those of a test."""
    found, real = Reads(), file_sums.file_sha256

    def counted(path: Path) -> str:
        found[threading.current_thread().name, path.name] += 1
        return real(path)

    monkeypatch.setattr(file_sums, "file_sha256", counted)
    monkeypatch.setattr(prints, "file_sha256", counted)
    monkeypatch.setattr(file_sums, "WORTH", 0)
    monkeypatch.setattr(file_sums, "_SETTLED_NS", -(10**12))
    cache.passed_over()
    return found


def weight_names(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("hosts", [["a"], ["a", "a"], ["a"] * 4, ["a", "a", "b", "b"]], ids=len)
def test_a_host_reads_each_byte_once_and_no_more_at_its_next_start(
    model: Path, tmp_path: Path, reads: Reads, hosts: list[str]
) -> None:
    expected = prints.fingerprint(model)
    reads.clear()
    assert in_world(hosts, lambda rank: model, tmp_path) == [expected] * len(hosts)
    assert reads == {(host, name): 1 for host in hosts for name in weight_names(model)}
    reads.clear()
    assert in_world(hosts, lambda rank: model, tmp_path) == [expected] * len(hosts)
    assert not reads, "remembered"


def test_one_process_alone_reads_once_and_no_more_at_its_next_start(model: Path, tmp_path: Path, reads: Reads) -> None:
    """As `fedmoe evaluate` and `generate` ask for it, several times in one start."""
    expected = prints.fingerprint(model)
    for count in (1, 0):
        reads.clear()
        assert prints.remembered_fingerprint(model, tmp_path / "sums") == expected
        assert {name for _, name in reads} == (weight_names(model) if count else set()) and set(reads.values()) <= {1}


def on_a_network(monkeypatch: pytest.MonkeyPatch, sources: dict[str, str]) -> None:
    """Every host of a world sees its files on the network file system that is named for it."""
    monkeypatch.setattr(file_sums, "network_source", lambda path: sources.get(threading.current_thread().name, "nfs4 s:/m"))
    monkeypatch.setattr(file_sums, "_SETTLED_ON_NETWORK_NS", -(10**12))


def test_hosts_that_share_a_file_system_read_each_byte_once(
    model: Path, tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four hosts, of which one has the same model on another server."""
    expected, hosts = prints.fingerprint(model), ["a", "a", "b", "c", "d"]
    on_a_network(monkeypatch, {"d": "nfs4 other:/m"})
    reads.clear()
    assert in_world(hosts, lambda rank: model, tmp_path) == [expected] * len(hosts)
    by_name = Counter(name for host, name in reads.elements() if host != "d")
    assert by_name == dict.fromkeys(weight_names(model), 1) and {host for host, _ in reads} == set(hosts)
    assert {name for host, name in reads if host == "d"} == weight_names(model)


def test_what_one_host_has_read_on_a_network_all_hosts_know(
    model: Path, tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node prepares; the job's hosts, of other boots, have the same cache folder. On disks they read for themselves."""
    file, place, boots = min(model.glob("*.safetensors")), tmp_path / "sums", iter("abcd")
    monkeypatch.setattr(file_sums, "_BOOT", type("Boot", (), {"exists": lambda: True, "read_text": lambda: next(boots)}))
    for network in (True, False):
        monkeypatch.setattr(file_sums, "network_source", lambda path, network=network: "lustre @tcp:/m" if network else None)
        monkeypatch.setattr(file_sums, "_SETTLED_ON_NETWORK_NS", -(10**12))
        reads.clear()
        found = [file_sums.file_sum(file, place) for _ in range(2)]
        assert found[0] == found[1] and reads.total() == (1 if network else 2)


def test_a_file_that_is_new_on_a_network_is_read_again(
    model: Path, tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who wrote it may still hold it in memory; that is over when the seconds are that `unsettled_s` tells."""
    file, place = min(model.glob("*.safetensors")), tmp_path / "sums"
    monkeypatch.setattr(file_sums, "network_source", lambda path: "nfs s:/m")
    assert 0 < file_sums.unsettled_s([file]) < 60
    file_sums.file_sum(file, place)
    file_sums.remember_written(file, "0" * 64, place)
    assert not place.exists()
    monkeypatch.setattr(file_sums, "network_source", lambda path: None)
    assert file_sums.unsettled_s([file]) < 0
    found = file_sums.file_sum(file, place)
    reads.clear()
    assert file_sums.file_sum(file, place) == found and not reads


MOUNTS = """\
22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/root rw
40 22 0:51 / /home rw,relatime shared:7 master:3 - nfs4 server:/home rw,vers=4.2,addr=10.0.0.1
41 22 0:52 / /scratch rw - lustre 10.0.0.2@tcp:/fs rw
42 22 0:53 / /mnt\\040x rw - 9p share rw
43 40 0:51 /u /data rw - nfs4 server:/data rw
no mount at all
"""


@pytest.mark.parametrize(
    ("device", "source"),
    [((0, 51), "nfs4 server:/data"), ((0, 52), "lustre 10.0.0.2@tcp:/fs"), ((259, 2), None), ((0, 53), None), ((9, 9), None)],
)
def test_network_file_systems_are_known_by_their_source(
    device: tuple[int, int], source: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(mounts, "_TABLE", tmp_path / "mounts")
    monkeypatch.setattr(mounts.os, "stat", lambda path: os.stat_result((0, 0, os.makedev(*device), *[0] * 7)))
    assert mounts.network_source(tmp_path) == source


def test_this_machine_has_a_table_of_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mounts._mounts(mounts._TABLE.read_text()), "proc_pid_mountinfo(5)"
    monkeypatch.setattr(mounts, "_TABLE", tmp_path / "none")
    assert mounts.network_source(tmp_path) is None


def test_ranks_share_the_bytes_evenly() -> None:
    sizes = [5, 5, 5, 1, 3, 5]
    shares = prints._shares(sizes, 2)
    assert sorted(index for share in shares for index in share) == list(range(6))
    assert [sum(sizes[index] for index in share) for share in shares] == [13, 11]
    assert prints._shares([7], 3) == [[0], [], []]


def overwrite(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def overwrite_with_old_times(file: Path) -> None:
    """As `rsync --times` does: only ctime tells."""
    before = file.stat()
    overwrite(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes())
    overwrite_with_old_times(other)
    os.replace(other, file)


@pytest.mark.parametrize("change", [overwrite, overwrite_with_old_times, replace])
def test_a_changed_file_is_read_again(model: Path, tmp_path: Path, reads: Reads, change: Callable[[Path], None]) -> None:
    (before,) = in_world(["a"], lambda rank: model, tmp_path)
    changed = sorted(model.glob("*.safetensors"))[1]
    reads.clear()
    change(changed)
    (after,) = in_world(["a"], lambda rank: model, tmp_path)
    assert after == prints.fingerprint(model) != before
    assert reads.pop(("a", changed.name)) == 1 and {where for where, _ in reads} <= {"MainThread"}


def test_pages_tell_images_apart_whose_files_have_equal_times(
    model: Path, tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_sums, "_stamp", lambda handle: [os.fstat(handle).st_size, 1, 1, 1])
    place, file = tmp_path / "sums", min(model.glob("*.safetensors"))
    before = file_sums.file_sum(file, place)
    overwrite(file)
    assert file_sums.file_sum(file, place) != before


def test_what_changes_while_it_is_read_is_not_remembered(
    model: Path, tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, file = tmp_path / "sums", min(model.glob("*.safetensors"))
    monkeypatch.setattr(file_sums, "_SETTLED_NS", 3600 * 10**9)
    file_sums.file_sum(file, place)
    assert not place.exists(), "it may be changed again within one tick of the clock"
    monkeypatch.setattr(file_sums, "_SETTLED_NS", -(10**12))
    counted = file_sums.file_sha256

    def written_meanwhile(path: Path) -> str:
        found = counted(path)
        overwrite(path)
        return found

    monkeypatch.setattr(file_sums, "file_sha256", written_meanwhile)
    file_sums.file_sum(file, place)
    assert not place.exists()


def test_a_damaged_entry_is_made_anew_and_an_unwritable_cache_is_told(model: Path, tmp_path: Path, reads: Reads) -> None:
    place, file = tmp_path / "sums", min(model.glob("*.safetensors"))
    found = file_sums.file_sum(file, place)
    (entry,) = place.iterdir()
    text = (entry / "header.json").read_text()
    (entry / "header.json").write_text(text.replace(found, found[::-1]))
    assert file_sums.file_sum(file, place) == found and "is damaged: made anew" in str(cache.line([cache.passed_over()]))
    assert (entry / "header.json").read_text() == text
    (tmp_path / "file").touch()
    assert file_sums.file_sum(file, tmp_path / "file" / "sums") == found
    assert "the model is read whole at every start" in str(cache.line([cache.passed_over()]))


def test_hosts_with_other_models_are_told_apart_on_all_ranks(model: Path, tmp_path: Path, reads: Reads) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    overwrite(max(other.glob("*.safetensors")))
    hosts = ["a", "a", "b", "b"]
    found = in_world(hosts, lambda rank: model if rank < 2 else other, tmp_path)
    assert every(isinstance(error, UserError) for error in found)
    assert "rank 2 on b finds another model there" in str(found[0]) and "rank 0 on a" in str(found[0])
    assert every(str(error).split(": ", 2)[2] == str(found[0]).split(": ", 2)[2] for error in found)
    # Ranks that take each other for neighbours and see other files (containers of one name) read their own.
    found = in_world(["a", "a"], lambda rank: (model, other)[rank], tmp_path)
    assert every("rank 1 on a finds another model there" in str(error) for error in found)
