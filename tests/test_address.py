"""Address: a host whose own name means loopback, as on Debian, tells others an address that reaches it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from fedmoe_ds import address

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
    address.lead_gloo_out()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == host.told


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


def resolved(named: str | None) -> str:
    if named is None:
        raise OSError("unknown")
    return named
