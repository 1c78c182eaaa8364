"""Stopped while loading: pre-training goes on to the same bits, other work begins again, nothing half made is taken for whole,
and ranks leave together or not at all."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federations import alone, make_config, read_events, run_alone, write_inputs
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import Job, changed
from torch import nn

from fedmoe_ds.config import Config
from fedmoe_ds.config.foundation_section import FoundationConfig, PretrainConfig
from fedmoe_ds.data import stdlib
from fedmoe_ds.data.sources import hub
from fedmoe_ds.distributed import long_work, signs_of_work, stop_points
from fedmoe_ds.distributed.long_work import LongWork
from fedmoe_ds.distributed.stop_points import StopError, file_sha256, heard_by, run_waiting, stop_point
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.errors import EXIT_STOPPED, UserError
from fedmoe_ds.federation import build, session
from fedmoe_ds.foundation import foundation
from fedmoe_ds.foundation.builtin.loop import train_new
from fedmoe_ds.foundation.builtin.loop_state import FILE, TrainingState
from fedmoe_ds.foundation.builtin.pretrain import pretrain_preset
from fedmoe_ds.foundation.mapped_weights import MappedWeights, Slot

STEPS = 6


@contextmanager
def stopped_at(number: int) -> Iterator[pytest.ExceptionInfo[StopError]]:
    """The stop point with this number, from 0, is where the body is asked to stop; it must get there."""
    left = [number]

    def listen() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StopError("SIGTERM")

    with heard_by(listen), pytest.raises(StopError) as stopped:
        yield stopped


def create() -> nn.Module:
    """Everything that a step may depend on: moments, drawn noise, running statistics, a parameter without a gradient."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model.register_parameter("unused", nn.Parameter(torch.randn(3)))
    return model


def batch_loss(model: Any, rows_B: torch.Tensor) -> torch.Tensor:
    data_N4 = torch.sin(torch.arange(44.0)).view(11, 4)
    loss: torch.Tensor = model(data_N4[rows_B]).square().mean()
    return loss


def train(state: TrainingState) -> tuple[dict[str, bytes], list[float]]:
    config = PretrainConfig(steps=STEPS, batch_size=4, lr=1e-2)
    model, losses = train_new(create, batch_loss, 11, (1, "rows"), config, 3, lambda line: None, state)
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}, losses


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[float]]:
    return train(TrainingState(tmp_path_factory.mktemp("none") / "state", "k", print))


