"""Handshake: a rank and rank 0 prove to each other that they belong to one job, and neither says the job's secret.

    rank 0: challenge A
    rank:   hello 3, challenge B, HMAC-SHA256(token, "rank", A, B, 3)
    rank 0: HMAC-SHA256(token, "rank 0", A, B, 3)

Challenges are fresh for every connection, so that a recorded answer is worth nothing. Rank 0 hears nothing else before the
proof, and a rank obeys nobody who has not proved to be rank 0: whoever takes its port over after its death cannot steer it.

This keeps out other programs that can open a connection. It does not keep out who can read or change the job's own packets: the
token itself reaches the ranks over `control.gather`, that is gloo or MPI, which encrypt nothing and ask nobody who he is.
"""

from __future__ import annotations

import hmac
import json
import secrets
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

from fedmoe_ds.distributed.watchdog import messages
from fedmoe_ds.distributed.watchdog.json_socket import GarbledError, JsonSocket

JOIN_S = 30.0
"""How long a rank tries to get in."""
_AGAIN_S = 0.1
"""Between two tries: many other connections at once may have pushed this rank out of the listener's places."""


class HandshakeError(ConnectionError):
    """Whoever listens is not rank 0 of this job, or does not answer."""


class _TurnedAwayError(ConnectionError):
    """The connection ended before rank 0 had answered."""


def secret() -> str:
    """256 fresh random bits, for a token or a challenge."""
    return secrets.token_hex(32)


def proof(token: str, side: str, challenges: tuple[str, str], rank: int) -> str:
    """That `side` (`rank` or `rank 0`) knows the token; `challenges` are rank 0's and the rank's."""
    # `side` is part of the text, so that a proof cannot be sent back to the side that made it.
    text = json.dumps([side, *challenges, rank])
    return hmac.new(bytes.fromhex(token), text.encode(), "sha256").hexdigest()


def is_proof(given: str, token: str, side: str, challenges: tuple[str, str], rank: int) -> bool:
    """Whether it is that proof; takes as long for a wrong one as for a right one."""
    return hmac.compare_digest(given, proof(token, side, challenges, rank))


def join(
    places: Sequence[tuple[str, int]], rank: int, token: str, limit_s: float = JOIN_S
) -> tuple[JsonSocket, list[dict[str, Any]]]:
    """Connect to rank 0 and prove each other; also what rank 0 has said right after its proof.

    Args:
        places: addresses and ports; the first that can be reached is used.
    Raises:
        OSError: nobody listens there.
        HandshakeError: it is not rank 0 of this job, or there is no answer in `limit_s` seconds.
    """
    deadline = time.monotonic() + limit_s
    while True:
        connection, (address, port) = _connect(places, deadline)
        # Messages are short and rare: Nagle's algorithm would hold one back until the one before is acknowledged.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = JsonSocket(connection)
        try:
            return line, _introduce(line, rank, token, deadline)
        except _TurnedAwayError:
            line.close()
            if time.monotonic() + _AGAIN_S > deadline:
                raise HandshakeError(f"{address} port {port} hangs up, for {limit_s:g} s") from None
            time.sleep(_AGAIN_S)
        except GarbledError as error:
            line.close()
            raise HandshakeError(f"{address} port {port} is not rank 0 of this job: {error}") from None
        except TimeoutError:
            line.close()
            raise HandshakeError(f"{address} port {port} does not answer, for {limit_s:g} s") from None


def _connect(places: Sequence[tuple[str, int]], deadline: float) -> tuple[socket.socket, tuple[str, int]]:
    for number, place in enumerate(places, 1):
        share_s = (deadline - time.monotonic()) / (len(places) - number + 1)  # an address may be one that swallows packets
        try:
            # Never 0, which would mean a socket that does not wait at all.
            return socket.create_connection(place, timeout=max(0.1, share_s)), place
        except OSError:
            if number == len(places):
                raise
    raise ValueError("no place to connect to")


def _introduce(line: JsonSocket, rank: int, token: str, deadline: float) -> list[dict[str, Any]]:
    first, *_ = _next(line, deadline)
    challenges = messages.check(messages.challenge, first).challenge, secret()
    line.send({"hello": rank, "challenge": challenges[1], "proof": proof(token, "rank", challenges, rank)})
    answer, *rest = _next(line, deadline)
    if not is_proof(messages.check(messages.welcome, answer).welcome, token, "rank 0", challenges, rank):
        raise GarbledError("it does not know the token")
    return rest


def _next(line: JsonSocket, deadline: float) -> list[dict[str, Any]]:
    """At least one message."""
    readable = select.poll()
    readable.register(line, select.POLLIN)
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not readable.poll(1000 * left_s):
            raise TimeoutError
        arrived = line.receive()
        if arrived is None:
            raise _TurnedAwayError
        if arrived:
            return arrived
