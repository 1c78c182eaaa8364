"""Listener: rank 0 accepts connections, and keeps those that prove to be ranks.

Any process that reaches the port can open a connection. Until it has proved to be a rank (`handshake`), it may hold one of a
limited number of places, for a few seconds, and send one short line; anything else ends it. When all ranks are connected, the
listener closes for good. Refused connections are counted, and reported in one line.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedmoe_ds.distributed.watchdog import handshake, messages
from fedmoe_ds.distributed.watchdog.json_socket import LONGEST, JsonSocket

SPARE = 64
"""Places for connections that are not known, beyond one for every rank."""
HELLO_S = 5.0
"""How long such a connection may stay."""
_HELLO_BYTES = 1024
_HELLO_READS = 16
"""Pieces in which a hello may arrive; a rank sends it in one."""
_WINDOW_S = 0.1
"""In each such window at most as many are accepted as there are places: a burst pushes out none of its own window."""
_BATCH = 32
"""Connections that are accepted before those that are open are read again."""
_REST_S = 0.5
"""Pause after the system has refused to accept one: usually no descriptor is free."""
_WARN_EVERY_S = 60.0
_BACKLOG = 4096


class _StrangerError(Exception):
    """The connection is no rank's; the text says why it was refused."""


@dataclass
class _Guest:
    """A connection that has not proved to be a rank."""

    line: JsonSocket
    challenge: str
    since: float
    reads: int = 0


