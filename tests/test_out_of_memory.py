"""A client whose pass does not fit into memory is trained in parts; where a loss needs its whole step it leaves the round,
named and counted, and the others are as if it had never come.

With little memory and real allocators; what is tried in which order is in test_pass_limits.py.
"""

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
from every import every
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
WIDTH = 4096
"""Of an expert's inner rows, which are most of what a pass needs, in proportion to its tokens."""
# A step holds all samples of a client, so that no two clients' passes have one shape.
WHOLE: dict[str, Any] = {
    "federation": {"rounds": 1},
    "local": {"batch_size": 64, "max_steps": 1, "balance_loss": 0.01},
    "execution": {"micro_batch_size": None},
    "evaluation": {"max_sequences": 1, "client_sequences": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shortage")
    write_inputs(folder, SAMPLES, intermediate_size=WIDTH)
    return folder


@contextmanager
def little_memory(parts: Parts) -> Iterator[None]:
    """Address space for the pass of the second largest client and for small things, but not for the largest one's."""
    # Large blocks come from the kernel and go back to it: what one pass has freed must not count against the next.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    _, second, *_ = parts.clients
    before = resident_mib()
    parts.trainer.train([[second]], 1, parts.state.adapters, parts.state.personal.state, parts.training_data.train)
    needed = (peak_mib() - before) * 2**20
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(size + needed + SLACK), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def run_short(rank: int, root: Path) -> dict[str, Any]:
    """The same federation three times: with little memory, with the absence known beforehand, and with everybody."""
    how = {"execution": {"clients_in_flight": 1}}
    parts, journal = build(make_config(root, "short", WHOLE, how), *alone())
    with little_memory(parts):
        short = finish(parts, journal)
    config = make_config(root, "absent", WHOLE, how)
    folder = Path(config.output) / config.name
    folder.mkdir(parents=True)
    written = (root / "runs" / "short" / skipped_clients.NAME).read_text()
    (folder / skipped_clients.NAME).write_text('["of other settings", 1, 1]\n["cut short by a full disk", 1, ' + written)
    absent, whole = run_alone(config), run_alone(make_config(root, "whole", WHOLE, how))
    largest = parts.clients[0].name
    return {"events": short.events, "largest": largest, "digests": [short.digest, absent.digest, whole.digest]}


def test_a_client_that_does_not_fit_is_left_out(root: Path) -> None:
    """In a process of its own: one that has run other tests has freed memory to draw on, whatever its limit."""
    (found,) = run_distributed(run_short, 1, root)
    (event,) = [event for event in found["events"] if event["event"] == "round"]
    assert (event["dropped"], event["dropped_clients"]) == (1, [found["largest"]])
    status = {event["client"]: event["status"] for event in found["events"] if event["event"] == "client"}
    assert status.pop(found["largest"]) == "out-of-memory" and set(status.values()) == {"ok"}
    short, absent, whole = found["digests"]
    assert short == absent != whole


def run_in_parts(rank: int, root: Path) -> dict[str, int]:
    how = {"execution": {"reproducible": "fast", "clients_in_flight": 1}, "local": {"balance_loss": 0.0}}
    parts, journal = build(make_config(root, "parts", WHOLE, how), *alone())
    with little_memory(parts):
        found = finish(parts, journal)
    statuses = [event["status"] for event in found.events if event["event"] == "client"]
    return {"trained": statuses.count("ok"), "each": parts.skipped.limits(2).each or 0}


def test_a_client_that_does_not_fit_whole_is_trained_in_parts(root: Path) -> None:
    ((trained, each),) = (tuple(found.values()) for found in run_distributed(run_in_parts, 1, root))
    assert trained == len(SAMPLES) and 1 <= each <= SAMPLES[0] // 2


def starve(rank: int, root: Path) -> None:
    change = {"topology": {"ep_size": 2}, "execution": {"clients_in_flight": 2}, "local": {"balance_loss": 0.0}}
    config = make_config(root, "starved", WHOLE, change)
    runtime = joined(rank)
    parts, journal = build(config, runtime, build_topology(config.topology, runtime))
    if rank == 0:  # the largest client's home
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + SLACK, resource.RLIM_INFINITY))
    finish(parts, journal)


def test_within_an_expert_parallel_cluster_the_next_start_does_it(root: Path) -> None:
    """The peers wait in an all-to-all: nobody can go on, but what every rank has to do next is on disk."""
    with pytest.raises(
        RankError, match=r"LostError: rank 0 on \S+, round 1: client \S+: \d+ sequences in one pass do not fit"
    ) as lost:
        run_distributed(starve, 2, root)
    assert lost.value.rank == 0
    lines = [json.loads(line) for line in skipped_clients.read_lines(root / "runs" / "starved") if line]
    assert every(len(key) == 16 and round_index == 1 for key, round_index, *_ in lines)
    # All clients of the round, and how many sequences there are to be in a pass: half of the largest one's.
    assert {line[2] for line in lines} == {0, 1, 2, None}, lines
    ((half,),) = ({line[3] for line in lines},)
    assert SAMPLES[1] < half <= SAMPLES[0] // 2
