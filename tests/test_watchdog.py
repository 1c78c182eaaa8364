"""The watchdog among strangers, liars and slow readers: real sockets and threads, and no process ends."""

from __future__ import annotations

import io
import json
import os
import resource
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st
from strangers import WORDS, ZEROS, Crowd, connect, is_closed
from worlds import LIMITS, LONG_S, Endings, endings, until, world

from fedmoe_ds.distributed import address, mpi
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.address import resolved
from fedmoe_ds.distributed.watchdog import handshake, start
from fedmoe_ds.distributed.watchdog import listener as listener_module
from fedmoe_ds.distributed.watchdog import watchdog as watches
from fedmoe_ds.distributed.watchdog.json_socket import LONGEST, GarbledError, JsonSocket
from fedmoe_ds.distributed.watchdog.listener import Listener, listen
from fedmoe_ds.distributed.watchdog.main import MainWatchdog
from fedmoe_ds.distributed.watchdog.rank_health import Limits, Peer, Process
from fedmoe_ds.distributed.watchdog.watchdog import Watchdog
from fedmoe_ds.distributed.watchdog.worker import WorkerWatchdog

__all__ = ["endings"]
TOKEN = "ab" * 32
END = Watchdog.end
STATE: dict[str, Any] = {"round": 1, "phase": "train", "waiting": None, "for_s": 0.5, "groups": ["shard 0"]}


# --- strangers ---------------------------------------------------------------------------------------------------------------


