"""Address: by which of its addresses a host is reached by the others.

On Debian and its kin a host's own name means 127.0.1.1 to itself. Whoever asks the resolver "who am I" and passes the answer on
to another host gets a world that never meets; gloo asks exactly that.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]

from fedmoe_ds.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI

_KNOCK_S = 5.0
_ELSEWHERE = "203.0.113.1"
"""Of nobody (RFC 5737). Nothing is ever sent there: the route says which interface leads out."""


def choose_rendezvous(world: MPI.Comm, local: MPI.Comm) -> tuple[str, int]:
    """Where all ranks of an MPI world meet: an address of rank 0's host, and a TCP port.

    Rank 0's MASTER_ADDR and MASTER_PORT are taken as they are. Otherwise every other host tries to connect to each
    address of rank 0's host, and the first that all of them reach is taken.

    Args:
        world: all ranks.
        local: those on this host.
    Raises:
        UserError: hosts do not reach rank 0's; on all ranks.
    """
    from fedmoe_ds.distributed.mpi import gather_json  # numpy: only where there is MPI

    env = os.environ
    # The port stays bound until all hosts have tried it: no other process of this host can be given it meanwhile.
    with socket.socket() as listener:
        listener.bind(("", 0))
        given = env.get("MASTER_ADDR") or ("127.0.0.1" if local.size == world.size else None)
        if given is None:
            listener.listen(4096)  # the kernel completes connections by itself: nobody has to accept them
        port = listener.getsockname()[1]
        offer = {"given": given, "own": own_addresses(), "port": port, "host": socket.gethostname()}
        offer |= {"meeting": int(env.get("MASTER_PORT") or port)}
        theirs = gather_json(world, offer)[0]
        address = theirs["given"] or _reached_by_all(world, local, theirs["own"], theirs["port"], theirs["host"])
    return address, theirs["meeting"]


def _reached_by_all(world: MPI.Comm, local: MPI.Comm, addresses: list[str], port: int, host: str) -> str:
    from fedmoe_ds.distributed.mpi import gather_json

    beside_rank_0 = any(gather_json(local, world.rank == 0))
    # One rank per host tries for all. Rank 0's own host does not: it reaches each of its addresses, which says nothing.
    knocks = local.rank == 0 and not beside_rank_0
    reached = [not knocks or answers(address, port) for address in addresses]
    common = [all(answers) for answers in zip(*gather_json(world, reached), strict=True)]
    if not any(common):
        tried = ", ".join(addresses) or "none but loopback"
        raise UserError(
            f"mpirun: {host}: no address of rank 0's host is reached by all other hosts (tried {tried}); check the firewall "
            "between them, or name one: mpirun -x MASTER_ADDR=..."
        )
    return addresses[common.index(True)]


def answers(address: str, port: int) -> bool:
    """Whether somebody listens there; after `_KNOCK_S` nobody does."""
    try:
        with socket.create_connection((address, port), timeout=_KNOCK_S):
            return True
    except OSError:
        return False


def own_addresses() -> list[str]:
    """IPv4 addresses of this host but loopback; the one that its name stands for comes first."""
    found = list(_interfaces())
    named = _resolve(socket.gethostname())
    return sorted(found, key=lambda address: address != named)  # stable: else in the order of interfaces


def set_gloo_interface() -> None:
    """Tell gloo its interface (GLOO_SOCKET_IFNAME) where the host's name would send it to loopback and ranks are elsewhere.

    The interface is the one that leads to MASTER_ADDR; on MASTER_ADDR's own host the one of the default route, or the first.
    """
    master = os.environ.get("MASTER_ADDR", "localhost")
    # Exported without a value it names none: gloo takes it for unset, too.
    if os.environ.get("GLOO_SOCKET_IFNAME") or master == "localhost" or is_loopback(master):
        return
    named = _resolve(socket.gethostname())
    if named is not None and not is_loopback(named):
        return
    interfaces = _interfaces()
    ways = [_source(master), _source(_ELSEWHERE), *interfaces]
    chosen = next((interfaces[way] for way in ways if way in interfaces), None)
    if chosen is not None:  # a host without any other interface than loopback is the only one of its job
        os.environ["GLOO_SOCKET_IFNAME"] = chosen


def resolved(name: str) -> list[str]:
    """All addresses that a name, or an address, stands for on this host, in the resolver's order; none where nobody knows it.

    Left out is what no other host can use as it stands: 0.0.0.0 and ::, and link-local IPv6, which needs an interface's name.
    """
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter: no such name can be
        return []
    texts = {str(entry[4][0]): None for entry in found}  # keys of a dict: no repetitions, in the same order
    addresses = [(text, ipaddress.ip_address(text)) for text in texts]
    return [text for text, ip in addresses if not (ip.is_unspecified or (ip.version == 6 and ip.is_link_local))]


def meant_addresses(views: list[list[str]]) -> list[str]:
    """All addresses by which ranks may reach the host of rank 0.

    Only on that host itself can a name mean loopback: a rank that knows nothing else is on it, and reaches each of its
    addresses. So loopback is among them only where all ranks are on one host.

    Args:
        views: what MASTER_ADDR stands for on every rank's host (`resolved`).
    """
    known = {address: None for view in views for address in view}
    return [address for address in known if not is_loopback(address)] or list(known)


def is_reached(view: list[str], addresses: list[str]) -> bool:
    """Whether a rank that knows rank 0's host by `view` reaches one of these addresses of it."""
    return bool(addresses) and (all(is_loopback(known) for known in view) or any(known in addresses for known in view))


def is_loopback(address: str) -> bool:
    """Whether this is the text of a loopback address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def ipv4_entries() -> Iterator[tuple[str, Any]]:
    """Interfaces that are up, by name, each with psutil's word on one of its IPv4 addresses; loopback left out."""
    up = {name for name, facts in psutil.net_if_stats().items() if facts.isup}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if name in up and entry.family == socket.AF_INET and not is_loopback(entry.address):
                yield name, entry


def _interfaces() -> dict[str, str]:
    """Names of interfaces by IPv4 address."""
    return {entry.address: name for name, entry in ipv4_entries()}


def _resolve(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _source(target: str) -> str | None:
    """The own address from which packets to `target` leave. Connecting a datagram socket sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
