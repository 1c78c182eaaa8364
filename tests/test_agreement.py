"""Agreement: a job whose hosts have other keys, other code or other contents ends in one line, on every rank."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedmoe_ds.config import Config, load_config
from fedmoe_ds.distributed.launcher import Launch
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import agreement
from fedmoe_ds.federation.agreement import check_same_contents, check_same_start, shared_keys

CONFIG = load_config(Path("quickstart"), [])


class Meeting:
    """What ranks that are threads gather."""

    def __init__(self, size: int) -> None:
        self.told: list[str] = [""] * size
        self.barrier = threading.Barrier(size, timeout=60.0)
        self.calls = 0

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.told[rank] = json.dumps(value)
        if self.barrier.wait() == 0:  # one of them
            self.calls += 1
        result = [json.loads(text) for text in self.told]
        self.barrier.wait()
        return result


class Rank:
    """The part of a runtime that is used here; two ranks on every host."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.meeting = rank, meeting
        self.launch = Launch("torchrun", rank, len(meeting.told), rank % 2)

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.gather(self.rank, value)


def run(size: int, part: Callable[[Any], None]) -> tuple[list[str | None], int]:
    """How every rank ended, and how often all of them met."""
    meeting, found = Meeting(size), [""] * size

    def one(rank: int) -> None:
        try:
            part(Rank(rank, meeting))
        except UserError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [text or None for text in found], meeting.calls


def configs(*overrides: Sequence[str]) -> list[Config]:
    return [load_config(Path("quickstart"), list(ours)) for ours in overrides]


def test_ranks_that_were_started_alike_meet_once() -> None:
    ends, meetings = run(4, lambda rank: check_same_start(CONFIG, rank))
    assert ends == [None] * 4 and meetings == 1


def test_the_first_key_that_a_rank_has_otherwise_is_named_on_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    mine = configs([], [], ["local.lr=0.5", "seed=3"], ["seed=4"])
    ends, meetings = run(4, lambda rank: check_same_start(mine[rank.rank], rank))
    line = "rank 2 on node7 was started with this, rank 0 on node7 was started with 0; give every host the same file and keys"
    assert ends == [f"seed: 3: {line}"] * 4 and meetings == 2


def test_what_a_host_may_have_for_itself_is_no_difference() -> None:
    mine = configs(["execution.threads=1"], ["execution.threads=4", "topology.interface=ib0"])
    assert mine[0] != mine[1]
    assert run(2, lambda rank: check_same_start(mine[rank.rank], rank)) == ([None, None], 1)


@pytest.mark.parametrize("section", sorted(agreement.OWN))
def test_those_keys_exist(section: str) -> None:
    kept = shared_keys(CONFIG)[section]
    assert set(CONFIG.model_dump(mode="json")[section]) - set(kept) == set(agreement.OWN[section])


@pytest.mark.parametrize("name", ["source of fedmoe-ds", *agreement.PACKAGES])
def test_a_host_that_was_not_brought_up_to_date_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second host, that of ranks 2 and 3."""
    real, here = agreement._software(), threading.local()

    def start(rank: Any) -> None:
        here.old = rank.rank == 2
        check_same_start(CONFIG, rank)

    monkeypatch.setattr(agreement, "_software", lambda: real | {name: "0.0.1"} if here.old else real)
    ends, _ = run(4, start)
    assert len(set(ends)) == 1 and ends[0] is not None
    assert ends[0].startswith(f"{name}: 0.0.1: rank 2 on ") and ends[0].endswith(
        f"runs {real[name]}; install the same on every host"
    )


def test_contents_that_a_rank_reads_by_itself_are_compared() -> None:
    identity = {"seed": 0, "devices.trace": "ab", "local": {"lr": 0.1}}
    theirs = [identity, identity | {"devices.trace": "cd"}]
    ends, _ = run(2, lambda rank: check_same_contents(theirs[rank.rank], rank, ["node1", "node2"]))
    line = "devices.trace: cd: rank 1 on node2 finds this, rank 0 on node1 finds ab; give every host the same files"
    assert ends == [line] * 2
    assert run(2, lambda rank: check_same_contents(identity, rank, ["node1"] * 2)) == ([None, None], 1)