def test_strangers_change_nothing_but_a_counted_warning(
    endings: Endings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every wrong first word and every bad manner at once, while a rank is missing and the time of day jumps."""
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + 1e6 * (int(real() * 50) % 3 - 1))
    with world(3, monkeypatch) as ranks:
        strangers = {}
        for name, word in WORDS.items():
            strangers[name] = connect("127.0.0.1", ranks.port)
            strangers[name].sendall(word)
        assert [name for name, stranger in strangers.items() if not is_closed(stranger)] == []
        with Crowd("127.0.0.1", ranks.port, 200) as crowd:
            until(lambda: crowd.counts["turned away"] > 300)
            ranks.complete()
            ranks.hear_each_other()
            with pytest.raises(ConnectionRefusedError):
                connect("127.0.0.1", ranks.port)
        assert crowd.counts["came"] > 400
        assert endings.all == [] and every(watch.thread.is_alive() for watch in ranks.watches.values())
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith("warning: watchdog: ") and "connections that were no rank's were turned away (" in warnings[0]
    assert int(warnings[0].split()[2]) >= 300


@contextmanager
def a_listener(*ranks: int) -> Iterator[tuple[Listener, int]]:
    (bound,) = listen(["127.0.0.1"])
    listener = Listener([bound], TOKEN, ranks)
    try:
        yield listener, bound.getsockname()[1]
    finally:
        if listener.is_open:
            listener.close()


def challenge_of(stranger: socket.socket) -> str:
    return str(json.loads(stranger.recv(4096))["challenge"])


def test_a_recorded_hello_is_worth_nothing() -> None:
    with a_listener(1, 2) as (listener, port):
        first = connect("127.0.0.1", port)
        listener.step()
        asked = challenge_of(first)
        hello = {"hello": 1, "challenge": ZEROS, "proof": handshake.proof(TOKEN, "rank", (asked, ZEROS), 1)}
        record = json.dumps(hello).encode() + b"\n"
        again = connect("127.0.0.1", port)
        again.sendall(record)
        listener.step(), listener.step()
        assert listener.turned_away == {"with a wrong proof": 1}
        first.sendall(record)
        ((rank, _),) = listener.step()
        assert rank == 1 and listener.expected == {2}


def test_a_rank_comes_once() -> None:
    with a_listener(1, 2) as (listener, port):
        lines = [in_thread(lambda rank=rank: handshake.join([("127.0.0.1", port)], rank, TOKEN, 1.0)) for rank in (1, 1, 7)]
        came = []
        until(lambda: came.extend(listener.step()) or listener.turned_away["as a rank that is not missing"] >= 2)
        assert [rank for rank, _ in came] == [1] and listener.expected == {2}
        assert len(lines) == 3


def test_places_are_limited_and_the_oldest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(listener_module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])}))
    monkeypatch.setattr(listener_module, "SPARE", 4)
    with a_listener(1) as (listener, port):
        idle = [connect("127.0.0.1", port) for _ in range(12)]
        for _ in range(5):
            listener.step()
        # The first places are taken, and then the listener rests.
        assert len(listener._guests) == 5 and not listener.turned_away and 0 < listener.wait_s <= 0.1
        clock[0] += 0.11
        for _ in range(5):
            listener.step()
        assert len(listener._guests) == 5 and listener.turned_away == {"pushed out": 5}
        assert [is_closed(one, 0.1) for one in idle[:6]] == [True] * 5 + [False]
        clock[0] += listener_module.HELLO_S + 0.1
        listener.step()
        assert listener.turned_away["silent for 5 s"] == 5
        joined = in_thread(lambda: handshake.join([("127.0.0.1", port)], 1, TOKEN, LONG_S))
        came = []
        until(lambda: clock.__setitem__(0, clock[0] + 0.2) or came.extend(listener.step()) or came)
        assert [rank for rank, _ in came] == [1] and not listener.is_open
        clock[0] += 60.0
        assert listener.wait_s > 1.0  # rank 0 has no reason to hurry any more
        joined()


def test_a_door_that_closes_while_it_rests_is_waited_for_no_longer() -> None:
    with a_listener(1) as (listener, _):
        listener._rest(time.monotonic() + 0.01)
        time.sleep(0.02)
        assert listener.wait_s == 0.0
        listener.close()
        assert listener.wait_s > 1.0


def test_a_hello_in_many_small_pieces_is_no_rank() -> None:
    with a_listener(1) as (listener, port):
        stranger = connect("127.0.0.1", port)
        listener.step()
        for _ in range(20):
            if not is_closed(stranger, 0.001):
                stranger.send(b" ")
            listener.step()
        assert listener.turned_away == {"with something else than a hello": 1}


def test_without_descriptors_the_door_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_REST_S", 0.0)
    with a_listener(1) as (listener, port):
        waiting = [connect("127.0.0.1", port) for _ in range(3)]  # the kernel has let them in
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            assert listener.step() == [] and listener.refusals == 1 and listener.is_open
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        listener.step()
        assert len(listener._guests) == 3 and every(challenge_of(one) for one in waiting)
        listener.close()
        assert "the system refused 1 times to let one in (ulimit -n)" in (listener.warning() or "")


def test_warnings_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(listener_module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])}))
    with a_listener(1) as (listener, _):
        lines = []
        for _second in range(150):
            listener.turned_away["without a word"] += 100
            clock[0] += 1.0
            lines.append(listener.warning())
        listener.close()
        lines.append(listener.warning())
        assert len([line for line in lines if line is not None]) == 3 and listener.warning() is None
        assert lines[-1] is not None and "15000 connections" in lines[-1] and "(15000 without a word)" in lines[-1]


# --- impostors ---------------------------------------------------------------------------------------------------------------

IMPOSTORS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a wrong proof": lambda hello: {"welcome": ZEROS},
    "the rank's own proof": lambda hello: {"welcome": hello["proof"]},
    "the rank's challenge": lambda hello: {"welcome": hello["challenge"]},
    "half a character": lambda hello: {"welcome": "\ud800" * 64},
    "an order to kill": lambda hello: {"over": 0, "kill": [0, 1]},
    "a sign of life": lambda hello: {"alive": STATE},
    "a list": lambda hello: [hello],
    "nothing": lambda hello: None,
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_a_rank_obeys_nobody_who_does_not_know_the_token(name: str) -> None:
    """Somebody has taken the port of rank 0 over."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        joining = in_thread(lambda: handshake.join([server.getsockname()], 1, TOKEN, LONG_S))
        connection, _ = server.accept()
        connection.sendall(json.dumps({"challenge": ZEROS}).encode() + b"\n")
        hello = json.loads(connection.recv(4096))
        assert TOKEN not in json.dumps(hello)
        connection.sendall(json.dumps(IMPOSTORS[name](hello)).encode() + b"\n")
        with pytest.raises(OSError, match=r"127\.0\.0\.1 port \d+ is not rank 0 of this job: "):
            joining()


@pytest.mark.parametrize("first", [{"challenge": "\ud800"}, {"challenge": 1}, {"over": 1, "kill": [1]}, [], "x"])
def test_a_rank_tells_nothing_to_who_does_not_challenge_it(first: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        joining = in_thread(lambda: handshake.join([server.getsockname()], 1, TOKEN, LONG_S))
        connection, _ = server.accept()
        connection.sendall(json.dumps(first).encode() + b"\n")
        with pytest.raises(OSError, match="is not rank 0 of this job: "):
            joining()
        assert connection.recv(10) == b""


def test_a_rank_gives_up_on_who_is_silent_or_hangs_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=r"does not answer, for 0\.1 s"):
            handshake.join([("127.0.0.1", port)], 1, TOKEN, 0.1)
        joining = in_thread(lambda: handshake.join([("127.0.0.1", port)], 1, TOKEN, 0.25))
        threading.Thread(target=lambda: [server.accept()[0].close() for _ in range(3)], daemon=True).start()
        with pytest.raises(OSError, match=r"hangs up|does not answer"):
            joining()


def test_a_rank_that_was_pushed_out_comes_again() -> None:
    with a_listener(1) as (listener, port):
        joining = in_thread(lambda: handshake.join([("127.0.0.1", port)], 1, TOKEN, LONG_S))
        until(lambda: listener.step() or listener._guests)
        listener._turn_away(next(iter(listener._guests.values())), "pushed out")
        until(lambda: listener.step())
        line, _ = joining()
        assert line.socket.fileno() > 0


# --- ranks that say what nobody understands ----------------------------------------------------------------------------------

GARBLED: dict[str, bytes] = {
    "no JSON": b"hello\n",
    "no object": b"[]\n",
    "pairs": b'[["alive", 1]]\n',
    "nothing known": b'{"x": 1}\n',
    "no state": b'{"alive": 1}\n',
    "an empty state": b'{"alive": {}}\n',
    "deep lists": b"[" * 60_000 + b"\n",
    "a line without end": b"x" * (3 * LONGEST),
    "a code as text": b'{"bye": "0", "text": ""}\n',
    "a boolean code": b'{"bye": true, "text": ""}\n',
    "a huge code": b'{"bye": 99999999999, "text": ""}\n',
    "a text that is none": b'{"bye": 1, "text": 7}\n',
    "no UTF-8": b'{"bye": 1, "text": "\xff"}\n',
    **{
        f"{key} {value}": json.dumps({"alive": STATE | {key: value}}).encode() + b"\n"
        for key, values in {
            "round": ("1", None, True, [1]),
            "phase": (1, None),
            "waiting": (1, ["x"]),
            "for_s": ("1", None, float("nan"), float("inf"), True),
            "groups": ("shard 0", None, [1], {"a": 1}),
            "extra": (1,),
        }.items()
        for value in values
    },
}
ORDERS: dict[str, bytes] = {
    "a code of nothing": b'{"over": null}\n',
    "a code as text": b'{"over": "1"}\n',
    "processes": b'{"over": 1, "kill": [[1, "x"]]}\n',
    "a process": b'{"over": 1, "kill": 1}\n',
    "boolean ranks": b'{"over": 1, "kill": [true]}\n',
}


def own(rank: int) -> Peer:
    return Peer(rank, f"node{rank}", Process(2**22 + rank, "elsewhere", 0))  # no Linux has such a number


@contextmanager
def a_monitor(size: int = 3) -> Iterator[tuple[MainWatchdog, list[JsonSocket]]]:
    """Rank 0 with its thread, and the lines of the others, which the test holds in its hands."""
    (listener,) = listen(["127.0.0.1"])
    monitor = MainWatchdog(own(0), LIMITS, [own(rank) for rank in range(1, size)], Listener([listener], TOKEN, range(1, size)))
    port = listener.getsockname()[1]
    monitor.thread.start()
    try:
        yield monitor, [handshake.join([("127.0.0.1", port)], rank, TOKEN, LONG_S)[0] for rank in range(1, size)]
    finally:
        monitor.stop()
        monitor.thread.join(LONG_S)


def heard_by(line: JsonSocket, key: str, limit_s: float = LONG_S) -> dict[str, Any]:
    """The first message with this key."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        select.select([line], [], [], 0.5)
        for message in line.receive() or []:
            if key in message:
                return message
    raise AssertionError(f"nothing with {key}")


def push(line: JsonSocket, data: bytes) -> None:
    line.socket.settimeout(2.0)
    try:
        line.socket.sendall(data)
    except OSError:  # who is not listened to any more cannot say it all
        pass
    finally:
        line.socket.setblocking(False)


@pytest.mark.parametrize("name", GARBLED)
def test_a_rank_that_is_not_understood_is_named(name: str, endings: Endings, capsys: pytest.CaptureFixture[str]) -> None:
    with a_monitor() as (_, lines):
        push(lines[1], GARBLED[name])
        (ending,) = endings.wait()
        assert (ending.rank, ending.code) == (0, 76) and ending.text.startswith("rank 2 on node2 sent the watchdog ")
        assert "\n" not in ending.text and len(ending.text) < 400
        assert heard_by(lines[0], "over") == {"over": 76, "kill": []}
    assert "Traceback" not in capsys.readouterr().err


@contextmanager
def a_beacon() -> Iterator[tuple[WorkerWatchdog, JsonSocket]]:
    """Rank 1 with its thread, and rank 0's end of the line."""
    ours, theirs = socket.socketpair()
    beacon = WorkerWatchdog(own(1), LIMITS, [own(0), own(1), own(2)], JsonSocket(ours), [], True)
    beacon.thread.start()
    try:
        yield beacon, JsonSocket(theirs)
    finally:
        beacon.stop()
        beacon.thread.join(LONG_S)


@pytest.mark.parametrize("name", [*GARBLED, *ORDERS])
def test_rank_0_is_named_when_it_is_not_understood(name: str, endings: Endings) -> None:
    with a_beacon() as (_, line):
        push(line, (GARBLED | ORDERS)[name])
        (ending,) = endings.wait()
        assert (ending.rank, ending.code) == (1, 76) and ending.text.startswith("rank 0 on node0 sent the watchdog ")
        assert ending.kill == []


def test_only_processes_of_the_job_are_killed(endings: Endings) -> None:
    with a_beacon() as (beacon, line):
        line.send({"over": 76, "kill": [2, -1, 3, 10**9, -3]})
        (ending,) = endings.wait()
        assert ending.code == 76 and ending.kill == [beacon.peers[2].process]


def test_the_end_is_heard_at_once_and_signs_of_life_keep_their_beat(endings: Endings) -> None:
    """In a world whose beat is ten seconds. Ranks of one job end together, or MPI ends those that come late."""
    ours, theirs = socket.socketpair()
    watch = WorkerWatchdog(own(1), Limits(10 * LONG_S, 1800.0, 4000), [own(0), own(1)], JsonSocket(ours), [], True)
    assert watch.limits.beat == 10.0
    main = JsonSocket(theirs)
    watch.thread.start()
    for _ in range(3):
        before = watch.main.heard
        main.send({"alive": STATE})
        until(lambda before=before: watch.main.heard > before)
    main.send({"over": 76, "kill": []})
    (ending,) = endings.wait()
    assert ending.code == 76 and len(main.receive() or ()) == 1


def test_another_process_with_the_same_number_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    me = Process.own()
    Process(me.pid, me.space, me.started - 1).kill_here()
    Process(me.pid, "another boot", me.started).kill_here()
    Process(2**22 + 1, me.space, me.started).kill_here()
    Process(-1, me.space, me.started).kill_here()
    assert killed == []
    me.kill_here()
    assert killed == [me.pid]


# --- slow readers and other lines --------------------------------------------------------------------------------------------


def test_a_rank_that_does_not_read_holds_nobody_up(endings: Endings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 sends signs of life and reads nothing; rank 2 is told to all the time."""
    monkeypatch.setattr(activity, "groups", ["x" * 10_000])
    with a_monitor() as (monitor, (deaf, other)):
        until(lambda: len(monitor.lines) == 2)
        # A send that waits for the deaf one would never come back.
        for _ in range(2000):
            monitor._tell({"alive": activity.state()})
            deaf.send({"alive": STATE})
            other.receive()
        assert 0 < len(monitor.lines[1]._unsent) <= LONGEST
        assert heard_by(other, "alive") and endings.all == []


def test_what_a_slow_reader_gets_is_whole() -> None:
    ours, theirs = socket.socketpair()
    sender, reader, sent = JsonSocket(ours), JsonSocket(theirs), 0
    while not sender._unsent:
        sender.send({"alive": "x" * 3000, "number": sent})
        sent += 1
    for _ in range(50):
        sender.send({"alive": "y" * 3000, "number": sent})
        sent += 1
    numbers: list[int] = []
    while arrived := reader.receive():
        numbers += [message["number"] for message in arrived]
        sender.flush(0.01)
    assert numbers == list(range(len(numbers))) and 0 < len(numbers) < sent  # the last ones were dropped, each as a whole


@settings(max_examples=80, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20) | st.none()), max_size=5), st.data())
def test_messages_arrive_in_whatever_pieces(sent: list[dict[str, Any]], data: st.DataObject) -> None:
    ours, theirs = socket.socketpair()
    content = b"".join(json.dumps(message).encode() + b"\n" for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    line, heard = JsonSocket(theirs), []
    for first, last in zip([0, *cuts], [*cuts, len(content)], strict=True):
        ours.sendall(content[first:last])
        heard += line.receive() or []
    ours.close()
    assert heard == sent and line.receive() is None
    line.close()


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=50).map(lambda text: json.dumps(text).encode()))
def test_any_bytes_are_messages_or_garbled(content: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(content + b"\n")
        try:
            assert all(isinstance(message, dict) for message in JsonSocket(theirs).receive() or [])
        except GarbledError:
            return


# --- defects of the watchdog itself ------------------------------------------------------------------------------------------


def test_a_defect_of_rank_0s_watchdog_has_its_own_name(
    endings: Endings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with a_monitor() as (monitor, lines):
        until(lambda: len(monitor.lines) == 2)
        monkeypatch.setattr(monitor, "_judge", lambda: [][1])
        (ending,) = endings.wait()
        assert (ending.rank, ending.code) == (0, 1)
        assert ending.text.startswith(
            "the watchdog of rank 0 on node0 failed: IndexError: list index out of range; its traceback"
        )
        assert [heard_by(line, "over")["over"] for line in lines] == [1, 1]  # nobody calls rank 0 dead
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_of_another_watchdog_is_told_to_rank_0(endings: Endings, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_beacon() as (beacon, line):
        monkeypatch.setattr(beacon.main, "hear", lambda state: {}["x"])
        line.send({"alive": STATE})
        (ending,) = endings.wait()
        assert ending.code == 1 and ending.text.startswith("the watchdog of rank 1 on node1 failed: KeyError: 'x'")
        assert heard_by(line, "bye") == {"bye": 1, "text": ending.text}


class Pending:
    """An MPI call that is pending until infinity stands among the looks at it."""

    def __init__(self, looks: list[float]) -> None:
        self.looks = looks

    def Test(self) -> bool:
        self.looks.append(time.monotonic())
        return float("inf") in self.looks


class Alone(Watchdog):
    """A watchdog without others."""

    def __init__(self) -> None:
        super().__init__(own(1), LIMITS)


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """With which codes the process would have ended."""
    found: list[int] = []
    monkeypatch.setattr(Watchdog, "end", END)
    monkeypatch.setattr(watches, "SPREAD_S", 0.0)
    monkeypatch.setattr(os, "_exit", found.append)
    monkeypatch.setattr(mpi, "_left_alone", threading.Event())
    return found


def test_the_end_comes_even_if_nobody_reads_standard_error(codes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    Alone().end("it is over", 76, True)
    assert codes == [76]


def test_nobody_looks_at_mpi_once_the_job_is_over(codes: list[int]) -> None:
    """Before the first rank ends: Open MPI aborts who finds its connection closed, with a code of its own."""
    looks: list[float] = []
    waiting = threading.Thread(target=mpi.wait, args=(Pending(looks),), daemon=True)
    waiting.start()
    until(lambda: len(looks) > 2)
    Alone().end("it is over", 76, True)
    seen = len(looks)
    time.sleep(0.2)  # a hundred looks
    # One may have been under way.
    assert codes == [76] and len(looks) <= seen + 1 and waiting.is_alive()
    seen = len(looks)
    mpi._left_alone.clear()  # so that the thread goes on, and ends
    until(lambda: len(looks) > seen)
    looks.append(float("inf"))
    waiting.join(LONG_S)
    assert not waiting.is_alive()


def test_who_leaves_is_not_ended(codes: list[int]) -> None:
    watch = Alone()
    watch.stop()
    with pytest.raises(SystemExit):
        watch.end("it is over", 76, True)
    assert codes == []


def test_a_verdict_is_one_line_without_commands_to_a_terminal(codes: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    Alone().end("rank 1 failed:\x1b[2J\n\nof \x07 müde\ud800", 1, True)
    assert codes == [1] and capsys.readouterr().err == "error: rank 1 failed:\\x1b[2J of \\x07 müde\\ud800\n"


def test_a_long_reason_still_arrives(endings: Endings) -> None:
    with a_beacon() as (beacon, line):
        beacon.announce_exit(2, "é\N{EARTH GLOBE AMERICAS}" * 100_000)
        assert len(heard_by(line, "bye")["text"]) == 4000


# --- addresses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("master", "bound"),
    [
        ("127.0.0.1", {"127.0.0.1"}),
        ("::1", {"::1"}),
        ("localhost", set(resolved("localhost"))),
        ("127.0.0.7", {"127.0.0.7"}),
        ("0.0.0.0", {"::"}),  # noqa: S104 - what a user may have configured
    ],
)
def test_rank_0_listens_where_master_addr_leads(
    master: str, bound: set[str], endings: Endings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world(2, monkeypatch, master) as ranks:
        assert {one.getsockname()[0] for one in ranks.watches[0].listener.listeners} == bound
        if master == "0.0.0.0":  # noqa: S104 - the same
            (note,) = ranks.watches[0].notes
            assert note.startswith("warning: watchdog: MASTER_ADDR: 0.0.0.0: not all ranks know an address of ")
            assert note.endswith(f"rank 0 listens on all interfaces, port {ranks.port}")
            for address in ("127.0.0.1", "::1"):
                connect(address, ranks.port).close()
        else:
            assert ranks.watches[0].notes == ()
            with pytest.raises(ConnectionRefusedError):
                connect("127.0.0.2", ranks.port)
        ranks.complete()
        ranks.hear_each_other()


def test_ranks_that_know_different_addresses_all_come_in(endings: Endings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 knows the first address, rank 2 the second one and one that leads nowhere."""
    views = iter([["127.0.1.1"], ["127.0.0.8"], ["127.0.0.9", "203.0.113.9"]])
    order = threading.Lock()

    def view(name: str) -> list[str]:
        with order:
            return next(views)

    monkeypatch.setattr(start, "resolved", view)
    monkeypatch.setattr(address, "is_loopback", lambda text: text == "127.0.1.1")
    with world(3, monkeypatch, "node0") as ranks:
        assert {one.getsockname()[0] for one in ranks.watches[0].listener.listeners} == {"127.0.0.8", "127.0.0.9"}
        ranks.complete()
        ranks.hear_each_other()
        assert ranks.watches[0].notes == ()


def test_only_own_addresses_are_listened_on() -> None:
    assert listen(["203.0.113.9", "2001:db8::9"]) == []


def test_a_world_of_one_has_no_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_watch", None)
    alone: Any = type("Alone", (), {"size": 1, "rank": 0})()
    assert start.start_watchdog(alone, LIMITS, 0, torch.device("cpu")) is None and start.current_watchdog() is None


def in_thread(action: Callable[[], Any]) -> Callable[[], Any]:
    """Run it now, beside; the result, or the exception, when asked."""
    found: list[Any] = []

    def body() -> None:
        try:
            found.append((action(), None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(LONG_S)
        value, error = found[0]
        if error is not None:
            raise error
        return value

    return result
