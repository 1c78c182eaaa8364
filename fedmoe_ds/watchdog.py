"""Watchdog: no job hangs because one of its ranks is gone.

Every rank keeps a connection to rank 0 and tells it once in a while what it is doing (`activity`); rank 0 tells the others that
it lives. A connection that ends without a farewell is a rank that died; one that is silent for `silence_s` a rank that was
stopped, hangs in a kernel, or lost its network; a rank that waits in one collective for longer than `timeout_s` waits for
somebody who will not come. In each case rank 0 says so in one line, tells everybody, and the whole job ends with EXIT_LOST. If
rank 0 itself is gone, every host's first rank says that.

The threads below only read sockets and `activity`, so they keep working while the main thread waits in a collective.
"""

from __future__ import annotations

import ipaddress
import json
import os
import resource
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from fedmoe_ds import terminal
from fedmoe_ds.activity import activity
from fedmoe_ds.control import Control
from fedmoe_ds.errors import EXIT_LOST
from fedmoe_ds.line import Line
from fedmoe_ds.peers import Limits, Peer, Process, died, quiet_words, silent, stuck

_SAY_FIRST_S = 3.0
"""How long rank 0 may take to tell a mistake itself that another rank has met, too."""
_SPREAD_S = 0.3
"""Between telling the others that the job is over and leaving: time for the bytes to get out."""
_watch: Watch | None = None


class Watch:
    """The watchdog of one rank: a thread. A process says `farewell` before it ends."""

    def __init__(self, me: Peer, limits: Limits) -> None:
        self.me, self.limits = me, limits
        self.over = threading.Event()  # the job has been declared over
        self._left = threading.Event()
        self._leaving: dict[str, Any] | None = None  # what this process has said last
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def _watch(self) -> None:
        while not self._left.is_set():
            self.turn()

    def turn(self) -> None:
        """One beat: hear, judge, tell."""
        raise NotImplementedError

    def farewell(self, code: int, text: str) -> None:
        """Tell the others that this process ends with `code`."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop watching; what the others do no longer matters."""
        self._left.set()

    def end(self, text: str, code: int, say: bool, kill: Sequence[Process] = ()) -> NoReturn:
        """The job is over: one line, and out. Called on the watchdog's own thread; the main thread may be stuck."""
        if say and not self._left.is_set():
            terminal.note(f"error: {text}")
            sys.stderr.flush()
        self.over.set()
        time.sleep(_SPREAD_S)
        for process in kill:
            process.kill_here()
        os._exit(code)


class Monitor(Watch):
    """Rank 0's: hears everybody and decides."""

    def __init__(self, me: Peer, limits: Limits, hosts: list[str], listener: socket.socket, token: str) -> None:
        super().__init__(me, limits)
        self.token, self.listener = token, listener
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, None)
        self.peers = {rank: Peer(rank, host) for rank, host in enumerate(hosts) if rank != me.rank}
        self.lines: dict[int, Line] = {}
        self._judged = 0.0
        self._failure: tuple[float, str, int] | None = None

    def turn(self) -> None:
        for key, _ in self.selector.select(self.limits.beat):
            self._accept() if key.data is None else self._hear(key.data)
        if time.monotonic() - self._judged >= self.limits.beat:
            self._judged = time.monotonic()
            self._tell({"alive": activity.state()})
            self._judge()

    def _judge(self) -> None:
        if self._failure is not None and self._leaving is None and time.monotonic() - self._failure[0] > _SAY_FIRST_S:
            self._over(self._failure[1], self._failure[2])
        self.me.hear(activity.state())
        if self._leaving is not None:
            return
        quiet = silent(list(self.peers.values()), self.limits)
        if quiet:
            self._over(quiet_words(quiet, self.limits), EXIT_LOST, quiet)
        verdict = stuck([self.me, *self.peers.values()], self.limits)
        if verdict is not None:
            self._over(verdict, EXIT_LOST)

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(2.0)
        self.selector.register(connection, selectors.EVENT_READ, Line(connection))

    def _hear(self, line: Line) -> None:
        messages = line.receive()
        if messages is None:
            self.selector.unregister(line.socket)
            line.socket.close()
            if line.rank is not None and not self.peers[line.rank].left and self._leaving is None:
                self._over(died(self.peers[line.rank]), EXIT_LOST)
            return
        for message in messages:
            if line.rank is not None:
                self._message(self.peers[line.rank], message)
            elif secrets.compare_digest(str(message.get("token")).encode(), self.token.encode()):
                line.rank = int(message["hello"])
                self.lines[line.rank] = line
                self.peers[line.rank].process = Process(message["pid"], message["space"])
                if self._leaving is not None:
                    line.send(self._leaving)

    def _message(self, peer: Peer, message: dict[str, Any]) -> None:
        if "alive" in message:
            peer.hear(message["alive"])
        elif "bye" in message:
            peer.left = True
            if message["bye"] not in (0, None) and message["text"] and self._failure is None:
                self._failure = (time.monotonic(), message["text"], message["bye"])

    def _over(self, text: str, code: int, lost: Sequence[Peer] = ()) -> None:
        known = [peer.process for peer in lost if peer.process is not None]
        self._tell({"over": code, "kill": [[process.pid, process.space] for process in known]})
        self.end(text, code, say=True, kill=known)

    def _tell(self, message: dict[str, Any]) -> None:
        for line in list(self.lines.values()):
            line.send(message)

    def farewell(self, code: int, text: str) -> None:
        self._leaving = {"over": code} if code not in (0, None) and text else {"bye": code}
        self._tell(self._leaving)
        time.sleep(_SPREAD_S if text else 0.0)


