"""Which device a rank takes, and what the ranks of a world are told about it before any group is built."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import deepspeed.ops
import pytest
import torch
import torch.distributed as torch_dist
from distributed import run_distributed
from every import every
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from fedmoe_ds.config import Config, ExecutionConfig
from fedmoe_ds.distributed import device_queue, devices, meeting, runtime
from fedmoe_ds.distributed.activity import Activity, activity
from fedmoe_ds.distributed.devices import Place, check_places, own_device, problem_of, uses_cuda
from fedmoe_ds.distributed.watchdog.rank_health import Limits, Peer, stuck
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.run_spec import check_promise, check_start, is_bitwise


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch as on a host with so many GPUs."""
    host: dict[str, Any] = {"visible": 1, "bound": None}
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: host["visible"] > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: host["visible"])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: host.update(bound=device))
    return host


@pytest.mark.parametrize(
    ("variable", "visible", "kind"),
    [(None, 1, "cuda"), (None, 0, "cpu"), ("cpu", 1, "cpu"), ("cuda", 1, "cuda"), ("", 1, "cuda"), ("xpu", 1, "cpu")],
)
def test_auto_takes_what_deepspeed_takes(
    gpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch, variable: str | None, visible: int, kind: str
) -> None:
    gpus["visible"] = visible
    if variable is not None:
        monkeypatch.setenv("DS_ACCELERATOR", variable)
    assert uses_cuda("auto") == (kind == "cuda") and own_device("auto", 0).type == kind
    assert os.environ["DS_ACCELERATOR"] == (variable or kind), "DeepSpeed works on the same"


@pytest.mark.parametrize(
    ("variable", "device", "visible", "text"),
    [
        ("cpu", "cuda", 1, r"^topology\.device: cuda: .*DS_ACCELERATOR=cpu.*unset it, or use cpu or auto$"),
        ("cuda", "cpu", 1, r"^topology\.device: cpu: .*DS_ACCELERATOR=cuda.*unset it, or use cuda or auto$"),
        ("", "cuda", 0, r"^topology\.device: cuda: no CUDA device is visible; use cpu or auto$"),
        ("cuda", "auto", 0, r"^DS_ACCELERATOR: cuda: no CUDA device is visible; unset it$"),
    ],
)
def test_a_device_that_cannot_be(
    gpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch, variable: str, device: str, visible: int, text: str
) -> None:
    gpus["visible"] = visible
    monkeypatch.setenv("DS_ACCELERATOR", variable)
    with pytest.raises(UserError, match=text):
        own_device(device, 0)


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 5, 5), (1, 0, 0), (1, 3, 0), (2, 3, 1)])
def test_a_rank_takes_the_gpu_of_its_number_among_those_it_sees(
    gpus: dict[str, Any], visible: int, local_rank: int, index: int
) -> None:
    gpus["visible"] = visible
    assert own_device("cuda", local_rank) == gpus["bound"] == torch.device("cuda", index)


def on(host: str, *ids: str, visible: int = 1) -> list[Place]:
    return [Place(host, "cuda", gpu, visible, rank) for rank, gpu in enumerate(ids)]


def test_a_gpu_for_every_rank() -> None:
    assert problem_of([*on("a", "0", "1"), *on("b", "2", "3")]) is None, "one visible for each task, number 0 to all"
    assert problem_of(on("a", "0", "1", visible=8)) is None and problem_of([Place("a", "cpu"), Place("a", "cpu")]) is None


@pytest.mark.parametrize(
    ("places", "text"),
    [
        (on("a", "0", "0"), "2 ranks on a and 1 GPU: ranks 0 and 1 would share one; start at most 1 on a host, "),
        (
            on("a", "0", "1", "0", visible=2),
            "3 ranks on a and 2 GPUs: ranks 0 and 2 would share one; start at most 2 on a host, ",
        ),
        ([*on("a", "0"), *on("b", "1", "1")], "2 ranks on b and 1 GPU: ranks 1 and 2 would share one; start at most 1"),
        ([Place("a", "cuda", "0", 2)] * 2, "2 ranks on a and 2 GPUs: ranks 0 and 1 would share one; LOCAL_RANK is 0 on both; "),
    ],
)
def test_ranks_that_would_share_a_gpu(places: list[Place], text: str) -> None:
    found = problem_of(places)
    assert found is not None and found.startswith(f"topology.device: cuda: {text}"), found


