"""Address: a host whose own name means loopback, as on Debian, tells others an address that reaches it."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import pytest
from every import every

from fedmoe_ds.distributed import address

OUT, FABRIC = "192.0.2.7", "198.51.100.7"
INTERFACES = {OUT: "eth0", FABRIC: "ib0"}
OTHER = "198.51.100.9"


@dataclass(frozen=True)
class Host:
    """What a host's resolver, routes and interfaces say; `told` is what gloo has to be told when MASTER_ADDR is `master`."""

    named: str | None
    master: str
    told: str | None
    interfaces: tuple[str, ...] = (OUT, FABRIC)
    route: str | None = FABRIC


HOSTS = {
    "Debian's name, another host's master": Host("127.0.1.1", OTHER, "ib0"),
    "Debian's name, its own master": Host("127.0.1.1", OUT, "eth0", route=OUT),
    "Debian's name, master by name": Host("127.0.1.1", "node-0", "ib0"),
    "Debian's name, no route to the master": Host("127.0.1.1", OTHER, "eth0", route=None),
    "Debian's name, a route from loopback": Host("127.0.1.1", OTHER, "eth0", route="127.0.0.1"),
    "localhost": Host("127.0.0.1", OTHER, "ib0"),
    "a name that nobody knows": Host(None, OTHER, "ib0"),
    "a name that others reach": Host(OUT, OTHER, None),
    "one host": Host("127.0.1.1", "localhost", None),
    "one host by address": Host("127.0.1.1", "127.0.0.1", None),
    "one host by Debian's address": Host("127.0.1.1", "127.0.1.1", None),
    "nothing but loopback": Host("127.0.1.1", OTHER, None, (), None),
}


@pytest.mark.parametrize("case", HOSTS)
def test_gloo_is_led_out(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = HOSTS[case]
    monkeypatch.setattr("socket.gethostbyname", lambda name: resolved(host.named))
    monkeypatch.setattr(address, "_interfaces", lambda: {found: INTERFACES[found] for found in host.interfaces})
    monkeypatch.setattr(address, "_source", lambda target: host.route if target == host.master else None)
    monkeypatch.setenv("MASTER_ADDR", host.master)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is as before when the patch is undone
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    address.set_gloo_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == host.told


def test_exported_without_a_value_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo takes it so, and would go by the host's name."""
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setattr(address, "_interfaces", lambda: {OUT: "eth0"})
    monkeypatch.setattr(address, "_source", lambda target: OUT)
    monkeypatch.setenv("MASTER_ADDR", OTHER)
    for given, kept in (("", "eth0"), ("ib9", "ib9")):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
        address.set_gloo_interface()
        assert os.environ["GLOO_SOCKET_IFNAME"] == kept


@pytest.mark.parametrize(
    ("named", "offered"),
    [("127.0.1.1", [OUT, FABRIC]), (None, [OUT, FABRIC]), (FABRIC, [FABRIC, OUT]), (OUT, [OUT, FABRIC])],
)
def test_no_loopback_address_is_offered(named: str | None, offered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostbyname", lambda name: resolved(named))
    monkeypatch.setattr(address, "_interfaces", lambda: INTERFACES)
    assert address.own_addresses() == offered


def test_interfaces_leave_loopback_out() -> None:
    assert not any(address.is_loopback(found) for found in address._interfaces())
    loopback = {"127.0.0.1": True, "127.0.1.1": True, "127.255.0.9": True, "::1": True, "10.0.0.1": False, "localhost": False}
    assert {text: address.is_loopback(text) for text in loopback} == loopback


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("::1", ["::1"]),
        (OUT, [OUT]),
        ("2001:db8::7", ["2001:db8::7"]),
        ("0.0.0.0", []),  # noqa: S104 - a word that is resolved
        ("::", []),
        ("fe80::1", []),
        ("", []),
        ("a" * 70 + ".x", []),
    ],
)
def test_what_a_name_stands_for(name: str, expected: list[str]) -> None:
    assert address.resolved(name) == expected


def test_a_name_that_nobody_knows_stands_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: resolved(None))
    assert address.resolved("node0") == []


