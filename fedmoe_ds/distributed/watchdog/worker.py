"""Worker watchdog, of every rank but rank 0: it tells rank 0 what its process does, and hears that rank 0 lives."""

from __future__ import annotations

import math
import selectors
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.watchdog import messages
from fedmoe_ds.distributed.watchdog.json_socket import GarbledError, JsonSocket
from fedmoe_ds.distributed.watchdog.rank_health import Limits, Peer, died, garbled, silence_message, silent
from fedmoe_ds.distributed.watchdog.watchdog import SPREAD_S, Watchdog
from fedmoe_ds.errors import EXIT_LOST

_LONGEST_TEXT = 4000
"""Characters of a reason that travels: a message has an end."""


class WorkerWatchdog(Watchdog):
    """The watchdog of a rank other than 0.

    Args:
        peers: all ranks, rank 0 first. Rank 0 may ask for processes of theirs to be killed, and for no others.
        line: to rank 0, which has proved to be it.
        heard: what it has said already.
        speaks: whether this one says that rank 0 is gone.
    """

    def __init__(
        self, me: Peer, limits: Limits, peers: Sequence[Peer], line: JsonSocket, heard: Sequence[dict[str, Any]], speaks: bool
    ) -> None:
        super().__init__(me, limits)
        self.main, self.peers, self.line, self.speaks = peers[0], peers, line, speaks
        self.main.heard = time.monotonic()  # a moment ago, in the handshake
        self._heard = list(heard)
        self._told = -math.inf  # when it last gave a sign of life
        self.selector = selectors.DefaultSelector()
        self.selector.register(line, selectors.EVENT_READ)

    def step(self) -> None:
        left_s = self._told + self.limits.beat - time.monotonic()
        if left_s <= 0:
            self.line.send({"alive": activity.state()})
            self._told, left_s = time.monotonic(), self.limits.beat
        try:
            # What rank 0 says is heard at once, whatever the beat: ranks must learn together that the job is over.
            self._listen(left_s)
        except GarbledError as error:
            self.end(garbled(self.main, str(error)), EXIT_LOST, self.speaks)
        # A rank that has announced its exit judges nobody any more: rank 0 may have ended before it.
        if self._leaving is None and not self._left.is_set() and silent([self.main], self.limits):
            known = [] if self.main.process is None else [self.main.process]
            self.end(silence_message([self.main], self.limits), EXIT_LOST, self.speaks, known)

    def _listen(self, limit_s: float) -> None:
        while self._heard:
            self._message(self._heard.pop(0))
        if not self.selector.select(limit_s):
            return
        arrived = self.line.receive()
        for message in arrived or ():
            self._message(message)
        if arrived is not None:
            return
        if self.main.left or self._leaving is not None:
            self._left.set()
        else:
            self.end(died(self.main), EXIT_LOST, self.speaks)

    def _message(self, content: dict[str, Any]) -> None:
        message = messages.check(messages.told, content)
        if isinstance(message, messages.Alive):
            self.main.hear(message.alive.model_dump())
        elif isinstance(message, messages.Bye):
            self.main.left = True
        else:
            lost = [self.peers[rank].process for rank in message.kill if 0 <= rank < len(self.peers)]
            self.end("", message.over, speaks=False, kill=[process for process in lost if process is not None])

    def fail(self, text: str) -> NoReturn:
        self.announce_exit(1, text)  # rank 0 repeats it
        self.end(text, 1, speaks=True)

    def announce_exit(self, code: int, text: str) -> None:
        self._leaving = {"bye": int(code), "text": text[:_LONGEST_TEXT]}
        self.line.send(self._leaving)
        self.line.flush(SPREAD_S)
