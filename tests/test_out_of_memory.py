"""A client whose pass does not fit into memory leaves the round, named and counted; the others are as if it had never come."""

from __future__ import annotations

import ctypes
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import RankError, run_distributed
from federations import alone, build, finish, joined, make_config, run_alone, write_inputs

from fedmoe_ds.checkpoint import skipped_clients
from fedmoe_ds.distributed.topology import build_topology
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.machine import peak_mib, resident_mib

pytestmark = pytest.mark.cluster  # slow: processes of their own, and gigabytes
SAMPLES = (60, 12, 8)
SLACK = 600 * 2**20
"""For small things: each new thread alone reserves 64 MiB of addresses. The largest client needs 1.5 GiB more than that."""
M_MMAP_THRESHOLD = -3  # glibc, malloc.h
VOCABULARY = 120_000
"""Logits are most of what a pass needs, in proportion to its tokens."""
# A step holds all samples of a client, so that no two clients' passes have one shape.
WHOLE: dict[str, Any] = {
    "federation": {"rounds": 1},
    "local": {"batch_size": 64, "max_steps": 1},
    "execution": {"micro_batch_size": None},
    "evaluation": {"max_sequences": 1, "client_sequences": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shortage")
    write_inputs(folder, SAMPLES, vocab_size=VOCABULARY)
    return folder


@contextmanager
def little_memory(parts: Parts) -> Iterator[None]:
    """Address space for the pass of the second largest client and for small things, but not for the largest one's."""
    # Large blocks come from the kernel and go back to it: what one pass has freed must not count against the next.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    _, second, *_ = parts.clients
    before = resident_mib()
    parts.trainer.train([[second]], 1, parts.state.adapters, parts.state.personal.values, parts.training_data.train)
    needed = (peak_mib() - before) * 2**20
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(size + needed + SLACK), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def run_short(rank: int, root: Path, mode: str) -> dict[str, Any]:
    """The same federation three times: with little memory, with the absence known beforehand, and with everybody."""
    how = {"execution": {"reproducible": mode, "clients_in_flight": 1}}
    parts, journal = build(make_config(root, f"short-{mode}", WHOLE, how), *alone())
    with little_memory(parts):
        short = finish(parts, journal)
    config = make_config(root, f"absent-{mode}", WHOLE, how)
    folder = Path(config.output) / config.name
    folder.mkdir(parents=True)
    written = (root / "runs" / f"short-{mode}" / skipped_clients.NAME).read_text()
    (folder / skipped_clients.NAME).write_text('["of other settings", 1, 1]\n["cut short by a full disk", 1, ' + written)
    absent, whole = run_alone(config), run_alone(make_config(root, f"whole-{mode}", WHOLE, how))
    largest = parts.clients[0].name
    return {"events": short.events, "largest": largest, "digests": [short.digest, absent.digest, whole.digest]}


@pytest.mark.parametrize("mode", ["bitwise", "fast"])
def test_a_client_that_does_not_fit_is_left_out(root: Path, mode: str) -> None:
    """In a process of its own: one that has run other tests has freed memory to draw on, whatever its limit."""
    (found,) = run_distributed(run_short, 1, root, mode)
    (event,) = [event for event in found["events"] if event["event"] == "round"]
    assert (event["dropped"], event["dropped_clients"]) == (1, [found["largest"]])
    status = {event["client"]: event["status"] for event in found["events"] if event["event"] == "client"}
    assert status.pop(found["largest"]) == "out-of-memory" and set(status.values()) == {"ok"}
    short, absent, whole = found["digests"]
    assert short == absent != whole


def starve(rank: int, root: Path) -> None:
    config = make_config(root, "starved", WHOLE, {"topology": {"ep_size": 2}, "execution": {"clients_in_flight": 2}})
    runtime = joined(rank)
    parts, journal = build(config, runtime, build_topology(config.topology, runtime))
    if rank == 0:  # the largest client's home
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + SLACK, resource.RLIM_INFINITY))
    finish(parts, journal)


def test_within_an_expert_parallel_cluster_the_next_start_leaves_it_out(root: Path) -> None:
    """The peers wait in an all-to-all: nobody can go on, but the reason is on disk."""
    with pytest.raises(
        RankError, match=r"LostError: rank 0 on \S+, round 1: client \S+: \d+ sequences in one pass do not fit"
    ) as lost:
        run_distributed(starve, 2, root)
    assert lost.value.rank == 0
    lines = skipped_clients.read_lines(root / "runs" / "starved")
    ((key, round_index, client),) = (json.loads(line) for line in lines if line)
    assert (round_index, client) == (1, 0) and len(key) == 16
