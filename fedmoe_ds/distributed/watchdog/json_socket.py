"""JSON socket: a connection that carries one JSON object per line.

Neither reading nor writing waits. What has arrived without its end, and what the peer has not taken yet, are both bounded: a
peer that never ends a line, or never reads, costs a known number of bytes and no time.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from typing import Any

LONGEST = 1 << 16
"""Bytes of a message."""


class GarbledError(ValueError):
    """What has arrived is no message: not JSON, no object, or without an end."""


class JsonSocket:
    """A socket that carries one JSON object per line.

    Args:
        connection: stays non-blocking from here on.
        longest: bytes of a message that may arrive.
    """

    def __init__(self, connection: socket.socket, longest: int = LONGEST) -> None:
        connection.setblocking(False)
        self.socket, self.longest = connection, longest
        self._arrived, self._unsent = b"", b""
        self._sending = threading.Lock()  # the main thread announces its exit beside the watchdog's thread

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send as much as the kernel takes now; the rest goes out with the next message, or in `flush`.

        A message that has no room behind what the peer has not taken is dropped as a whole: silence tells about such a peer.
        """
        data = json.dumps(message).encode() + b"\n"
        with self._sending:
            if len(self._unsent) + len(data) <= LONGEST:
                self._unsent += data
            self._push()

    def flush(self, limit_s: float) -> None:
        """Wait until everything is out, at most so long: before the process ends."""
        deadline = time.monotonic() + limit_s
        while self._unsent and (left_s := deadline - time.monotonic()) > 0 and self.socket.fileno() >= 0:
            writable = select.poll()  # not select(), which knows no descriptor above 1023
            writable.register(self.socket, select.POLLOUT)
            writable.poll(1000 * left_s)
            with self._sending:
                self._push()

    def _push(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # the peer is gone: its end is heard in `receive`
            self._unsent = b""

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None when the connection is over. Call it when the socket is readable.

        Raises:
            GarbledError: what arrived is no message.
        """
        try:
            data = self.socket.recv(self.longest)
        except (BlockingIOError, InterruptedError):  # readable a moment ago, and no longer: a packet with a wrong checksum
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._arrived = (self._arrived + data).split(b"\n")
        if self._arrived[:1] not in (b"", b"{"):  # not to be waited for
            raise GarbledError("something that begins like no object of JSON")
        if any(len(line) >= self.longest for line in (*lines, self._arrived)):
            raise GarbledError(f"a message of {self.longest} bytes or more")
        return [_message(line) for line in lines]

    def close(self) -> None:
        self.socket.close()


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line.decode())
    except (ValueError, RecursionError):
        raise GarbledError("a line that is no JSON") from None
    if not isinstance(message, dict):
        raise GarbledError("JSON that is no object")
    return message
