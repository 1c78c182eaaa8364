"""Line: a connection that carries one JSON object per line."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

_LONGEST = 1 << 16
"""Bytes of a message; whoever sends more is a stranger."""


class Line:
    """A socket that carries one JSON object per line, read without blocking."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self._rest = connection, b""
        self.rank: int | None = None  # known after its first word
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Send; a peer that is gone or does not read is found out by silence, not here."""
        try:
            with self._sending:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None when the connection is over, or no rank's. Call when the socket is readable."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines] if len(self._rest) < _LONGEST else None
        except (ValueError, TypeError, RecursionError):
            return None
