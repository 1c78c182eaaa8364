"""A pass that does not fit into memory is cut before a client is left out of a round; shortages are made by a count of rows.

What real allocators and devices say is in test_out_of_memory.py and tests/fake_cuda/cases/memory.py.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from federations import Result, alone, build, finish, make_config, run_alone, write_inputs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedmoe_ds.checkpoint.skipped_clients import NAME, SkippedClients, read_lines
from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.batches import pass_bounds, pass_sizes
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_work import ClientWork
from fedmoe_ds.clients.local_training import WaveTrainer
from fedmoe_ds.clients.out_of_memory import OutOfMemory, is_out_of_memory
from fedmoe_ds.clients.pass_limits import PassLimits, shortage
from fedmoe_ds.config import Config
from fedmoe_ds.federation.schedule import schedule
from fedmoe_ds.federation.shortage import make_room
from fedmoe_ds.model.batch import Batch
from fedmoe_ds.model.forward import AdaptedModel, Loss

WHOLE: dict[str, Any] = {
    "execution": {"micro_batch_size": None, "clients_in_flight": 3},
    "local": {"max_steps": 2},
    "evaluation": {"max_sequences": 2, "client_sequences": 0, "every": 9},
}
WORDS = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limits")
    write_inputs(folder)
    return folder


class Room:
    """How many sequences fit into a pass, from the pass with number `since` on; `sizes` are all that were tried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sequences: int, since: int = 0) -> None:
        self.sizes, self.failed = list[int](), list[int]()
        real: Callable[..., Loss] = AdaptedModel.loss

        def loss(model: AdaptedModel, batch: Batch, *rest: Any) -> Loss:
            self.sizes.append(max((segment.stop for segment in batch.segments), default=0))
            if len(self.sizes) > since and self.sizes[-1] > sequences:
                self.failed.append(len(self.sizes))
                raise RuntimeError(WORDS)
            return real(model, batch, *rest)

        monkeypatch.setattr(AdaptedModel, "loss", loss)


def statuses(result: Result) -> set[str]:
    return {event["status"] for event in result.events if event["event"] == "client"}


def test_fewer_clients_in_a_pass_change_no_bit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_alone(make_config(root, "together", WHOLE))
    room = Room(monkeypatch, 5)  # each client has up to 4 sequences in a step, and there are three of them
    short = run_alone(make_config(root, "apart", WHOLE))
    assert statuses(short) == {"ok"} and short.digest == whole.digest and short.scores() == whole.scores()
    # Halved at the first pass of the first wave, and never again: no two of them are six sequences or less.
    assert room.failed == [1] and room.sizes[0] == 12
    (event,) = [event for event in short.events if event["event"] == "limits"]
    assert (event["round"], event["together"], event["each"]) == (2, 6, None)
    lines = [json.loads(line)[1:] for line in read_lines(root / "runs" / "apart") if line]
    assert lines == [[1, None, 6]]


def test_a_client_that_does_not_fit_whole_is_trained_in_parts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly as if `execution.micro_batch_size` had asked for it, where memory is short from the beginning."""
    asked = run_alone(make_config(root, "asked", WHOLE, {"execution": {"micro_batch_size": 2}}))
    room = Room(monkeypatch, 3)
    short = run_alone(make_config(root, "parts", WHOLE))
    assert statuses(short) == {"ok"} and short.digest == asked.digest
    assert room.failed == [1, 2] and max(room.sizes[2:]) == 2


def test_whoever_resumes_the_round_cuts_it_the_same_way(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory gets short in the second wave: clients of the first one were trained in whole steps, and stay so."""
    with monkeypatch.context() as patch:
        room = Room(patch, 3, since=2)
        short = run_alone(make_config(root, "later", WHOLE))
    assert statuses(short) == {"ok"} and room.failed
    written = (root / "runs" / "later" / NAME).read_text()
    lines = [json.loads(line) for line in written.splitlines() if line]
    assert {line[1] for line in lines} == {1} and len({line[2] for line in lines} - {None}) == 3
    folder = root / "runs" / "again"
    folder.mkdir()
    (folder / NAME).write_text(f'["of other settings", 1, 1]\n["torn", 1, {written}')
    again = run_alone(make_config(root, "again", WHOLE))
    whole = run_alone(make_config(root, "whole", WHOLE))
    assert again.digest == short.digest != whole.digest
    # A resumed start says so before its first round.
    assert [event["round"] for event in again.events if event["event"] == "limits"] == [1, 2]