def test_ranks_on_different_kinds_of_device() -> None:
    found = problem_of([*on("a", "0"), Place("b", "cpu")])
    assert found == (
        "topology.device: auto: rank 0 on a sees a GPU and rank 1 on b none; give every rank one, or use topology.device=cpu"
    )


class FarStore(PrefixStore):
    """A store whose answers take a while: `get` asks twice, first whether there is something."""

    def get(self, key: str) -> bytes:
        self.wait([key])
        if threading.current_thread().name != "rank 0":
            time.sleep(0.1)
        return bytes(super().get(key))


def answers_of(monkeypatch: pytest.MonkeyPatch, gpus: Sequence[str]) -> dict[int, str]:
    """What every rank is told, by a GPU for each. Ranks are threads; rank 0 serves the store until it leaves."""
    answers: dict[int, str] = {}
    monkeypatch.setattr(meeting, "_meetings", itertools.repeat(0))  # one counter, where ranks are threads
    monkeypatch.setattr(meeting, "PrefixStore", FarStore)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores: list[Store | None] = [server, *(TCPStore("127.0.0.1", server.port, is_master=False) for _ in gpus[1:])]
    del server

    def rank(number: int) -> None:
        store, stores[number] = stores[number], None
        assert store is not None
        try:
            check_places(store, number, len(gpus), Place("a", "cuda", gpus[number], 1, number))
            answers[number] = "ok"
            stores[number] = store  # a rank that is not refused builds its groups with it
        except Exception as error:
            answers[number] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=rank, args=(number,), name=f"rank {number}") for number in range(len(gpus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return answers


def test_all_ranks_hear_that_each_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers_of(monkeypatch, ["0", "1"]) == {0: "ok", 1: "ok"}


def test_all_ranks_get_the_same_refusal_before_rank_0_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = answers_of(monkeypatch, ["0"] * 4)
    assert len(answers) == 4 and set(answers.values()) == {answers[0]}, answers
    assert answers[0].startswith("UserError: topology.device: cuda: 4 ranks on a and 1 GPU: ranks 0 and 1 would share one; ")


def probed(rank: int) -> bool:
    return "__compatible_ops__" in vars(deepspeed.ops)


def test_deepspeed_is_not_made_to_look_for_a_compiler() -> None:
    """It prints a warning for each of its operators that needs $CUDA_HOME where there is none."""
    assert run_distributed(probed, 1) == [False]


class Mark:
    """An event of a device."""

    def __init__(self, passed: bool) -> None:
        self.passed = passed

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, end_event: Any) -> float:
        assert self.passed and end_event.passed, "an event that has not been passed has no time"
        return 250.0


def test_a_collective_on_a_device_is_what_its_rank_waits_in() -> None:
    """NCCL's return at once; the host may have gone on to whatever it likes."""
    here = Activity()
    first, second = (Mark(True), Mark(False)), (Mark(False), Mark(False))
    here.queue.add("all_to_all over cluster 0", *first)
    here.queue.add("all_reduce over shard 0", *second)
    assert here.state()["waiting"] == "all_to_all over cluster 0" and here.state()["for_s"] < 5.0
    first[1].passed = True
    assert here.state()["waiting"] is None, "what lies before the next one is computed"
    second[0].passed = True
    assert here.state()["waiting"] == "all_reduce over shard 0"
    with here.collective("gather", "the world"):
        assert here.state()["waiting"] == "gather over the world"
    second[1].passed = True
    assert here.state()["waiting"] is None and here.queue.waiting() is None


def test_a_rank_that_never_comes_to_a_collective_on_the_device_is_named() -> None:
    here, limits = Activity(), Limits(30.0, 0.0)
    here.queue.add("all_to_all over cluster 0", Mark(True), Mark(False))
    waiting, absent = Peer(0, "a"), Peer(1, "b")
    for peer, state in ((waiting, here.state()), (absent, Activity().state())):
        peer.hear(state)
    found = stuck([waiting, absent], limits)
    assert found is not None and "in all_to_all over cluster 0" in found and "not in it: rank 1 on b" in found


def test_a_device_times_its_collectives_itself() -> None:
    """What the host takes to queue one says nothing; of one that runs into the next round, that round counts the time."""
    here = Activity()
    marks = [Mark(True), Mark(True), Mark(False)]
    for mark in marks:
        with here.collective("all_to_all", "cluster 0", 8, queued=True):
            time.sleep(0.01)
        here.queue.add("all_to_all over cluster 0", Mark(True), mark)
    with here.collective("gather", "the world", 2):
        time.sleep(0.01)
    assert here.state()["waiting"] == "all_to_all over cluster 0", "the watchdog has asked meanwhile, and counted the others"
    taken = here.take()
    assert taken["all_to_all"] == {"calls": 3, "seconds": 0.5, "bytes": 24} and taken["gather"]["seconds"] >= 0.01
    marks[2].passed = True
    with here.collective("all_to_all", "cluster 0", 8, queued=True):
        pass
    assert here.take()["all_to_all"] == {"calls": 1, "seconds": 0.25, "bytes": 8}


def test_a_device_that_has_lost_track_gives_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum without some of the collectives would pass for a faster network."""
    monkeypatch.setattr(device_queue, "_LONGEST", 2)
    here = Activity()
    for passed in (False, True, True):
        with here.collective("all_reduce", "shard 0", 8, queued=True):
            here.queue.add("all_reduce over shard 0", Mark(True), Mark(passed))
    assert here.take() == {"all_reduce": {"calls": 3, "seconds": None, "bytes": 24}}
    with here.collective("all_reduce", "shard 0", 8, queued=True):
        here.queue.add("all_reduce over shard 0", Mark(True), Mark(True))
    assert here.take()["all_reduce"]["seconds"] == 0.25, "the next round counts again"


def test_a_device_with_an_error_is_asked_no_more() -> None:
    class Broken(Mark):
        def query(self) -> bool:
            raise RuntimeError("CUDA error: unspecified launch failure")

    here = Activity()
    here.queue.add("all_to_all over cluster 0", Broken(False), Broken(False))
    assert here.state()["waiting"] is None and here.queue.waiting() is None
    assert here.queue.take() is None, "and nobody knows how long it was in it"


@pytest.mark.parametrize(
    ("error", "waits", "lost"),
    [
        (torch_dist.DistBackendError("NCCL communicator was aborted on rank 1."), True, True),
        (torch_dist.DistBackendError("NCCL error: unhandled cuda error"), True, False),
        (RuntimeError("CUDA error: unspecified launch failure"), True, False),
        (RuntimeError("shape mismatch"), False, False),
        (ValueError("NCCL"), False, False),
    ],
)
def test_an_error_that_shows_late_is_held_until_the_watchdog_has_spoken(
    monkeypatch: pytest.MonkeyPatch, error: Exception, waits: bool, lost: bool
) -> None:
    """The collective that failed has returned long before, so nothing else tells that a peer is gone."""
    heard: list[float] = []
    over = SimpleNamespace(wait=heard.append, is_set=lambda: False)
    monkeypatch.setattr(runtime, "current_watchdog", lambda: SimpleNamespace(over=over, limits=Limits(3.0, 9.0)))
    monkeypatch.setattr(activity, "failed", None)
    assert runtime._hear_why(error) == lost
    assert heard == ([8.0] if waits else [])


def test_bits_are_promised_on_the_cpu_alone() -> None:
    configs = [Config(execution=ExecutionConfig(reproducible=mode)) for mode in ("auto", "bitwise", "fast")]
    assert [is_bitwise(config, "cpu") for config in configs] == [True, True, False]
    assert every(not is_bitwise(config, "cuda") for config in configs)
    with pytest.raises(UserError, match=r"^execution\.reproducible: bitwise: on cuda .*; use auto or fast, or topology"):
        check_promise(configs[1], "cuda")
    check_start(configs[1], "cuda")  # a run that an earlier version took is opened


def test_places_are_told_apart_by_the_gpus_own_id(gpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"id of {device}"))
    place = Place.of(torch.device("cuda", 0), 3)
    assert (place.gpu, place.visible, place.local_rank) == ("id of cuda:0", 1, 3)
    assert devices.Place.of(torch.device("cpu"), 3).gpu == ""
