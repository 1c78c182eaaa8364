"""Main watchdog: rank 0's watchdog. It hears all ranks and decides when the job is over."""

from __future__ import annotations

import selectors
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.watchdog import messages
from fedmoe_ds.distributed.watchdog.handshake import JOIN_S
from fedmoe_ds.distributed.watchdog.json_socket import GarbledError, JsonSocket
from fedmoe_ds.distributed.watchdog.listener import Listener
from fedmoe_ds.distributed.watchdog.rank_health import Limits, Peer, died, garbled, silence_message, silent, stuck
from fedmoe_ds.distributed.watchdog.watchdog import SPREAD_S, Watchdog, say
from fedmoe_ds.errors import EXIT_LOST

_SAY_FIRST_S = 3.0
"""How long rank 0 may take to tell a mistake itself that another rank has met, too."""


class MainWatchdog(Watchdog):
    """The watchdog of rank 0.

    Args:
        peers: the other ranks.
        listener: where they connect.
    """

    def __init__(self, me: Peer, limits: Limits, peers: Sequence[Peer], listener: Listener, notes: Sequence[str] = ()) -> None:
        super().__init__(me, limits, notes)
        self.peers, self.listener = {peer.rank: peer for peer in peers}, listener
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, None)
        self.lines: dict[int, JsonSocket] = {}
        self._began = time.monotonic()
        self._judged = 0.0
        self._failure: tuple[float, str, int] | None = None

    def step(self) -> None:
        # At most one beat: the others expect a sign of life from rank 0 as well.
        for key, _ in self.selector.select(min(self.limits.beat, self.listener.wait_s)):
            if key.data is not None:
                self._hear(key.data)
        if self.listener.is_open:
            self._let_in()
        if time.monotonic() - self._judged >= self.limits.beat:
            self._judged = time.monotonic()
            self._tell({"alive": activity.state()})
            self._judge()

    def _let_in(self) -> None:
        for rank, line in self.listener.step():
            self.lines[rank] = line
            self.peers[rank].heard = time.monotonic()
            self.selector.register(line, selectors.EVENT_READ, rank)
            if self._leaving is not None:
                # It came in after rank 0 had announced its exit, so it has not heard of that.
                line.send(self._leaving)
        if not self.listener.is_open:
            self.selector.unregister(self.listener)
        warning = self.listener.warning()
        if warning is not None:
            say(warning)

    def _judge(self) -> None:
        # Another rank has met a mistake, and rank 0 has not told the same one itself within its time.
        if self._failure is not None and self._leaving is None and time.monotonic() - self._failure[0] > _SAY_FIRST_S:
            self._over(self._failure[1], self._failure[2])
        # Rank 0 is no silent rank to itself, but it may be the one that a stuck collective waits for.
        self.me.hear(activity.state())
        if self._leaving is not None:
            return
        coming = time.monotonic() - self._began < JOIN_S  # who is not in yet may be held up at the listener
        quiet = [peer for peer in silent(list(self.peers.values()), self.limits) if peer.rank in self.lines or not coming]
        if quiet:
            self._over(silence_message(quiet, self.limits), EXIT_LOST, quiet)
        verdict = stuck([self.me, *self.peers.values()], self.limits)
        if verdict is not None:
            self._over(verdict, EXIT_LOST)

    def _hear(self, rank: int) -> None:
        peer, line = self.peers[rank], self.lines[rank]
        try:
            arrived = line.receive()
            said = [messages.check(messages.said, message) for message in arrived or ()]
        except GarbledError as error:
            self._lose(peer, garbled(peer, str(error)))
            return
        for message in said:
            self._message(peer, message)
        if arrived is None:
            self._lose(peer, died(peer))

    def _lose(self, peer: Peer, verdict: str) -> None:
        self.selector.unregister(self.lines[peer.rank])
        self.lines[peer.rank].close()
        # After an announced exit, its own or rank 0's, the end of a connection is expected.
        if not peer.left and self._leaving is None:
            self._over(verdict, EXIT_LOST)

    def _message(self, peer: Peer, message: messages.Said) -> None:
        if isinstance(message, messages.Alive):
            peer.hear(message.alive.model_dump())
            return
        peer.left = True
        if message.bye != 0 and message.text and self._failure is None:
            self._failure = (time.monotonic(), message.text, message.bye)

    def _over(self, text: str, code: int, lost: Sequence[Peer] = ()) -> None:
        self._tell({"over": code, "kill": [peer.rank for peer in lost]})
        self.end(text, code, speaks=True, kill=[peer.process for peer in lost if peer.process is not None])

    def fail(self, text: str) -> NoReturn:
        self._tell({"over": 1})
        self.end(text, 1, speaks=True)

    def _tell(self, message: dict[str, Any]) -> None:
        # A copy: the main thread announces its exit while the watchdog's thread may add a line.
        for line in list(self.lines.values()):
            line.send(message)

    def announce_exit(self, code: int, text: str) -> None:
        # A failure with a reason ends the job for all. Without one (success, a stop) every rank ends by itself.
        self._leaving = {"over": int(code)} if code != 0 and text else {"bye": int(code)}
        self._tell(self._leaving)
        time.sleep(SPREAD_S if text else 0.0)
