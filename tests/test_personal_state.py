"""Personal state over rounds, checkpoints and layouts of ranks: the same values, whoever keeps them and where a start begins.

The ranks are threads here that meet at a barrier, so that a property has a hundred worlds in seconds; process groups carry the
same calls in `test_topologies.py` and `test_methods_resume.py`.

Legend: N clients, L layers, E experts, R rows.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from every import every
from federations import alone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe_ds.checkpoint import client_homes, keeping, personal_state
from fedmoe_ds.checkpoint import writer as checkpoint_writer
from fedmoe_ds.checkpoint.client_homes import Homes
from fedmoe_ds.checkpoint.client_rows import ClientRows, Slabs
from fedmoe_ds.checkpoint.personal_files import BEGINNING, FileName, SavedFiles
from fedmoe_ds.checkpoint.personal_reader import CLIENTS, PersonalReader
from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.checkpoint.reader import Snapshot, find_damage, newest_intact, read_snapshot
from fedmoe_ds.checkpoint.writer import CheckpointWriter, remove_unfinished
from fedmoe_ds.distributed.launcher import Launch
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.model.adapter_bank import BlockSpec

EXPERTS = 4
SCALAR = BlockSpec("rank", (-1,), (1,), personal=True, trained=False)
DENSE = BlockSpec("attention.q_proj.lora_B", (0, 2), (3, 2), personal=True)
EXPERT = BlockSpec("experts.down.lora_B", (1, 2), (2, 3), expert=True, personal=True)
SPECS = [EXPERT, SCALAR, DENSE]
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 4)]
State = dict[int, dict[str, Tensor]]


def shape(spec: BlockSpec) -> tuple[int, ...]:
    return (len(spec.layers), *((EXPERTS,) if spec.expert else ()), *spec.item)


def drawn(*address: int) -> dict[str, Tensor]:
    """What a client has after a round; some of it is -0.0, which is stored as 0.0."""
    draw = torch.Generator().manual_seed(hash(address) % 2**31)
    return {spec.name: torch.randn(shape(spec), generator=draw).round(decimals=1) for spec in SPECS}


COMMON = {spec.name: drawn(-7)[spec.name] + 0.0 for spec in SPECS}


def begun(index: int) -> dict[str, Tensor]:
    """The rank is the client's own from the beginning."""
    return {**COMMON, SCALAR.name: torch.full((1, 1), float(index % 3 + 1))}


class Meeting:
    """Some threads that give each other values."""

    def __init__(self, members: int) -> None:
        self.barrier, self.slots = threading.Barrier(members), [None] * members

    def exchange(self, member: int, value: Any) -> list[Any]:
        self.slots[member] = value
        self.barrier.wait(30)
        found = list(self.slots)
        self.barrier.wait(30)
        return found


@dataclass
class Rank:
    """One rank's view of a world of threads: the part of a runtime, of a control and of a group that is asked for."""

    meeting: Meeting
    rank: int
    size: int
    handed: list[int] = field(default_factory=list)
    """Rows that it has given, by message."""

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value)

    def run_on_all_ranks(self, action: Callable[[], Any]) -> Any:
        found = action()
        self.gather(None)
        return found


def threads_all_to_all(output: Tensor, rows: Tensor, group: Rank, receive: list[int], send: list[int]) -> None:
    group.handed.append(len(rows))
    parts = [theirs[group.rank] for theirs in group.gather(torch.split(rows, send))]
    assert [len(part) for part in parts] == receive, "both ends know what travels"
    output.copy_(torch.cat(parts))


def threads_all_gather(part: Tensor, group: Rank, size: int) -> Tensor:
    group.handed.append(len(part))
    return torch.stack(group.gather(part))


def threads_broadcast(tensor: Tensor, group: Rank, source: int) -> Tensor:
    group.handed.append(len(tensor) if group.rank == source else 0)
    found: Tensor = group.gather(tensor)[source]
    return found


