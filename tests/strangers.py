"""Strangers: what processes that do not belong to a job may do at an open port of it. No torch: a crowd is cheap."""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ZEROS = "0" * 64


def _hello(**changes: Any) -> bytes:
    return json.dumps({"hello": 1, "challenge": ZEROS, "proof": ZEROS} | changes).encode() + b"\n"


HELLOS: dict[str, Any] = {
    "a wrong proof": {},
    "rank 0": {"hello": 0},
    "a rank out of range": {"hello": 99},
    "a negative rank": {"hello": -1},
    "a huge rank": {"hello": 10**400},
    "a boolean rank": {"hello": True},
    "a rank as text": {"hello": "1"},
    "a rank with a fraction": {"hello": 1.0},
    "a rank that is no number": {"hello": float("nan")},
    "no rank": {"hello": None},
    "a list of ranks": {"hello": [1]},
    "a short proof": {"proof": "0"},
    "a proof in capitals": {"proof": "A" * 64},
    "a proof in other letters": {"proof": "ä" * 64},
    "a proof of half a character": {"proof": "\ud800"},
    "a challenge of half a character": {"challenge": "\ud800" * 64},
    "a proof that is a number": {"proof": 0},
    "one key too many": {"pid": 1},
    "the old token": {"token": "0" * 32, "pid": 1, "space": "x"},
}
WORDS: dict[str, bytes] = {
    "half a character": b'{"token": "\\ud800"}\n',
    "the old hello": b'{"hello": 1, "token": "0", "pid": 1, "space": "x"}\n',
    "deep lists": b"[" * 900 + b"\n",
    "deeper lists": b"[" * 60_000 + b"\n",
    "deep objects": b'{"a":' * 190 + b"\n",
    "noise": bytes(range(256)) * 3,
    "no UTF-8": b"\xff\xfe{}\n",
    "a web browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": bytes.fromhex("1603010200010001fc0303") + bytes(500),
    "an empty line": b"\n",
    "many empty lines": b"\n" * 5000,
    "a number": b"1\n",
    "nothing": b"null\n",
    "pairs": b'[["hello", 1]]\n',
    "an empty object": b"{}\n",
    "a number of a thousand digits": b'{"hello": ' + b"9" * 900 + b"}\n",
    "a line without end": b"x" * 100_000,
    "an announced exit": b'{"bye": 0}\n',
    "a sign of life": b'{"alive": {"round": 1, "phase": "x", "waiting": null, "for_s": 0.0, "groups": []}}\n',
    "an order to kill": b'{"over": 1, "kill": [[1, "x"]]}\n',
    "an order to stop": b'{"over": 0, "kill": [0, 1, 2]}\n',
    "two hellos": _hello() + _hello(),
    **{f"hello with {name}": _hello(**changes) for name, changes in HELLOS.items()},
}
"""First words, all of them wrong."""
MANNERS = ("idle", "half-open", "reset", "spelling", "flooding")
"""Other ways to be a nuisance: none of them reads."""


def connect(address: str, port: int) -> socket.socket:
    """Refused connections raise; the socket does not wait."""
    made = _create(AF(address))
    made.settimeout(60.0)
    made.connect((address, port))
    return made


def AF(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _create(family: socket.AddressFamily) -> socket.socket:
    return socket.socket(family)


def is_closed(connection: socket.socket, limit_s: float = 60.0) -> bool:
    """Whether the other side ends the connection, whatever it says before."""
    connection.settimeout(limit_s)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def open_files(count: int) -> Iterator[None]:
    """This process may have so many files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count) if soft >= 0 else soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Crowd(threading.Thread):
    """So many strangers at one port at any time: who is turned away comes again, and does something else.

    Attributes:
        counts: what happened: `came`, `turned away`, `refused`.
    """

    def __init__(self, address: str, port: int, size: int, pause_s: float = 0.02) -> None:
        super().__init__(daemon=True)
        self.target, self.size, self.pause_s = (address, port), size, pause_s
        self.counts: Counter[str] = Counter()
        self._ways = [*WORDS, *(manner for manner in MANNERS for _ in range(8))]
        self._next, self._shut = 0, False
        self._here: dict[int, tuple[socket.socket, str]] = {}
        self._poll = select.poll()
        self._ended = threading.Event()

    def __enter__(self) -> Crowd:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        for connection, _way in self._here.values():
            connection.close()

    def run(self) -> None:
        while not self._ended.is_set():
            for _ in range(1 if self._shut else self.size - len(self._here)):  # who is refused comes back alone
                self._come()
            for descriptor, _ in self._poll.poll(0):
                self._leave(descriptor)
            for descriptor, (connection, way) in list(self._here.items()):
                self._annoy(descriptor, connection, way)
            time.sleep(self.pause_s)

    def _come(self) -> None:
        connection = _create(AF(self.target[0]))
        connection.setblocking(False)
        way = self._ways[self._next % len(self._ways)]
        self._next += 1
        if connection.connect_ex(self.target) not in (0, errno.EINPROGRESS):
            connection.close()
            self._refuse()
            return
        self.counts["came"] += 1
        self._here[connection.fileno()] = connection, way
        self._poll.register(connection, select.POLLRDHUP)
        with contextlib.suppress(OSError):
            if way in WORDS:
                connection.send(WORDS[way])
            elif way == "half-open":
                connection.shutdown(socket.SHUT_WR)
            elif way == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._leave(connection.fileno())

    def _annoy(self, descriptor: int, connection: socket.socket, way: str) -> None:
        if way not in ("spelling", "flooding"):
            return
        try:
            connection.send(b"{" if way == "spelling" else b"x" * (1 << 16))
        except BlockingIOError:
            return
        except OSError:
            self._leave(descriptor)

    def _leave(self, descriptor: int) -> None:
        connection, _ = self._here.pop(descriptor)
        self._poll.unregister(descriptor)
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED:
            self._refuse()
        else:
            self.counts["turned away"] += 1
            self._shut = False
        connection.close()

    def _refuse(self) -> None:
        self.counts["refused"] += 1
        self._shut = True