V6 = "2001:db8::7"
VIEWS: dict[str, tuple[list[list[str]], list[str]]] = {
    "one host": ([["127.0.0.1"], ["127.0.0.1"]], ["127.0.0.1"]),
    "one host, both families": ([["::1", "127.0.0.1"], ["::1", "127.0.0.1"]], ["::1", "127.0.0.1"]),
    "an address": ([[OUT], [OUT], [OUT]], [OUT]),
    "Debian's name": ([["127.0.1.1"], ["127.0.1.1"], [OUT], [OUT]], [OUT]),
    "an address here, loopback there": ([[OUT], ["127.0.0.1"]], [OUT]),
    "two networks": ([["127.0.1.1"], [OUT, FABRIC], [FABRIC, OUT]], [OUT, FABRIC]),
    "each host its own": ([["127.0.1.1"], [OUT], [FABRIC], [V6]], [OUT, FABRIC, V6]),
    "only IPv6": ([["::1"], [V6]], [V6]),
    "rank 0 knows nothing": ([[], [OUT]], [OUT]),
    "nobody knows anything": ([[], []], []),
}


@pytest.mark.parametrize("case", VIEWS)
def test_the_addresses_that_ranks_may_use(case: str) -> None:
    views, expected = VIEWS[case]
    assert address.meant_addresses(views) == expected
    assert every(address.is_reached(view, expected) for view in views) == bool(expected)
    for missing in expected:  # as when an address is not rank 0's
        left = [one for one in expected if one != missing]
        assert every(address.is_reached(view, left) for view in views) == (
            bool(left) and all(view != [missing] or address.is_loopback(missing) for view in views)
        )


class Buffers:
    """A communicator of threads that carries buffers, and nothing else: a call of mpi4py that pickles does not exist."""

    def __init__(self, rank: int, shared: tuple[threading.Barrier, list[Any]]) -> None:
        self.rank, self.shared, self.size = rank, shared, shared[0].parties

    def Iallgather(self, mine: Any, theirs: Any) -> Any:
        return self._exchange(bytes(mine), lambda parts: theirs.view("u1").__setitem__(slice(None), list(b"".join(parts))))

    def Iallgatherv(self, mine: Any, theirs: Any) -> Any:
        return self._exchange(bytes(mine), lambda parts: theirs[0].__setitem__(slice(None), list(b"".join(parts))))

    def _exchange(self, mine: bytes, take: Any) -> Any:
        barrier, slots = self.shared
        slots[self.rank] = mine
        barrier.wait(10.0)
        take(list(slots))
        barrier.wait(10.0)
        return type("Done", (), {"Test": staticmethod(lambda: True)})()


@pytest.mark.parametrize(
    ("hosts", "master", "expected"),
    [((3,), None, "127.0.0.1"), ((2, 1), None, "127.0.0.1"), ((1, 1, 1), None, "127.0.0.1"), ((1, 2), OUT, OUT)],
)
def test_mpi_ranks_meet_without_pickle(
    hosts: tuple[int, ...], master: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks are threads, on hosts of so many ranks."""
    monkeypatch.setattr(address, "own_addresses", lambda: ["127.0.0.1"])
    for name, value in (("MASTER_ADDR", master), ("MASTER_PORT", None)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    size = sum(hosts)
    world: tuple[threading.Barrier, list[Any]] = (threading.Barrier(size), [b""] * size)
    locals_: list[Buffers] = []
    for count in hosts:
        shared: tuple[threading.Barrier, list[Any]] = (threading.Barrier(count), [b""] * count)
        locals_ += [Buffers(rank, shared) for rank in range(count)]
    found: list[Any] = [None] * size

    def meet(rank: int) -> None:
        found[rank] = address.choose_rendezvous(Buffers(rank, world), locals_[rank])  # type: ignore[arg-type]

    threads = [threading.Thread(target=meet, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert len(set(found)) == 1 and found[0] is not None
    assert found[0][0] == expected and found[0][1] > 1023


def resolved(named: str | None) -> str:
    if named is None:
        raise OSError("unknown")
    return named
