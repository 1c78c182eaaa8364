"""What ranks tell each other in a round: how many messages, and that all of them learn what one of them knows."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from federations import alone, build, leave_out, make_config, write_inputs
from torch import Tensor

from fedmoe_ds.checkpoint.client_homes import Homes
from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.checkpoint.state import PartialRound
from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.config import Config
from fedmoe_ds.distributed.control import Alone
from fedmoe_ds.distributed.launcher import Launch
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.round_messages import meet, stop_agreed, unweighted
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.planner.counts import CONTROL, ControlCalls

SMALL: dict[str, Any] = {
    "method": {"name": "fedit"},  # without personal state, which travels by itself
    "federation": {"tiers": [{"top_k": 2, "share": 1.0}, {"top_k": 1, "share": 1.0}]},
    "local": {"max_steps": 1, "batch_size": 3},
    "evaluation": {"max_sequences": 2, "client_sequences": 0, "every": 100},
    "checkpoint": {"every": 100},
}


class Counting(Alone):
    """Counts the messages that would reach every rank, and keeps what this one tells in gathers."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.told: list[Any] = []

    def gather(self, payload: bytes) -> list[bytes]:
        self.calls["gather"] += 1
        self.told.append(json.loads(payload))
        return [payload]

    def broadcast(self, payload: bytes) -> bytes:
        self.calls["broadcast"] += 1
        return payload

    def sum(self, total: Tensor) -> Tensor:
        self.calls["sum"] += 1
        return total

    def largest(self, values: Tensor) -> Tensor:
        self.calls["largest"] += 1
        return values


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messages")
    write_inputs(folder, samples=(7, 6, 5), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    return folder


def counted(config: Config) -> tuple[Federation, Journal, Counting, Counting]:
    """A run at the beginning of round 1, and the messages among all ranks and within a cluster from here on."""
    world, inside = Counting(), Counting()
    runtime, topology = alone()
    parts, journal = build(config, runtime, replace(topology, control=inside))
    parts.runtime = journal.runtime = parts.evaluator.runtime = Runtime(runtime.launch, runtime.device, world)
    federation = Federation(parts, journal)
    federation.checkpoints.writer.runtime = parts.runtime
    inside.calls.clear()
    return federation, journal, world, inside


def per_round(root: Path, name: str, changes: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """The messages of one more round, among all ranks and within a cluster."""
    found = []
    for rounds in (2, 3):
        config = make_config(root, f"{name}-{rounds}", SMALL, {"federation": {"rounds": rounds}}, changes)
        federation, journal, world, inside = counted(config)
        federation.run()
        journal.close()
        found.append((world.calls, inside.calls))
    (world_2, inside_2), (world_3, inside_3) = found
    return world_3 - world_2, inside_3 - inside_2


def test_messages_of_a_round(root: Path) -> None:
    """Reports and stop requests, counts, and the question at its end; what is recorded asks nobody."""
    plain, inside = per_round(root, "plain", {})
    assert plain == Counter(gather=1, sum=1, largest=1)
    evaluated, _ = per_round(root, "evaluated", {"evaluation": {"every": 1}})
    assert evaluated == plain + Counter(sum=1), "all tiers"
    saved, _ = per_round(root, "saved", {"checkpoint": {"every": 1}})
    assert saved == plain + Counter(gather=2, broadcast=2)
    own, _ = per_round(root, "own", {"method": {"name": "fedsa-lora"}})
    assert own == plain + Counter(gather=1, largest=1), "room for what clients keep, and who was trained where"
    _, waves = per_round(root, "waves", {"execution": {"clients_in_flight": 1}})
    assert (inside, waves) == (Counter(largest=1), Counter(largest=3)), "a question after every wave: one, and three"
    # What the planner takes a round for.
    seen = ControlCalls(
        per_round=plain.total(),
        personal=(own - plain).total(),
        per_wave=(waves - inside).total() / 2,
        per_evaluation=(evaluated - plain).total(),
        per_checkpoint=(saved - plain).total(),
    )
    assert seen == CONTROL


def test_a_rank_tells_what_it_has_added(root: Path) -> None:
    """Reports that an earlier start has left are on every rank, and so are absences and limits that this start has read: told
    by all, they would travel as often as there are ranks."""
    federation, journal, world, _ = counted(make_config(root, "again", SMALL))
    parts = federation.parts
    parts.state.partial, parts.state.sums = PartialRound({0: {"status": "ok"}}), parts.new_sums(1)
    leave_out(parts, {1: 2})
    (absent,) = parts.skipped.of(1)
    work = federation._sample(1)
    assert set(work.partial.done) == {0, absent}
    work.partial.done[1] = {"status": "ok", "tokens": 7}
    parts.skipped.limit(1, [1], 2)
    assert not meet(parts, work.partial)
    assert world.told == [[False, [[1, 1, 2]], {"1": {"status": "ok", "tokens": 7}}]]
    assert set(work.partial.done) == {0, 1, absent} and not work.unfinished
    meet(parts, work.partial)
    assert world.told[1:] == [[False, [], {}]], "everybody knows by now"
    journal.close()


class Meeting:
    """Control planes of ranks that are threads."""

    def __init__(self, size: int) -> None:
        self.size, self._slots, self._barrier = size, list[Any]([None] * size), threading.Barrier(size, timeout=20.0)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found

    def runtime(self, rank: int) -> Runtime:
        control = SimpleNamespace(
            rank=rank,
            size=self.size,
            gather=lambda payload: self.exchange(rank, payload),
            broadcast=lambda payload: self.exchange(rank, payload)[0],
            largest=lambda values: torch.stack(self.exchange(rank, values)).amax(0),
        )
        return Runtime(Launch("test", rank, self.size, rank), torch.device("cpu"), control)  # type: ignore[arg-type]


def in_world(size: int, action: Any) -> list[Any]:
    """What `action(rank, runtime)` gives or raises on every rank."""
    meeting, found = Meeting(size), list[Any]([None] * size)

    def work(rank: int) -> None:
        try:
            found[rank] = action(rank, meeting.runtime(rank))
        except UserError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    return found


def test_what_rank_0_cannot_record_ends_all(tmp_path: Path) -> None:
    """Nothing is said while it happens, nothing is written after it, and at the next question everybody knows."""

    def action(rank: int, runtime: Runtime) -> Any:
        journal, parts = Journal(tmp_path, runtime), SimpleNamespace(runtime=runtime, stop=SimpleNamespace(requested=False))
        journal.event("first")
        assert not stop_agreed(parts, journal)  # type: ignore[arg-type]
        if rank == 0:
            real = journal.log.write

            def full(event: str, **fields: object) -> None:
                if event == "second":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                real(event, **fields)

            journal.log.write = full  # type: ignore[method-assign]
        journal.event("second")
        journal.event("third")
        assert journal.failed == (rank == 0)
        return stop_agreed(parts, journal)  # type: ignore[arg-type]

    found = in_world(3, action)
    assert every(text == f"output: {tmp_path}: cannot write: No space left on device; make room, then start again with "
                 "--resume auto" for text in found), found  # fmt: skip
    assert [line.split('"')[3] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == ["first"]


@pytest.mark.parametrize("asked", [None, 0, 2])
def test_a_stop_of_any_rank_is_known_everywhere(tmp_path: Path, asked: int | None) -> None:
    def action(rank: int, runtime: Runtime) -> Any:
        parts = SimpleNamespace(runtime=runtime, stop=SimpleNamespace(requested=rank == asked))
        return stop_agreed(parts, Journal(tmp_path, runtime))  # type: ignore[arg-type]

    assert in_world(3, action) == [asked is not None] * 3


def test_failures_and_results_of_one_rank_reach_all() -> None:
    def fails(rank: int, runtime: Runtime) -> Any:
        def refuse() -> int:
            if rank:
                raise UserError(f"rank {rank} says no")
            return 7

        assert runtime.run_on_rank0(lambda: {"from": rank}) == {"from": 0}
        return runtime.run_on_all_ranks(refuse)

    assert in_world(3, fails) == ["rank 1 says no"] * 3
    assert in_world(2, lambda rank, runtime: runtime.run_on_all_ranks(lambda: rank)) == [0, 1]
    assert in_world(2, lambda rank, runtime: runtime.any(rank == 1, False)) == [[True, False]] * 2


@pytest.mark.parametrize("trains", [True, False])
def test_of_a_block_without_weight_each_cluster_asks_the_clients_at_home_in_it(trains: bool) -> None:
    """What a client keeps is nowhere else when the round has ended, and what it is told may follow from that."""
    block, clients = BlockSpec("attention.q_proj.lora_B", (0, 1), (4, 2)), [Client(i, f"c{i}", 1, 3, 5, 5) for i in range(2)]
    kept = BlockSpec("kept", (-1,), (1,), personal=True, trained=False)

    def named(cluster: int, elsewhere: bool) -> tuple[list[int], list[bool], list[str]]:
        asked, said = list[int](), list[bool]()

        def assign(client: Client, round_index: int) -> Assignment:
            asked.append(client.index)
            return Assignment(1, trained_N=np.full(2, trains and client.index == 1))

        def any_rank(*flags: bool) -> list[bool]:
            said.extend(flags)
            return [flag or elsewhere for flag in flags]

        parts: Any = SimpleNamespace(
            spec=SimpleNamespace(method=SimpleNamespace(resting=lambda round_index: frozenset()), blocks=[block]),
            trainer=SimpleNamespace(hooks=SimpleNamespace(assign=assign)),
            state=SimpleNamespace(personal=Personal([kept], 1, 2, homes=Homes(clusters=2, cluster=cluster))),
            runtime=SimpleNamespace(any=any_rank),
        )
        return asked, said, unweighted(parts, clients, 1, {block.name: 0})

    expected = [block.name] if trains else []
    assert named(0, trains) == ([0], [False], expected)
    assert named(1, False) == ([1], [trains], expected)
