"""Start of the watchdogs: no job hangs because one of its ranks is gone.

Every rank keeps a connection to rank 0 and tells it once in a while what it is doing (`activity`); rank 0 tells the others that
it lives. A connection that ends without an announced exit is a rank that died; one that is silent for `silence_s` a rank that
was stopped, hangs in a kernel, or lost its network; a rank that waits in one collective for longer than `timeout_s` waits for
somebody who will not come. In each case rank 0 says so in one line, tells everybody, and the whole job ends with EXIT_LOST. If
rank 0 itself is gone, every host's first rank says that.

The threads (`main`, `worker`) only read sockets and `activity`, so they keep working while the main thread waits in a
collective. Other programs that open connections get no further than the `listener`; ranks and rank 0 prove themselves to each
other in the `handshake`. The token for that travels to the ranks over `control.gather`, that is gloo or MPI, as port and
address do: whoever can read or change the job's own packets is trusted.
"""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

import torch

from fedmoe_ds.distributed.address import is_reached, meant_addresses, resolved
from fedmoe_ds.distributed.watchdog.handshake import join, secret
from fedmoe_ds.distributed.watchdog.listener import Listener, listen, listen_everywhere
from fedmoe_ds.distributed.watchdog.main import MainWatchdog
from fedmoe_ds.distributed.watchdog.rank_health import Limits, Peer, Process
from fedmoe_ds.distributed.watchdog.watchdog import Watchdog
from fedmoe_ds.distributed.watchdog.worker import WorkerWatchdog

if TYPE_CHECKING:
    from fedmoe_ds.distributed.control import Control

_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - names what must be told, binds nothing
_watch: Watchdog | None = None


def start_watchdog(control: Control, limits: Limits, local_rank: int, device: torch.device) -> Watchdog | None:
    """Start this process's watchdog, together with all ranks; None in a world of one.

    Args:
        control: the communicator of the whole world.
        local_rank: the first rank of every host speaks when rank 0 cannot.
        device: of this rank.
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
        listeners, notes = _listen(master, [theirs["master"] for theirs in told])
        rank_listener = Listener(listeners, secret(), range(1, control.size))
        _gather(control, {"places": [listener.getsockname()[:2] for listener in listeners], "token": rank_listener.token})
        watch: Watchdog = MainWatchdog(me, limits, peers[1:], rank_listener, notes)
    else:
        # The same gather as rank 0's above: it is collective, so every rank takes part, with or without something to say.
        way = _gather(control, None)[0]
        view = told[control.rank]["master"]
        # An address of all interfaces can be bound, not connected to.
        places = [(master if address in _EVERYWHERE else address, port) for address, port in way["places"]]
        places.sort(key=lambda place: place[0] not in view)  # first what this host knows
        line, heard = join(places, control.rank, way["token"])
        # One line per host is enough if rank 0 is lost. On rank 0's own host local rank 0 is lost with it, so rank 1 speaks.
        watch = WorkerWatchdog(me, limits, peers, line, heard, speaks=local_rank == 0 or control.rank == 1)
    watch.device = device
    watch.thread.start()
    # Kept for the process at last, and never read back here: ranks that are threads of one process share the name.
    _watch = watch
    return watch


def _listen(master: str, views: list[list[str]]) -> tuple[list[socket.socket], list[str]]:
    """Rank 0's listeners, on the addresses that MASTER_ADDR stands for on the ranks' hosts (`views`), and notes."""
    notes = list[str]()
    listeners = listen(meant_addresses(views))
    own = [listener.getsockname()[0] for listener in listeners]
    if not all(is_reached(view, own) for view in views):  # ranks know what is in front of this host
        for listener in listeners:
            listener.close()
        listeners = [listen_everywhere()]
        notes.append(
            f"warning: watchdog: MASTER_ADDR: {master}: not all ranks know an address of {socket.gethostname()} by it: "
            f"rank 0 listens on all interfaces, port {listeners[0].getsockname()[1]}"
        )
    return listeners, notes


def _gather(control: Control, value: Any) -> list[Any]:
    """Every rank's JSON value, on every rank."""
    return [json.loads(payload) for payload in control.gather(json.dumps(value).encode())]


def stop_watchdog(code: int, text: str) -> None:
    """Tell the others that this rank has done its part, and watch them no more, while its process goes on.

    Args:
        code, text: as of a process that ends (`Watchdog.announce_exit`): a failure with a reason ends the job for all.
    """
    global _watch
    watch, _watch = _watch, None
    if watch is not None:
        watch.announce_exit(code, text)
        watch.stop()


def current_watchdog() -> Watchdog | None:
    """The watchdog of this process, if it has one."""
    return _watch