@settings(max_examples=25, deadline=None)
@given(stops=st.lists(st.integers(0, STEPS - 1), max_size=5).map(sorted))
def test_stopped_after_any_steps(
    stops: list[int], undisturbed: tuple[dict[str, bytes], list[float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As often as one likes, twice after the same step too."""
    notes: list[str] = []
    state, done = TrainingState(tmp_path_factory.mktemp("state") / "state", "k", notes.append), 0
    for stop in stops:
        before = torch.get_rng_state()
        with stopped_at(stop - done):
            train(state)
        assert torch.equal(before, torch.get_rng_state())
        done = stop
        assert state.entry.exists() == (stop > 0)
    assert train(state) == undisturbed
    assert len(notes) == sum(stop > 0 for stop in stops) and all("goes on after step" in note for note in notes)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    state = TrainingState(tmp_path_factory.mktemp("kept") / "state", "k", print)
    with stopped_at(4):
        train(state)
    return (state.entry / FILE).read_bytes()


def put(state: TrainingState, content: bytes) -> None:
    state.entry.mkdir()
    (state.entry / FILE).write_bytes(content)


def damages() -> st.SearchStrategy[Callable[[bytes], bytes]]:
    share = st.floats(0, 1, exclude_max=True)
    return st.one_of(
        st.tuples(share, st.integers(1, 255)).map(
            lambda at: lambda content: flipped(content, int(at[0] * len(content)), at[1])
        ),
        share.map(lambda at: lambda content: content[: int(at * len(content))]),
        st.binary(max_size=60).map(lambda text: lambda content: text),
        st.just(lambda content: content.replace(b'"k"', b'"l"', 1)),
        st.just(lambda content: content.replace(b'"format": 1', b'"format": 2', 1)),
        st.just(lambda content: b"[" * 4000 + content),
        st.just(lambda content: content + b"\0"),
    )


def flipped(content: bytes, at: int, bits: int) -> bytes:
    return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]


@settings(max_examples=40, deadline=None)
@given(damage=damages())
def test_a_damaged_state_is_told_in_one_line_and_not_used(
    damage: Callable[[bytes], bytes],
    kept: bytes,
    undisturbed: tuple[dict[str, bytes], list[float]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    notes: list[str] = []
    state = TrainingState(tmp_path_factory.mktemp("damaged") / "state", "k", notes.append)
    put(state, damage(kept))
    assert train(state) == undisturbed
    (note,) = notes
    assert "is not used (" in note and "beginning again" in note and "\n" not in note


def test_a_state_of_another_model_is_not_used(kept: bytes, tmp_path: Path) -> None:
    notes: list[str] = []
    state = TrainingState(tmp_path / "state", "k", notes.append)
    put(state, kept)
    other = nn.Linear(4, 8)
    before = other.weight.clone()
    assert state.restore(other, torch.optim.AdamW(other.parameters()), STEPS) == []
    assert torch.equal(before, other.weight) and "does not fit the model" in notes[0]


def test_a_state_that_somebody_else_may_have_written_is_not_used(
    kept: bytes, undisturbed: tuple[dict[str, bytes], list[float]], tmp_path: Path
) -> None:
    """It decides what a model becomes."""
    for place in (".", FILE):
        notes: list[str] = []
        state = TrainingState(tmp_path / f"state-{place}", "k", notes.append)
        put(state, kept)
        (state.entry / place).chmod(0o777)
        assert train(state) == undisturbed
        assert "can be written by its group or by everybody" in notes[0] and "beginning again" in notes[0]


def test_a_state_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with stopped_at(2) as stopped:
        train(TrainingState(tmp_path / "file" / "state", "k", print))
    assert "; pre-training begins again, because" in str(stopped.value)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("preset", "steps"), [("nano-olmoe", (0, 1, 3)), ("nano-llama", (2,)), ("nano-vit", (2,))])
def test_a_preset_goes_on(preset: str, steps: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before its first step, after it, and before its last: what the starts make together is what one makes alone."""
    some = [stdlib.Document(each.group, each.name, each.text[:3000]) for each in stdlib.documents()[:12]]
    monkeypatch.setattr(stdlib, "documents", lambda: some)
    config, lines = PretrainConfig(steps=4, batch_size=2), list[str]()
    wanted = content(pretrain_preset(preset, config, 0, tmp_path / "whole", lines.append))
    texts = 0 if preset == "nano-vit" else len(stdlib.split(some)[0])
    done = 0
    for step in steps:
        with stopped_at(texts + step - done):
            pretrain_preset(preset, config, 0, tmp_path / "parts", lines.append)
        left = [path.suffix for path in (tmp_path / "parts" / "foundations").iterdir()]
        assert left == ([".unfinished"] if step else []), "nothing, or the state"
        done = step
    folder = pretrain_preset(preset, config, 0, tmp_path / "parts", lines.append)
    assert content(folder) == wanted
    assert list((tmp_path / "parts" / "foundations").iterdir()) == [folder]


class Asked(StopRequest):
    """Counts stop points, and is asked to stop at one of them."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at, self.seen = at, 0

    @property
    def requested(self) -> bool:
        if self.seen == self.at:
            self.name = "SIGTERM"
        self.seen += 1
        return self.name is not None


SMALL: dict[str, Any] = {"federation": {"rounds": 1}, "local": {"max_steps": 1}, "evaluation": {"max_sequences": 2}}


def test_a_run_is_stopped_anywhere_while_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading, hashing, encoding, dealing, writing: one line, exit code 75, no leftovers, and the same result afterwards."""
    monkeypatch.setattr(session, "build_topology", lambda config, runtime: alone()[1])
    write_inputs(tmp_path, samples=(6, 5, 4), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    caches = iter(range(1000))

    def start(name: str, stop: StopRequest) -> tuple[session.Ending, Path]:
        cache = tmp_path / f"cache-{next(caches)}"
        config = make_config(tmp_path, name, SMALL, {"foundation": {"cache": str(cache)}})
        return session.train(config, alone()[0], "auto", stop), cache

    # Rounds ask too: what comes before them is the number of points when the first of them asks.
    counted = Asked(None)
    monkeypatch.setattr("fedmoe_ds.federation.build._assemble", counting := CountsAt(counted, build._assemble))
    ending, _ = start("undisturbed", counted)
    digest = ending.lines[-2]
    assert ending.exit_code == 0 and counting.points > 30
    for at in [*range(0, counting.points, 1 + counting.points // 12), counting.points - 1]:
        ending, cache = start("stopped", Asked(at))
        assert ending.exit_code == EXIT_STOPPED
        (line,) = ending.lines
        assert line == "stopped by SIGTERM while loading; start the same command again to continue"
        assert not [path for path in cache.rglob("*") if path.name.startswith(".")], at
        assert read_events(tmp_path / "runs" / "stopped") == []
    monkeypatch.setattr("fedmoe_ds.federation.build._assemble", AsksAt(asked := StopRequest(), counting.real))
    ending, _ = start("stopped", asked)  # everything is loaded: worth a checkpoint
    assert ending.exit_code == EXIT_STOPPED and "stopped by SIGTERM with a checkpoint" in ending.lines[-3]
    assert [path.name for path in (tmp_path / "runs" / "stopped" / "checkpoints").iterdir()] == ["round-00000"]
    ending, _ = start("stopped", StopRequest())
    assert (ending.exit_code, ending.lines[-2]) == (0, digest)


class CountsAt:
    """Stands for the function that comes after loading; notes how many stop points there were before."""

    def __init__(self, stop: Asked, real: Callable[..., Any]) -> None:
        self.stop, self.real, self.points = stop, real, 0

    def __call__(self, *args: Any) -> Any:
        self.points = self.stop.seen
        return self.real(*args)


class AsksAt:
    """The same, and asks to stop."""

    def __init__(self, stop: StopRequest, real: Callable[..., Any]) -> None:
        self.stop, self.real = stop, real

    def __call__(self, *args: Any) -> Any:
        self.stop.name = "SIGTERM"
        return self.real(*args)


def test_conversion_is_stopped_and_begins_again(tmp_path: Path) -> None:
    def weights() -> MappedWeights:
        return MappedWeights(tmp_path, "f" * 64, "dense", [Slot(name, (64,), torch.float32) for name in "abc"])

    def fill(memory: dict[str, torch.Tensor]) -> None:
        for name in "abc":
            stop_point()
            memory[name].fill_(ord(name))

    for number in range(4):  # the last one is in the hashing of what was written
        with stopped_at(number):
            weights().ensure(fill)
        assert list(tmp_path.iterdir()) == [] and not weights().intact()
    with heard_by(lambda: None):
        weights().ensure(fill)
    assert weights().intact() and weights().map()["c"].tolist() == [99.0] * 64
    with stopped_at(0):
        weights().intact()


def test_a_download_is_left_alone(tmp_path: Path) -> None:
    began, release, ended = threading.Event(), threading.Event(), threading.Event()

    def download() -> str:
        began.set()
        release.wait(60)
        ended.set()
        return "there"

    with stopped_at(1):
        run_waiting(download)
    assert began.is_set() and not ended.is_set()
    release.set()
    with heard_by(lambda: None):
        assert run_waiting(download) == "there"
        with pytest.raises(ZeroDivisionError):
            run_waiting(lambda: 1 // 0)
    (tmp_path / "file").write_bytes(b"x" * (3 << 20))
    with stopped_at(2):
        file_sha256(tmp_path / "file")


class Looks:
    """A clock that goes on by ten seconds at every look, and what the system counts then; `last` is the last look with a
    sign."""

    def __init__(self, kind: str, last: int) -> None:
        self.kind, self.last, self.number = kind, last, -1

    def clock(self) -> float:
        self.number += 1
        return 10.0 * self.number

    def counts(self) -> signs_of_work.Counts | None:
        signs = min(self.number, self.last)
        # What is too little to be a sign goes on: threads that wait are woken, and looking reads.
        seconds, size = 0.09 * self.number, 200_000 * self.number
        if self.kind == "computes":
            seconds += 0.02 * signs
        elif self.kind == "reads and writes":
            size += 100_000 * signs
        files = frozenset({("model", signs if self.kind == "others write" else 0, 0)})
        return None if self.kind == "unknown" else (seconds, size, files)


@pytest.mark.parametrize("kind", ["computes", "reads and writes", "others write", "nothing", "unknown"])
@pytest.mark.parametrize("last", [0, 1, 30])
def test_work_without_stop_points_reports_as_long_as_it_works(kind: str, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that hangs stops reporting, so that the others wait for it and the watchdog says so; a stop is heard still.

    A system that counts nothing is believed."""
    monkeypatch.setattr(stop_points, "_LOOK_S", 0.0)
    looks, release, reports = Looks(kind, last), threading.Event(), list[int]()
    signs = signs_of_work.SignsOfWork(looks.counts, looks.clock)

    def listen() -> None:
        reports.append(looks.number)
        if looks.number >= 60:
            raise StopError("SIGTERM")

    with heard_by(listen, lambda: looks.number >= 60), pytest.raises(StopError):
        run_waiting(lambda: release.wait(60), signs=signs)
    release.set()
    still = {"nothing": 0, "unknown": 60}.get(kind, last) + int(signs_of_work.STANDSTILL_S) // 10
    assert reports == [*range(1, min(still, 59) + 1), 60], "none while it stands still, until a stop is asked for"


def test_what_another_process_downloads_is_a_sign(tmp_path: Path) -> None:
    """Who waits for its lock only asks for it again and again, by which the lock's own file changes, too."""
    (tmp_path / "blobs").mkdir()
    lock, part = tmp_path / "blobs" / "model.lock", tmp_path / "blobs" / "model.incomplete"
    part.write_bytes(b"some")
    lock.touch()

    def files() -> frozenset[signs_of_work.File]:
        counts = signs_of_work.process_counts([tmp_path, tmp_path / "none"])
        assert counts is not None
        return counts[2]

    before = files()
    os.utime(lock, (1, 1))
    assert files() == before and len(before) == 1
    part.write_bytes(b"some more")
    assert files() != before


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_is_watched_is_where_the_hub_writes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Path]()

    def stand_in(action: Callable[[], Any], watched: Iterable[Path]) -> Any:
        seen.extend(watched)
        raise OSError("no network")

    for module in (foundation, hub):
        monkeypatch.setattr(module, "run_waiting", stand_in)
    with pytest.raises(UserError, match="no network"):
        if kind == "model":
            foundation.resolve_foundation(FoundationConfig(path="some/Model"), 0, print)
        else:
            hub.HubSource("some/MyData", "train").digest()
    names = ["models--some--Model"] if kind == "model" else ["datasets--some--MyData", "some___my_data"]
    assert [path.name for path in seen] == names
    assert seen[0].parent == Path(constants.HF_HUB_CACHE)


def spend(seconds: float) -> None:
    """Processor time of this thread."""
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        sum(range(1000))


def write() -> None:
    with TemporaryFile() as file:
        file.write(bytes(1 << 20))


KINDS: dict[str, tuple[Callable[[], None], str]] = {
    "computes": (lambda: spend(0.1), "long work"),
    "writes": (write, "long work"),
    "watches": (lambda: spend(0.1), signs_of_work.WATCHING),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_system_counts_of_work(kind: str) -> None:
    """What the thread that waits and the watchdog's do is none."""
    action, name = KINDS[kind]
    begin, done, end = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begin.wait(60)
        action()
        done.set()
        end.wait(60)  # of a thread that has ended nothing is known

    thread = threading.Thread(target=work, name=name)
    thread.start()
    before = signs_of_work.process_counts()
    begin.set()
    spend(0.1)
    assert done.wait(60)
    after = signs_of_work.process_counts()
    end.set()
    thread.join()
    assert before is not None and after is not None
    assert (after[0] - before[0] >= 0.06) == (kind == "computes"), (before, after)
    assert (after[1] - before[1] >= 1 << 20) == (kind == "writes"), (before, after)


class Table:
    """Ranks as threads: what `Runtime` is to `LongWork`. `asked` is (rank, number of its exchange) or None."""

    def __init__(self, size: int, asked: tuple[int, int] | None) -> None:
        self.size, self.asked = size, asked
        self.stops = [StopRequest() for _ in range(size)]
        if asked is not None and asked[0] < size and asked[1] == 0:
            self.stops[asked[0]].name = "SIGUSR1"
        self._values: list[Any] = [None] * size
        self._counts = [0] * size
        self._barrier = threading.Barrier(size, timeout=20)

    def rank(self, rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait()
            told = list(self._values)
            self._barrier.wait()
            self._counts[rank] += 1
            if self.asked == (rank, self._counts[rank]):
                self.stops[rank].name = "SIGUSR1"
            return told

        return SimpleNamespace(rank=rank, is_main=rank == 0, gather=gather)

    def run(self, action: Callable[[LongWork, int], Any]) -> list[Any]:
        """What became of each rank."""
        outcomes: list[Any] = [None] * self.size

        def work(rank: int) -> None:
            try:
                outcomes[rank] = action(LongWork(self.rank(rank), self.stops[rank]), rank)
            except (StopError, UserError) as error:
                outcomes[rank] = f"{type(error).__name__}: {error}"

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return outcomes


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(0, 4), min_size=2, max_size=4),
    failing=st.integers(-1, 3),
    asked=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 5)),
    alone=st.booleans(),
)
def test_ranks_leave_together_or_not_at_all(steps: list[int], failing: int, asked: tuple[int, int] | None, alone: bool) -> None:
    """Whoever works, for however long, whoever fails, and whoever is asked at whatever moment."""

    def action(work: LongWork, rank: int) -> Any:
        def steady() -> str:
            for _ in range(steps[rank]):
                stop_point()
            if rank == failing:
                raise UserError(f"rank {rank} failed")
            return f"done by {rank}"

        results = [work.run_on_rank0(steady) if alone else work.run_on_all_ranks(steady)]
        return [*results, work.gather("after")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_work, "_EVERY_S", -1.0)  # every stop point is an exchange
        outcomes = Table(len(steps), asked).run(action)
    kinds = {outcome if isinstance(outcome, str) else "went on" for outcome in outcomes}
    assert len(kinds) == 1 and None not in outcomes, outcomes
    (kind,) = kinds
    workers = steps[:1] if alone else steps
    exchanges = 1 + max(workers)
    heard_in_time = asked is not None and asked[0] < len(steps) and asked[1] + 1 < exchanges  # the last exchange ends the work
    fails = failing in range(1 if alone else len(steps))
    if heard_in_time:
        assert kind == "StopError: stopped by SIGUSR1 while loading"
    else:
        assert kind == (f"UserError: rank {failing} failed" if fails else "went on")


DIGITS: dict[str, Any] = {
    "name": "digits",
    "method": {"name": "fft-moe"},
    "foundation": {"preset": "nano-vit", "pretrain": {"steps": 600}},
    "federation": {"rounds": 1, "participation": 0.5, "tiers": [{"top_k": 2, "share": 1.0}]},
    "local": {"max_steps": 1},
    "adapters": {"attention": [], "moe": {"experts": 4, "width": 4, "top_k": 2}},
    "data": {"source": "digits", "partition": {"kind": "iid", "clients": 4}},
    "evaluation": {"max_sequences": 8},
}


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_two_ranks_are_stopped_in_pre_training(tmp_path: Path) -> None:
    """The rank that only waits is asked. Both end with 75, and the next start goes on to the bits of an undisturbed run."""
    config = changed(DIGITS, output=str(tmp_path), foundation={"cache": str(tmp_path / "cache")})
    foundations = tmp_path / "cache" / "foundations"
    with Job(config, tmp_path, 0, ("--ranks", "2")) as job:
        assert job.wait_until(lambda: "foundation: step 60/600" in job.said()), job.said()
        (waiting,) = [process for process in job.processes() if process.environ().get("RANK") == "1"]
        waiting.send_signal(signal.SIGTERM)
        result = job.finish()
    assert result.code == EXIT_STOPPED, result.stderr
    assert "stopped by SIGTERM while loading; pre-training goes on after its step" in result.stdout
    assert not result.errors and "Traceback" not in result.stderr
    assert [path.suffix for path in foundations.iterdir()] == [".unfinished"]
    with Job(config, tmp_path, 0, ("--ranks", "2")) as job:
        result = job.finish()
    assert "foundation: pre-training goes on after step" in result.stderr and "step 60/600" not in result.stderr
    undisturbed = run_alone(
        Config.model_validate(changed(config, name="undisturbed", foundation={"cache": str(tmp_path / "other")}))
    )
    (folder,), (wanted,) = foundations.iterdir(), (tmp_path / "other" / "foundations").iterdir()
    assert content(folder) == content(wanted) and result.digest == undisturbed.digest