class World:
    """The personal state of a federation on clusters x shards ranks, and what it should be."""

    def __init__(self, clients: int, clusters: int, shards: int, limit: int = 1 << 62) -> None:
        self.clients, self.clusters, self.shards = clients, clusters, shards
        size = clusters * shards
        everyone = Meeting(size)
        inside, across = [Meeting(shards) for _ in range(clusters)], [Meeting(clusters) for _ in range(shards)]
        self.ranks = [Rank(everyone, rank, size) for rank in range(size)]
        self.controls = [Rank(inside[rank // shards], rank % shards, shards) for rank in range(size)]
        self.own = [
            Personal(
                SPECS,
                EXPERTS // shards,
                clients,
                lambda spec, rank=rank: self.part(COMMON[spec.name], spec, rank),  # type: ignore[misc]
                lambda spec, index: float(index % 3 + 1) if spec == SCALAR else None,
                Homes(clusters, rank // shards, shards, rank % shards, Rank(across[rank % shards], rank // shards, clusters)),  # type: ignore[arg-type]
                Slabs(limit),
            )
            for rank in range(size)
        ]

    def part(self, value: Tensor, spec: BlockSpec, rank: int) -> Tensor:
        """A block's experts of one rank."""
        held = EXPERTS // self.shards
        return value[:, rank % self.shards * held :][:, :held] if spec.expert else value

    def together(self, action: Callable[[int], Any]) -> list[Any]:
        """One collective step of all ranks."""
        with ThreadPoolExecutor(len(self.ranks)) as threads:
            return [future.result(60) for future in [threads.submit(action, rank) for rank in range(len(self.ranks))]]

    def round(self, number: int, chosen: list[int], finishing: set[int], expected: State) -> None:
        """Train some of the chosen clients on clusters that have nothing to do with their homes."""
        dealt: list[list[int]] = [[] for _ in range(self.clusters)]
        for index in chosen:
            dealt[(index * 7 + number) % self.clusters].append(index)

        def train(rank: int) -> None:
            own, cluster = self.own[rank], rank // self.shards
            own.fetch(dealt, self.ranks[rank])  # type: ignore[arg-type]
            for place, index in enumerate(dealt[cluster]):
                for name, value in own.state(index).items():
                    assert value.equal(self.part(expected[index][name], own.specs[name], rank)), (index, name)
                if index in finishing:
                    for name, value in drawn(number, index).items():
                        if own.specs[name].expert or place % self.shards == rank % self.shards:  # dense ones at home alone
                            own.store(index, name, self.part(value, own.specs[name], rank))
            own.share(self.ranks[rank], self.controls[rank])  # type: ignore[arg-type]

        self.together(train)
        for index in finishing & set(chosen):
            expected[index] = {name: value + 0.0 for name, value in drawn(number, index).items()}

    def check(self, expected: State) -> None:
        """Every rank sees every client, their means and their hashes."""
        names = [spec.name for spec in SPECS]

        def look(rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
            own = self.own[rank]
            for index, state in own.visit(range(self.clients), names):
                for name, value in state.items():
                    assert value.equal(self.part(expected[index][name], own.specs[name], rank)), (rank, index, name)
            return own.means(range(self.clients), names), own.hashes(names)

        found = self.together(look)
        for rank, (means, _) in enumerate(found):
            for spec in SPECS:
                mean = torch.stack([expected[index][spec.name].double() for index in range(self.clients)]).mean(0)
                assert torch.allclose(means[spec.name], self.part(mean, spec, rank), rtol=1e-14, atol=1e-14)
        merged = {key: value for _, hashes in found for key, value in hashes.items()}
        for key, value in tensors(expected, self.clients).items():
            told = hashlib.sha256(str(tuple(value.shape)).encode() + value.numpy().tobytes()).hexdigest()
            assert merged.pop(key) == told, f"{key}: as `global_digest` hashes a tensor of all clients"
        assert not merged

    def save(self, writer: CheckpointWriter, round_index: int) -> int:
        """A checkpoint of all ranks by one of them; how many rows of clients it wrote."""
        plans = [own.to_write() for own in self.own]
        files = {name: content for new, _ in plans for name, content in new.items()}
        kept = [name for _, plan in plans for name in plan.keep]
        sources = {plan.source for _, plan in plans if plan.keep}
        adapters = {"adapters-00000-of-00001.safetensors": {"x": torch.full((1,), float(round_index))}}
        snapshot = Snapshot(round_index, {}, 0)
        folder = writer.begin(snapshot, {**adapters, **files}, {}, kept=kept, source=max(sources, default=None))
        assert writer.finish() is not None and find_damage(folder) is None
        for own in self.own:
            own.files.source = folder
        return sum(len([row for row in rows if row >= 0]) for _, plan in plans for rows in plan.write.values())

    def restore(self, folder: Path) -> None:
        files = read_snapshot(folder).files
        for own in self.own:
            with PersonalReader(folder, files, own.homes) as reader:
                own.restore(reader)
        self.together(lambda rank: self.own[rank].agree(self.ranks[rank]))  # type: ignore[arg-type]


def tensors(expected: State, clients: int) -> dict[str, Tensor]:
    """[N, *item] by canonical key."""
    found = {}
    for spec in SPECS:
        for i, layer in enumerate(spec.layers):
            if not spec.expert:
                found[spec.key(layer)] = torch.stack([expected[c][spec.name][i] for c in range(clients)])
                continue
            for e in range(EXPERTS):
                found[spec.key(layer, e)] = torch.stack([expected[c][spec.name][i, e] for c in range(clients)])
    return found


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_homes, "all_to_all", threads_all_to_all)
    monkeypatch.setattr(client_homes, "all_gather", threads_all_gather)
    monkeypatch.setattr(client_homes, "broadcast", threads_broadcast)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["round", "save", "kill", "save and kill"]),
        st.sets(st.integers(0, 8)),
        st.sets(st.integers(0, 8)),
        st.sampled_from(LAYOUTS),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=15, deadline=None)
@given(STEPS, st.integers(1, 9), st.sampled_from(LAYOUTS))
def test_any_history_on_any_layouts(steps: list[Any], clients: int, layout: tuple[int, int]) -> None:
    """Rounds, checkpoints, kills, and starts on other layouts: the state is that of the rounds that a checkpoint has."""
    world, expected = World(clients, *layout), {index: begun(index) for index in range(clients)}
    with tempfile.TemporaryDirectory() as place:
        root, saved, rounds = Path(place), dict[int, State](), 0
        writer = CheckpointWriter(root, alone()[0], 2, background=False)
        for step, chosen, finishing, other in [*steps, ("save and kill", set(), set(), (2, 2))]:
            if step == "round":
                rounds += 1
                world.round(rounds, sorted(index for index in chosen if index < clients), finishing, expected)
            if "save" in step:
                rounds += 1
                world.save(writer, rounds)
                saved[rounds] = dict(expected)
            if "kill" in step:
                unfinished(root)
                newest, _ = newest_intact(root)
                world = World(clients, *other)
                expected = {index: begun(index) for index in range(clients)}
                if newest is not None:
                    expected = dict(saved[read_snapshot(newest).round])
                    world.restore(newest)
        world.check(expected)
        for folder in root.iterdir():
            assert find_damage(folder) is None, "removing older ones takes nothing from it"
            check_reader(folder, saved[read_snapshot(folder).round], clients)


def unfinished(root: Path) -> None:
    """What a writer leaves that is killed while it links, and what the next start does about it."""
    newest, _ = newest_intact(root)
    if newest is not None:
        working = root / ".writing-round-00099"
        working.mkdir()
        for name in list(read_snapshot(newest).files)[:2]:
            os.link(newest / name, working / name)
    remove_unfinished(root)


def check_reader(folder: Path, expected: State, clients: int) -> None:
    """A checkpoint alone, as exports read it."""
    with PersonalReader(folder, read_snapshot(folder).files) as reader:
        for key, values in tensors(expected, clients).items():
            for index in range(clients):
                value = reader.value(key, index)
                if value is None:
                    number = float(index % 3 + 1) if key == "model.rank" else None
                    value = reader.beginning(key) if number is None else torch.full((1,), number)
                assert value is not None and value.equal(values[index]), (key, index)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(0, 30), max_size=6), min_size=12, max_size=40), st.integers(1, 9))