class Beacon(Watch):
    """Every other rank's: tells rank 0, and hears that rank 0 lives."""

    def __init__(self, me: Peer, limits: Limits, main: Peer, line: Line, speaks: bool) -> None:
        super().__init__(me, limits)
        self.main, self.line, self.speaks = main, line, speaks
        self.selector = selectors.DefaultSelector()
        self.selector.register(line.socket, selectors.EVENT_READ)

    def turn(self) -> None:
        self.line.send({"alive": activity.state()})
        if self.selector.select(self.limits.beat):
            messages = self.line.receive()
            if messages is None:
                if not self.main.left and self._leaving is None:
                    self.end(died(self.main), EXIT_LOST, self.speaks)
                self._left.set()
                return
            for message in messages:
                self._message(message)
            time.sleep(self.limits.beat / 2)  # rank 0 is talkative: do not answer each word
        if self._leaving is None and silent([self.main], self.limits):
            known = [] if self.main.process is None else [self.main.process]
            self.end(quiet_words([self.main], self.limits), EXIT_LOST, self.speaks, known)

    def _message(self, message: dict[str, Any]) -> None:
        if "alive" in message:
            self.main.hear(message["alive"])
        elif "bye" in message:
            self.main.left = True
        elif "over" in message:
            self.end("", int(message["over"]), say=False, kill=[Process(*process) for process in message.get("kill", ())])

    def farewell(self, code: int, text: str) -> None:
        self._leaving = {"bye": code, "text": text}
        self.line.send(self._leaving)


def start(control: Control, limits: Limits, local_rank: int) -> Watch | None:
    """Start this process's watchdog, together with all ranks; None in a world of one.

    Args:
        control: the communicator of the whole world.
        local_rank: the first rank of every host speaks when rank 0 cannot.
    """
    global _watch
    if control.size == 1:
        return None
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")  # where rank 0 is, for every launcher
    own = Process.own()
    offer = {"host": socket.gethostname(), "pid": str(own.pid), "space": own.space}
    listener = _listen(address, control.size) if control.rank == 0 else None
    if listener is not None:
        offer |= {"port": str(listener.getsockname()[1]), "token": secrets.token_hex(16)}
    told = [json.loads(payload) for payload in control.gather(json.dumps(offer).encode())]
    hosts = [str(theirs["host"]) for theirs in told]
    me = Peer(control.rank, hosts[control.rank])
    if listener is not None:
        _watch = Monitor(me, limits, hosts, listener, offer["token"])
    else:
        line = _connect(address, int(told[0]["port"]), own, control.rank, told[0]["token"])
        main = Peer(0, hosts[0], Process(int(told[0]["pid"]), told[0]["space"]))
        _watch = Beacon(me, limits, main, line, speaks=local_rank == 0 or control.rank == 1)
    _watch.thread.start()
    return _watch


def current() -> Watch | None:
    """The watchdog of this process, if it has one."""
    return _watch


def _listen(address: str, world_size: int) -> socket.socket:
    """Rank 0's socket, on the address by which the other ranks know it, or on all.

    A name may mean loopback here and another address elsewhere; and an address may belong to something in front of this host.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * world_size + 1024:  # a connection per rank, beside torch's own
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listener = socket.socket()
    try:
        ipaddress.ip_address(address)
        listener.bind((address, 0))
    except (ValueError, OSError):
        listener.close()
        listener = socket.socket()
        listener.bind(("", 0))
    listener.listen(4096)
    return listener


def _connect(address: str, port: int, own: Process, rank: int, token: str) -> Line:
    connection = socket.create_connection((address, port), timeout=30.0)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(2.0)
    line = Line(connection)
    line.send({"hello": rank, "token": token, "pid": own.pid, "space": own.space})
    return line
