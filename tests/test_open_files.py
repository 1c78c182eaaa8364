"""Open files: what a rank needs at any size of the world, on paper, and the limit that it gets or is refused for."""

from __future__ import annotations

import resource
import socket
import sys

import pytest
import torch
import torch.distributed as torch_dist
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.checkpoint.client_homes import Homes
from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed import open_files
from fedmoe_ds.distributed.control import Alone
from fedmoe_ds.distributed.gloo_control import FLAT, block_width, tree_groups
from fedmoe_ds.distributed.launcher import Launch
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.model.adapter_bank import BlockSpec

FEW = 256 - open_files.WORK
"""What the others may take of `ulimit -n 256`."""


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 20_000), st.data())
def test_every_rank_is_in_one_block_and_every_block_has_one_head(size: int, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, size))
    rank = data.draw(st.integers(0, size - 1))
    block, heads = tree_groups(rank, size, width)
    assert rank in block and len(block) <= width and block[0] % width == 0
    assert every(tree_groups(peer, size, width)[0] == block for peer in (block[0], block[-1]))
    assert list(heads) == ([r for r in range(size) if r % width == 0] if rank == block[0] else [])


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 40_000))
def test_groups_of_a_tree_are_about_as_large_as_they_are_many(size: int) -> None:
    width = block_width(size)
    block, heads = tree_groups(0, size, width)
    assert len(heads) <= len(block) == width and (width - 1) ** 2 < size <= width**2


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 512), st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.data())
def test_what_a_rank_needs_does_not_grow_with_the_world(clusters: int, ep_size: int, data: st.DataObject) -> None:
    """Up to 32 768 ranks: rank 0 has two connections with every rank, nobody else has many."""
    world_size = clusters * ep_size
    rank = data.draw(st.integers(0, world_size - 1))
    for tensors in (True, False):
        found = open_files.files_of(rank, world_size, ep_size, tensors)
        assert found <= FEW + (2 * world_size if rank == 0 else 0)
        # An all-to-all connects every two ranks of a cluster, whatever carries the rest.
        assert found >= (ep_size - 1 if tensors else 0)


def test_the_mesh_at_4096_ranks_is_none() -> None:
    """Every group with all of its connections, as gloo makes them by itself, would be several times the usual 1 024."""
    for rank in range(4096):
        found = open_files.files_of(rank, 4096, 8)
        assert found < (1024 - open_files.WORK if rank else 2 * 4096 + 128)


def test_what_is_counted() -> None:
    def groups(*asked: int, **what: bool) -> list[tuple[str, int, int]]:
        found = open_files.gloo_groups(*asked, **{"tensors": True, "control": True, **what})
        return [(group.name, group.size, group.peers) for group in found]

    data = [("the world's own", 8, 0), ("tokens within the cluster", 4, 3), ("sums and rows between the clusters", 2, 1)]
    control = [("control of the world", 8, 4), ("control of the cluster", 4, 3)]
    assert groups(0, 8, 4) == data + control
    assert groups(4, 8, 4, tensors=False) == [("control of the world", 8, 3), control[1]], "NCCL carries the tensors"
    assert groups(5, 8, 4, control=False) == data, "MPI carries the messages"
    assert groups(0, 1, 1) == [] and open_files.files_of(0, 1, 1) == 0
    head, other = groups(0, FLAT + 9, 1, tensors=False), groups(1, FLAT + 9, 1, tensors=False)
    assert head == [("control of the world, block", 5, 3), ("control of the world, heads", 5, 3)] and other == head[:1]
    rows = {one: groups(3, 24, 2, control=False, personal=one)[-1][-1] for one in (False, True)}
    assert rows == {False: 2, True: 11}, "rows of clients go from any cluster to any other"
    by_mpi = TopologyConfig(control="mpi", ep_size=4)
    assert open_files.needed(Launch("mpirun", 1, 8, 1), by_mpi, "cuda") < open_files.open_now() + open_files.WORK + 8


@pytest.mark.parametrize(
    ("limits", "needed", "asked"),
    [
        ((1024, 1048576), 300, (65536, 1048576)),
        ((1024, 4096), 300, (4096, 4096)),
        ((1024, -1), 300, (65536, -1)),
        ((1024, 1048576), 100_000, (100_000, 1048576)),
        ((65536, 65536), 300, None),
        ((256, 256), 256, None),
        ((-1, -1), 100_000, None),
    ],
)
def test_the_limit_is_raised(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], needed: int, asked: tuple[int, int] | None
) -> None:
    wanted: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, what: wanted.append(what))
    assert open_files.allow(needed).allowed == (sys.maxsize if limits[0] < 0 else max(limits[0], asked[0] if asked else 0))
    assert wanted == ([] if asked is None else [asked])


def test_rows_of_clients_need_a_connection_with_every_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told when the run is loaded, before anything travels; nothing is asked of a run whose clients keep nothing."""
    block = BlockSpec("attention.q_proj.lora_B", (0,), (2, 2), personal=True)

    def ask(specs: list[BlockSpec], clusters: int) -> None:
        runtime = Runtime(Launch("test", 7, 8 * clusters, 7), torch.device("cpu"), Alone())
        Personal(specs, 8, 9, homes=Homes(clusters, shards=8)).allow_peers(runtime)

    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    for specs, clusters in (([], 1000), ([block], 1), ([block], 500)):
        ask(specs, clusters)
    with pytest.raises(UserError, match=r"^open files: 1024: rank 0 on \S+ needs 1\d{3} in a world of 1 ranks; raise"):
        ask([block], 1000)


@pytest.mark.parametrize(("limits", "obeys"), [((256, 256), True), ((128, 256), True), ((256, 1048576), False)])
def test_too_low_a_limit_is_told(monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], obeys: bool) -> None:
    """Also where the system does not let it be raised as far as it says."""

    def refuse(which: int, what: tuple[int, int]) -> None:
        if not obeys:
            raise ValueError("not allowed")

    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", refuse)
    mine = open_files.allow(257)
    assert (mine.needed, mine.allowed) == (257, 256)
    with pytest.raises(UserError, match=r"^open files: 256: rank 0 on \S+ needs 257 in a world of 1 ranks; raise the hard "):
        open_files.check_together(torch_dist.HashStore(), 0, 1, mine)


def test_ranks_that_cannot_meet_refuse_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """All by the same line; where rank 0's host has more than this one, its store answers, and nobody refuses."""
    monkeypatch.setattr(open_files, "_ANSWER_S", 0.0)
    few, enough = (open_files.Allowance("node", 70, allowed) for allowed in (1023, 1024))
    words = r"^open files: 1023: rank 0 needs 1024 for 950 ranks to meet, and twice as many later; raise the hard limit of "
    with socket.create_server(("127.0.0.1", 0)) as store:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(store.getsockname()[1]))
        open_files.check_meeting(few, 7, 950)
        with pytest.raises(UserError, match=words):
            open_files.check_meeting(few, 0, 950)
    with pytest.raises(UserError, match=words):
        open_files.check_meeting(few, 7, 950)
    for rank in (0, 7):
        open_files.check_meeting(enough, rank, 950)
    open_files.check_meeting(few, 0, 1)