def test_a_checkpoint_costs_what_has_changed(rounds: list[set[int]], most: int) -> None:
    """Rows that are written, and rows that the newest folder holds, whatever clients take part."""
    files, rows, written = SavedFiles(Homes()), dict[str, list[int]](), 0
    for number, chosen in enumerate(rounds, 1):
        files.changed |= chosen
        plan = files.plan(most)
        files.source = Path(f"round-{number:05d}")
        assert not plan.write.keys() & rows.keys() and all(len(clients) <= most for clients in plan.write.values())
        rows = {name: rows[name] for name in plan.keep} | plan.write
        written += sum(map(len, plan.write.values()))
        newest = {client: name for name in sorted(rows) for client in rows[name]}
        present = {index for chosen in rounds[:number] for index in chosen}
        assert newest.keys() == {*present, BEGINNING}, "nobody is lost"
        assert chosen <= {client for client, name in newest.items() if name in plan.write}
        assert sum(map(len, rows.values())) <= 1 + 2 * len(present), "old rows take no more than the new ones"
        assert len({FileName.of(name).level for name in rows}) <= 1 + len(present).bit_length()  # type: ignore[union-attr]
    # A row goes into a level that is at least half as large as the one below: log2(31) + 1 times at most.
    assert written <= 1 + 6 * sum(map(len, rounds))


