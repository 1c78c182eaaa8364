"""Watchdog: no job hangs because one of its ranks is gone.

Every rank keeps a connection to rank 0 and tells it once in a while what it is doing (`activity`); rank 0 tells the others that
it lives. A connection that ends without a farewell is a rank that died; one that is silent for `silence_s` a rank that was
stopped, hangs in a kernel, or lost its network; a rank that waits in one collective for longer than `timeout_s` waits for
somebody who will not come. In each case rank 0 says so in one line, tells everybody, and the whole job ends with EXIT_LOST. If
rank 0 itself is gone, every host's first rank says that.

The threads (`monitor`, `beacon`) only read sockets and `activity`, so they keep working while the main thread waits in a
collective. Strangers who open connections get no further than the `door`; ranks and rank 0 prove themselves to each other in
the `handshake`. The token for that travels to the ranks over `control.gather`, that is gloo or MPI, as port and address do:
whoever can read or change the job's own packets is trusted.
"""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

from fedmoe_ds.address import common_addresses, resolved
from fedmoe_ds.beacon import Beacon
from fedmoe_ds.door import Door, allow_connections, listen
from fedmoe_ds.handshake import join, secret
from fedmoe_ds.monitor import Monitor
from fedmoe_ds.peers import Limits, Peer, Process
from fedmoe_ds.watch import Watch

if TYPE_CHECKING:
    from fedmoe_ds.control import Control

_watch: Watch | None = None


def start(control: Control, limits: Limits, local_rank: int) -> Watch | None:
    """Start this process's watchdog, together with all ranks; None in a world of one.

    Args:
        control: the communicator of the whole world.
        local_rank: the first rank of every host speaks when rank 0 cannot.
    Raises:
        OSError: rank 0 cannot be reached, or is another program.
    """
    global _watch
    if control.size == 1:
        return None
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")  # where rank 0 is, for every launcher
    own = Process.own()
    facts = {"host": socket.gethostname(), "pid": own.pid, "space": own.space, "started": own.started}
    told = _gather(control, {**facts, "master": resolved(master)})
    processes = [Process(theirs["pid"], theirs["space"], theirs["started"]) for theirs in told]
    peers = [Peer(rank, theirs["host"], processes[rank]) for rank, theirs in enumerate(told)]
    me = peers[control.rank]
    if control.rank == 0:
        listener, address, notes = _listen(master, [theirs["master"] for theirs in told])
        door = Door(listener, secret(), range(1, control.size))
        _gather(control, {"address": address, "port": listener.getsockname()[1], "token": door.token})
        _watch = Monitor(me, limits, peers[1:], door, notes)
    else:
        way = _gather(control, None)[0]
        line, heard = join(way["address"] or master, way["port"], control.rank, way["token"])
        _watch = Beacon(me, limits, peers, line, heard, speaks=local_rank == 0 or control.rank == 1)
    _watch.thread.start()
    return _watch


def _listen(master: str, views: list[list[str]]) -> tuple[socket.socket, str | None, list[str]]:
    """Rank 0's listener, the address that all ranks connect to (None: each to its MASTER_ADDR), and notes."""
    listener, address = listen(common_addresses(views))
    notes = [allow_connections(len(views))]
    if address is None:  # something in front of this host, or hosts that do not agree on what the name means
        notes.append(
            f"warning: watchdog: MASTER_ADDR: {master}: stands for no address of {socket.gethostname()} that all ranks know: "
            f"rank 0 listens on all interfaces, port {listener.getsockname()[1]}"
        )
    return listener, address, [note for note in notes if note is not None]


def _gather(control: Control, value: Any) -> list[Any]:
    """Every rank's JSON value, on every rank."""
    return [json.loads(payload) for payload in control.gather(json.dumps(value).encode())]


def current() -> Watch | None:
    """The watchdog of this process, if it has one."""
    return _watch