def test_packed_passes_are_cut_by_their_tokens(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = {"execution": {"packing": True}, "federation": {"rounds": 1}}
    asked = run_alone(make_config(root, "packed", WHOLE, packed, {"execution": {"micro_batch_size": 2}}))
    room = Room(monkeypatch, 100)  # every token is a sequence of its own there
    short = run_alone(make_config(root, "packed-short", WHOLE, packed))
    assert statuses(short) == {"ok"} and short.digest == asked.digest and room.failed == [1, 2]


def test_a_loss_of_whole_steps_is_not_cut(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients share passes no more; who does not fit alone is left out."""
    room = Room(monkeypatch, 3)
    change = {"local": {"balance_loss": 0.01}, "federation": {"rounds": 1}, "data": {"holdout": 0.4}}
    short = run_alone(make_config(root, "balanced", WHOLE, change))
    (event,) = [event for event in short.events if event["event"] == "round"]
    assert statuses(short) == {"ok", "out-of-memory"} and 0 < event["dropped"] < event["participants"]
    assert max(size for place, size in enumerate(room.sizes, start=1) if place not in room.failed) <= 3
    assert short.parts.execution.current is not None  # a pass that went well


def test_nothing_of_a_failed_pass_is_held(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    real = AdaptedModel.loss

    def loss(model: AdaptedModel, batch: Batch, *rest: Any) -> Loss:
        found = real(model, batch, *rest)
        if not held:
            held.append(weakref.ref(found.run))
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        assert held[0]() is None, "the routers' losses of the failed pass, and the graph behind them"
        return found

    monkeypatch.setattr(AdaptedModel, "loss", loss)
    change = {"local": {"z_loss": 0.01}, "federation": {"rounds": 1}}
    assert statuses(run_alone(make_config(root, "held", WHOLE, change))) == {"ok"}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(WORDS),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuda runtime error (2): cudaErrorMemoryAllocation"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_words_of_allocators(error: BaseException) -> None:
    assert is_out_of_memory(error)


def test_other_errors_are_no_shortage() -> None:
    for text in (
        "CUDA error: device-side assert triggered",
        "CUBLAS_STATUS_EXECUTION_FAILED",
        "out of resource: shared memory",
    ):
        assert not is_out_of_memory(RuntimeError(text))


Steps = list[list[list[int]]]
"""Sequences of every step of every client, by home rank and slot."""


class Wave:
    """A wave without a model: its passes are those of `WaveTrainer`. Room is a number of sequences, by step (in one
    they may be longer than in another) and rank."""

    def __init__(self, steps: Steps, room: list[list[int]]) -> None:
        numbers = itertools.count()
        self.homes = [[(Client(next(numbers), "c", 1, 9, 9, 9), counts) for counts in home] for home in steps]
        self.room = room
        self.merged = SimpleNamespace(pool=SimpleNamespace(merge=True, home_clients=3), _pass=self.try_pass)

    def clients(self, gone: set[int]) -> list[Client]:
        return [client for home in self.homes for client, _ in home if client.index not in gone]

    def try_pass(self, everyone: list[ClientWork], step: int, micro: int, *rest: object) -> None:
        for home, room in enumerate(self.room[step]):
            if sum(work.size(step, micro) for work in everyone if work.home == home) > room:
                raise shortage(everyone, step, micro)

    def train(self, limits: PassLimits, gone: set[int]) -> None:
        works: list[list[ClientWork]] = []
        for home, clients in enumerate(self.homes):
            here = [(client, counts) for client, counts in clients if client.index not in gone]
            works.append([self.work(client, counts, (home, slot), limits) for slot, (client, counts) in enumerate(here)])
        for step in range(3):
            WaveTrainer._each_pass(cast(WaveTrainer, self.merged), step, works, limits, cast(Any, None))

    def work(self, client: Client, counts: list[int], place: tuple[int, int], limits: PassLimits) -> ClientWork:
        batches = [np.arange(count) for count in counts]
        bounds = [pass_bounds(batch, limits.of(client.index, None)) for batch in batches]
        sizes = [pass_sizes(*each) for each in zip(batches, bounds, strict=True)]
        return ClientWork(client, *place, Assignment(cap=1), batches, bounds, sizes, 1, 0.1)


COUNTS = st.lists(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), max_size=3), min_size=1, max_size=3)


@given(steps=COUNTS, room=st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3), min_size=3, max_size=3))
@example(steps=[[[1, 1]], [[1], [1, 1]]], room=[[1, 1, 1], [0, 0, 0], [0, 0, 0]])
@settings(max_examples=40, deadline=None)
def test_shortages_end(steps: Steps, room: list[list[int]]) -> None:
    """Whatever memory there is: each one writes down something new, on the last step one sequence alone does not fit, and what
    the next start reads from the file is what this one knows."""
    wave, seen = Wave(steps, room), list[PassLimits]()
    with tempfile.TemporaryDirectory() as name:
        here = SkippedClients(Path(name), {}, [])
        while True:
            gone, limits = here.of(1), here.limits(1)
            try:
                wave.train(limits, gone)
                break
            except OutOfMemory as error:
                _, lost = make_room(here, 1, error, wave.clients(gone), Config())
                assert lost is None or (error.together, error.sequences) == (None, 1)
            assert (here.of(1), here.limits(1)) != (gone, limits), "the next start would try the same again"
            assert (here.limits(1) == limits) == (lost is not None)
            there = SkippedClients(Path(name), {}, read_lines(Path(name)))
            assert (there.of(1), there.limits(1), there.limits(2)) == (here.of(1), here.limits(1), here.limits(2))
            seen.append(limits)
        assert len(seen) <= 2 * 6 + len(wave.clients(set())), "halved to one, of all together and of each"
        # Whose first step has no room at all cannot be there any more.
        empty = [home for home, sequences in zip(wave.homes, room[0], strict=False) if sequences == 0]
        assert {client.index for home in empty for client, _ in home} <= here.of(1)


def test_clients_alone_on_their_ranks_share_nothing(tmp_path: Path) -> None:
    """Late in a wave only slot 0 of one rank and slot 1 of another train, one sequence each: there is nothing left to part."""
    wave = Wave([[[1, 1]], [[2], [1, 1]]], [])
    works = [[wave.work(client, counts, (home, slot), PassLimits(1)) for slot, (client, counts) in enumerate(clients)]
             for home, clients in enumerate(wave.homes)]  # fmt: skip
    assert PassLimits(1).groups(1, works) == [[0, 1]]
    found = shortage([works[0][0], works[1][1]], 1, 0)
    assert (found.together, found.sequences) == (None, 1)
    way, lost = make_room(SkippedClients(tmp_path, {}, []), 1, found, wave.clients(set()), Config())
    assert lost is found.client and way == "the round goes on without it"


def work(index: int, home: int, sizes: list[int]) -> ClientWork:
    """One local step, cut into passes of so many sequences."""
    client, bounds = Client(index, "ABCDE"[index], 1, 9, 9, 9), np.cumsum([0, *sizes]).tolist()
    return ClientWork(client, home, 0, Assignment(1), [np.arange(bounds[-1])], [bounds], [sizes], 1, 0.1)


def test_who_is_named_has_the_most_in_that_very_pass() -> None:
    """With one slot per rank; whoever has the largest pass of the step may have a small one here, and not be the cause."""
    a, b = work(0, 0, [4, 1]), work(1, 1, [4, 3])
    for everyone in ([a, b], [b, a]):  # the same in any order
        found = shortage(everyone, 0, 1)
        assert (found.client.name, found.sequences, found.together) == ("B", 3, None)
        assert shortage(everyone, 0, 0).client.name == "A"


def test_an_evaluation_after_a_lost_wave(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round's last client fits in no way, and its method has given it a factor: the scores are those of a round without."""
    change = {
        "method": {"name": "fslora"},
        "federation": {"rounds": 1, "participation": 0.5, "tiers": [{"rank": 2, "share": 1.0}]},
        "local": {"balance_loss": 0.01, "max_steps": 1},  # of a whole step, which is then not cut
        "execution": {"clients_in_flight": 1},
    }
    parts, journal = build(make_config(root, "lost", WHOLE, change), *alone())
    (waves,) = schedule(parts.participants(1), parts.spec.cost, parts.config.local, 1, 1, 1)
    real, factors = WaveTrainer._run, list[float]()

    def run(trainer: WaveTrainer, works: list[ClientWork], *rest: Any) -> None:
        if works[0].client == waves[-1][0][0]:
            factors.append(works[0].assignment.scale)
            raise RuntimeError(WORDS)
        real(trainer, works, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(WaveTrainer, "_run", run)
        lost = finish(parts, journal)
    assert factors == [2.0] and statuses(lost) == {"ok", "out-of-memory"}
    folder = root / "runs" / "without"
    folder.mkdir()
    (folder / NAME).write_text((root / "runs" / "lost" / NAME).read_text())
    without = run_alone(make_config(root, "without", WHOLE, change))
    assert lost.digest == without.digest and lost.scores() == without.scores()


def test_findings_of_rounds(tmp_path: Path) -> None:
    skipped = SkippedClients(tmp_path, {}, [])
    skipped.add(2, 7)
    skipped.limit(2, [3, 4], 8, together=True)
    skipped.limit(2, [4], 4)
    skipped.limit(2, [], 12, together=True)
    lines = [*read_lines(tmp_path), json.dumps([skipped.key, 1, None]), json.dumps([skipped.key, 1, 1, 0, 2]), '["torn'[:4]]
    for found in (skipped, SkippedClients(tmp_path, {}, lines)):
        assert found.of(2) == {7} and found.of(1) == found.of(3) == set()
        assert found.limits(1) == PassLimits(8) and found.limits(2) == PassLimits(8, None, {3: 8, 4: 4})
        assert found.limits(3) == PassLimits(8, 4)
    assert SkippedClients(tmp_path, {"of": "others"}, lines).limits(3) == PassLimits()
    assert (PassLimits(8, 4).of(3, None), PassLimits(8, None, {3: 2}).of(3, 5), PassLimits().of(3, 5)) == (4, 2, 5)