class Listener:
    """Rank 0's listeners and the connections that have not said who they are. Can be waited for like a socket.

    Args:
        listeners: bound, and listening.
        token: the job's secret, which ranks know.
        ranks: who is expected.
    """

    def __init__(self, listeners: Sequence[socket.socket], token: str, ranks: Iterable[int]) -> None:
        self.listeners, self.token, self.expected = listeners, token, set(ranks)
        self.places = len(self.expected) + SPARE
        self.turned_away: Counter[str] = Counter()
        self.refusals = 0  # of the system, to accept one
        self.is_open = True
        self._guests: dict[JsonSocket, _Guest] = {}  # the oldest first
        self._window, self._entered = time.monotonic(), 0
        self._resting_until: float | None = None
        self._warned, self._told = time.monotonic(), 0
        # epoll, because its descriptor can be waited for in turn, by the selector of the main watchdog.
        self._selector = selectors.EpollSelector()
        for listener in listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)

    def fileno(self) -> int:
        return self._selector.fileno()

    @property
    def wait_s(self) -> float:
        """Seconds after which `step` is due even if nothing has arrived."""
        return HELLO_S if self._resting_until is None else max(0.0, self._resting_until - time.monotonic())

    def step(self) -> list[tuple[int, JsonSocket]]:
        """Read and accept what is there; returns the ranks that have proved to be such, with their connections. Never waits."""
        if not self.is_open:
            return []
        now = time.monotonic()
        if self._resting_until is not None and now >= self._resting_until:
            self._resting_until = None
            for listener in self.listeners:
                self._selector.register(listener, selectors.EVENT_READ)
        ready = [key.fileobj for key, _ in self._selector.select(0)]
        came = [
            found for line in ready if isinstance(line, JsonSocket) and (found := self._hear(self._guests[line])) is not None
        ]
        for guest in [guest for guest in self._guests.values() if now - guest.since > HELLO_S]:
            self._turn_away(guest, f"silent for {HELLO_S:g} s")  # heard first: this process itself may have been held up
        for source in ready:
            # The listener before this one may have used up the window: then all of them rest.
            if isinstance(source, socket.socket) and self.expected and self._resting_until is None:
                self._let_in(source, now)
        if not self.expected:
            self.close()
        return came

    def _let_in(self, listener: socket.socket, now: float) -> None:
        if now - self._window >= _WINDOW_S:
            self._window, self._entered = now, 0
        for _ in range(_BATCH):
            if self._entered >= self.places:
                self._rest(self._window + _WINDOW_S)
                return
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:  # closed by its peer while it waited in the queue
                continue
            except OSError:  # EMFILE, ENFILE, ENOBUFS, ENOMEM: what the oldest one holds may be what is missing
                self.refusals += 1
                if self._guests:
                    self._turn_away(next(iter(self._guests.values())), "pushed out")
                self._rest(now + _REST_S)
                return
            self._entered += 1
            self._greet(connection, now)

    def _rest(self, until: float) -> None:
        """Accept nothing until then; new connections wait in the kernel's queue."""
        self._resting_until = until
        for listener in self.listeners:
            self._selector.unregister(listener)

    def _greet(self, connection: socket.socket, now: float) -> None:
        # The oldest makes room: it has had the longest time to prove itself.
        if len(self._guests) >= self.places:
            self._turn_away(next(iter(self._guests.values())), "pushed out")
        guest = _Guest(JsonSocket(connection, _HELLO_BYTES), handshake.secret(), now)
        try:
            self._selector.register(guest.line, selectors.EVENT_READ)
        except OSError:  # ENOMEM, or ENOSPC: the user's limit on watched descriptors
            self.refusals += 1
            connection.close()
            return
        self._guests[guest.line] = guest
        guest.line.send({"challenge": guest.challenge})

    def _hear(self, guest: _Guest) -> tuple[int, JsonSocket] | None:
        """The rank that has proved to be one; any other connection is closed at the first message that is no hello."""
        try:
            hello = self._hello(guest)
        except _StrangerError as reason:
            self._turn_away(guest, str(reason))
            return None
        if hello is None:
            return None
        self._forget(guest)
        self.expected.discard(hello.hello)
        # Only a proved rank may send more than a hello's worth of bytes.
        guest.line.longest = LONGEST
        challenges = guest.challenge, hello.challenge
        guest.line.send({"welcome": handshake.proof(self.token, "rank 0", challenges, hello.hello)})
        return hello.hello, guest.line

    def _hello(self, guest: _Guest) -> messages.Hello | None:
        """The hello of a rank that is expected; None while it has not arrived as a whole."""
        guest.reads += 1
        try:
            said = guest.line.receive()
            if said is None:
                raise _StrangerError("without a word")
            if not said and guest.reads < _HELLO_READS:
                return None
            (hello,) = [messages.check(messages.hello, message) for message in said]
        except ValueError:  # no message, no hello, or not exactly one
            raise _StrangerError("with something else than a hello") from None
        # The proof before the rank: without the token nobody learns which ranks are missing.
        if not handshake.is_proof(hello.proof, self.token, "rank", (guest.challenge, hello.challenge), hello.hello):
            raise _StrangerError("with a wrong proof")
        if hello.hello not in self.expected:
            raise _StrangerError("as a rank that is not missing")
        return hello

    def _turn_away(self, guest: _Guest, why: str) -> None:
        self.turned_away[why] += 1
        self._forget(guest)
        guest.line.close()

    def _forget(self, guest: _Guest) -> None:
        del self._guests[guest.line]
        self._selector.unregister(guest.line)

    def close(self) -> None:
        """Nobody else is expected."""
        self.is_open, self._resting_until = False, None
        for guest in list(self._guests.values()):
            self._turn_away(guest, "too late")
        self._selector.close()
        for listener in self.listeners:
            listener.close()

    def warning(self) -> str | None:
        """One line about refused connections: once in a while as long as the listener is open, and when it has been closed."""
        count, now = self.turned_away.total() + self.refusals, time.monotonic()
        if count == self._told or (self.is_open and now - self._warned < _WARN_EVERY_S):
            return None
        self._warned, self._told = now, count
        reasons = ", ".join(f"{number} {why}" for why, number in self.turned_away.most_common())
        full = f"; the system refused {self.refusals} times to let one in (ulimit -n)" if self.refusals else ""
        return (
            f"warning: watchdog: {self.turned_away.total()} connections that were no rank's were turned away"
            f"{f' ({reasons})' if reasons else ''}{full}; others can reach this job's ports"
        )


def listen(addresses: list[str]) -> list[socket.socket]:
    """A listener on each of these addresses that is this host's."""
    listeners = []
    for address in addresses:
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            listener.bind((address, 0))
        except OSError:
            listener.close()
            continue
        listener.listen(_BACKLOG)
        listeners.append(listener)
    return listeners


def listen_everywhere() -> socket.socket:
    """A listener on all interfaces."""
    try:
        listener = socket.socket(socket.AF_INET6)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # IPv4 comes in on the same port
        listener.bind(("::", 0))
    except OSError:  # a kernel without IPv6
        listener = socket.socket()
        listener.bind(("", 0))
    listener.listen(_BACKLOG)
    return listener