def test_a_client_that_was_never_trained_takes_no_row(tmp_path: Path) -> None:
    world, expected = World(1000, 2, 2), {index: begun(index) for index in range(1000)}
    world.round(1, [3, 500], {3, 500}, expected)
    assert sum(len(own._home) for own in world.own) == 4, "two clients on two shards each"
    assert world.save(CheckpointWriter(tmp_path, alone()[0], 2, background=False), 1) == 4
    size = sum(path.stat().st_size for path in (tmp_path / "round-00001").iterdir())
    assert size < 40_000, size


@pytest.mark.parametrize("clusters", [2, 8])
def test_a_row_leaves_its_home_once(clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at all clients, at few, or at one, however many clusters there are: no copy for each of them."""
    world, expected = World(40, clusters, 1), {index: begun(index) for index in range(40)}
    world.round(1, list(range(40)), set(range(40)), expected)
    names, groups = [spec.name for spec in SPECS], [own.homes.group for own in world.own]

    def refuse(*names: Any) -> None:
        raise AssertionError("an object for a client and a cluster")

    def handed(action: Callable[[Personal], Any]) -> list[list[int]]:
        for group in groups:
            group.handed.clear()
        world.together(lambda rank: action(world.own[rank]))
        return [group.handed[:] for group in groups]

    monkeypatch.setattr(personal_state, "Move", refuse)
    assert handed(lambda own: own.means(range(40), names)) == [[40 // clusters]] * clusters
    assert handed(lambda own: list(own.visit([5], names))) == [[int(5 % clusters == i)] for i in range(clusters)]
    few = handed(lambda own: list(own.visit([1, 3], names)))
    assert [sum(rows) for rows in few] == [len([i for i in (1, 3) if i % clusters == c]) for c in range(clusters)]
    many = handed(lambda own: list(own.visit(range(25), names)))
    assert many == [[-(-25 // clusters)]] * clusters, "one message, in which some fill up with zeros"
    monkeypatch.setattr(client_homes, "PIECE", 0)
    uneven = handed(lambda own: list(own.visit([1, 9, 17, 2, 3], names)))
    wanted = [4, 4] if clusters == 2 else [0, 3, 1, 1, 0, 0, 0, 0]
    assert [sum(rows) for rows in uneven] == wanted, "large rows are not padded to more than twice as many"


def test_the_first_cluster_alone_receives_what_it_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    world, expected = World(9, 3, 1), {index: begun(index) for index in range(9)}
    world.round(1, list(range(9)), set(range(9)), expected)
    received = [0, 0, 0]

    def counted(output: Tensor, rows: Tensor, group: Rank, receive: list[int], send: list[int]) -> None:
        received[group.rank] += len(output)
        threads_all_to_all(output, rows, group, receive, send)

    monkeypatch.setattr(client_homes, "all_to_all", counted)
    for name in ("all_gather", "broadcast"):
        monkeypatch.setattr(client_homes, name, None)
    found = world.together(lambda rank: world.own[rank].hashes([spec.name for spec in SPECS]))
    assert received == [9, 0, 0] and found[0] and not found[1] and not found[2]


def test_a_piece_of_dense_blocks_is_shared_by_all_who_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank receives what all of the cluster give, so each gives a part of the limit."""
    world, expected = World(32, 1, 4), {index: begun(index) for index in range(32)}
    most, gather = 4 * 4 * world.own[0].layout.dense, Rank.gather

    def counted(self: Rank, value: Any) -> list[Any]:
        found = gather(self, value)
        assert not isinstance(value, bytes) or sum(map(len, found)) <= most
        return found

    monkeypatch.setattr(personal_state, "PIECE", most)
    monkeypatch.setattr(Rank, "gather", counted)
    world.round(1, list(range(32)), set(range(32)), expected)
    world.check(expected)


def test_files_are_shared_by_links_and_copied_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, expected = World(9, 1, 1), {index: begun(index) for index in range(9)}
    writer = CheckpointWriter(tmp_path, alone()[0], 9, background=True)
    world.round(1, list(range(9)), set(range(9)), expected)
    world.save(writer, 1)
    world.round(2, [4], {4}, expected)
    world.save(writer, 2)
    first, second = tmp_path / "round-00001", tmp_path / "round-00002"
    shared = [path.name for path in first.glob("personal-*") if os.path.samefile(path, second / path.name)]
    assert len(shared) == 2 and every((second / name).stat().st_mode & 0o777 == 0o600 for name in shared)

    def refuse(*names: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(keeping.os, "link", refuse)
    world.round(3, [4], {4}, expected)
    world.save(writer, 3)
    monkeypatch.undo()
    for name in ("round-00001", "round-00002"):
        shutil.rmtree(tmp_path / name)
    again = World(9, 1, 1)
    again.restore(tmp_path / "round-00003")
    assert find_damage(tmp_path / "round-00003") is None
    assert every(value.equal(expected[4][name]) for name, value in again.own[0].state(4).items())


def test_every_rank_takes_over_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system makes no links, nobody copies for the others; and nobody reads the manifest of all for its own."""
    world, expected = World(9, 2, 1), {index: begun(index) for index in range(9)}
    taken: list[list[str]] = []
    take_over = keeping.take_over

    def noted(source: Path, target: Path, names: Sequence[str], known: Any = None) -> tuple[dict[str, str], int]:
        assert known is not None
        taken.append(sorted(names))
        return take_over(source, target, names, known)

    def refuse(*names: Any, **options: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def runtime(rank: Rank) -> Runtime:
        control: Any = SimpleNamespace(gather=rank.gather, broadcast=lambda payload: rank.gather(payload)[0])
        return Runtime(Launch("test", rank.rank, rank.size, rank.rank), torch.device("cpu"), control)

    writers = [CheckpointWriter(tmp_path, runtime(rank), 9, background=True) for rank in world.ranks]

    def save(rank: int, number: int) -> int:
        own, writer = world.own[rank], writers[rank]
        new, plan = own.to_write()
        files = {"adapters-00000-of-00001.safetensors": {"x": torch.ones(1)}, **new} if rank == 0 else new
        own.files.source = writer.begin(Snapshot(number, {}, 0), files, {}, kept=plan.keep, source=plan.source)
        done = writer.finish()
        assert done is not None
        return done.copied

    monkeypatch.setattr(checkpoint_writer, "take_over", noted)
    monkeypatch.setattr(keeping.os, "link", refuse)
    world.round(1, list(range(9)), set(range(9)), expected)
    assert world.together(lambda rank: save(rank, 1)) == [0, 0]
    world.round(2, [4, 5], {4, 5}, expected)
    copied = world.together(lambda rank: save(rank, 2))
    first, second = sorted(taken, key=len, reverse=True)
    assert every("-00000-of-00002-" in name for name in first) and every("-00001-of-00002-" in name for name in second)
    folder = tmp_path / "round-00002"
    size = sum((folder / name).stat().st_size for name in first + second)
    assert copied == [size, size] and find_damage(folder) is None
    check_reader(folder, expected, 9)


@pytest.mark.parametrize(("layout", "rows"), [((2, 1), 1), ((1, 1), 9), ((2, 2), 18)], ids=str)
def test_a_start_goes_on_with_the_files_of_its_own_layout(layout: tuple[int, int], rows: int, tmp_path: Path) -> None:
    """On another one, everybody is written once, on each of its shards."""
    world, expected = World(9, 2, 1), {index: begun(index) for index in range(9)}
    writer = CheckpointWriter(tmp_path, alone()[0], 9, background=False)
    world.round(1, list(range(9)), set(range(9)), expected)
    assert world.save(writer, 1) == 9
    again = World(9, *layout)
    again.restore(tmp_path / "round-00001")
    again.round(2, [4], {4}, expected)
    assert again.save(writer, 2) == rows
    assert again.save(writer, 3) == 0, "nothing has changed"
    check_reader(tmp_path / "round-00003", expected, 9)


def test_a_checkpoint_of_before(tmp_path: Path) -> None:
    """One file per shard with all clients, which earlier versions wrote: read on any layout, and written anew in the next."""
    expected = {index: {name: value + 0.0 for name, value in drawn(3, index).items()} for index in range(5)}
    whole, files = tensors(expected, 5), dict[str, dict[str, Tensor]]()
    for key, value in whole.items():
        shard = int(".experts." in f".{key}" and int(key.split(".")[3]) >= EXPERTS // 2)
        files.setdefault(f"personal-{shard:05d}-of-00002.safetensors", {})[key] = value
    writer = CheckpointWriter(tmp_path, alone()[0], 9, background=False)
    old = writer.begin(Snapshot(1, {}, 0), files, {})
    writer.finish()
    check_reader(old, expected, 5)
    for number, layout in enumerate(LAYOUTS, 2):
        world = World(5, *layout)
        world.restore(old)
        world.check(expected)
        assert world.save(writer, number) == 5 * world.shards
        check_reader(tmp_path / f"round-{number:05d}", expected, 5)
    with PersonalReader(old, read_snapshot(old).files) as reader, pytest.raises(UserError, match=r"shape \(5, .*needs \(6, "):
        World(6, 1, 1).own[0].restore(reader)


def test_rows_beyond_the_limit_lie_in_a_file(tmp_path: Path) -> None:
    slabs = Slabs(1000, lambda: tmp_path / "scratch")
    rows = ClientRows(100, slabs)
    for index in range(7):
        rows.reserve(7 - index)
        rows.add(index).fill_(index)
    assert every(bool((rows[index] == index).all()) for index in range(7)) and slabs.in_memory == 0
    assert list((tmp_path / "scratch").iterdir()) == [], "it has no name, so no kill leaves it behind"
    assert (tmp_path / "scratch").stat().st_mode & 0o777 == 0o700
    rows.clear()
    small = ClientRows(2, slabs)
    small.add(1)
    assert slabs.in_memory == 8
    small.clear()
    assert slabs.in_memory == 0


def test_a_disk_without_room_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    rows = ClientRows(1 << 20, Slabs(0, lambda: tmp_path))
    with pytest.raises(UserError, match=r"^foundation.cache: .*: no room for 12 MiB .*: No space left .*client_state_gib"):
        rows.reserve(3)
    assert list(tmp_path.iterdir()) == []


def test_a_world_beyond_its_memory_is_the_same(tmp_path: Path) -> None:
    expected = {index: begun(index) for index in range(9)}
    world = World(9, 2, 1, limit=0)
    for own in world.own:
        own._home.slabs.folder = lambda: tmp_path
    for number in range(1, 4):
        world.round(number, list(range(number, 9)), set(range(number, 9)), expected)
    world.check(expected)


DAMAGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "clients that there are not": lambda found: {**found, CLIENTS: found[CLIENTS] + 40},
    "a client twice": lambda found: {**found, CLIENTS: found[CLIENTS] * 0},
    "floats for clients": lambda found: {**found, CLIENTS: found[CLIENTS].float()},
    "a row too few": lambda found: {**found, CLIENTS: found[CLIENTS][1:]},
    "a tensor missing": lambda found: {key: value for key, value in found.items() if key != "model.rank"},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_of_another_run_are_one_line(damage: str, tmp_path: Path) -> None:
    """Intact by their checksums, and yet nothing that this run has written."""
    world, expected = World(6, 1, 1), {index: begun(index) for index in range(6)}
    world.round(1, [1, 2, 5], {1, 2, 5}, expected)
    new, _ = world.own[0].to_write()
    files = {name: DAMAGES[damage](content()) if "00001-000" in name else content() for name, content in new.items()}
    writer = CheckpointWriter(tmp_path, alone()[0], 2, background=False)
    folder = writer.begin(Snapshot(1, {}, 0), files, {})
    writer.finish()
    with pytest.raises(UserError, match=r"^checkpoint: .*"):
        World(6, 1, 1).restore(folder)
