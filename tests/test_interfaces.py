"""Interfaces: all hosts on one network, a fabric before that of management, and the same word to gloo and NCCL."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import TCPStore

from fedmoe_ds.distributed import interfaces, meeting
from fedmoe_ds.distributed.interfaces import GLOO, NCCL, HostView, use_common_network
from fedmoe_ds.errors import UserError

ETH, IB, HSN = "10.0.0.0/16", "10.1.0.0/16", "10.2.0.0/16"
Networks = dict[str, list[str]]


@dataclass(frozen=True)
class Job:
    """What hosts have, and what rank 0's host is told."""

    hosts: list[Networks]
    gloo: str | None
    nccl: str | None = None
    wanted: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


JOBS = {
    "management alone": Job([{"eth0": [ETH]}] * 2, None),
    "InfiniBand": Job([{"eth0": [ETH], "ib0": [IB]}] * 3, "ib0", "=ib0"),
    "Slingshot before InfiniBand": Job([{"ib0": [IB], "hsn0": [HSN]}] * 2, "hsn0", "=hsn0,ib0"),
    "two rails of one network": Job([{"hsn10": [HSN], "hsn2": [HSN]}] * 2, "hsn2", "=hsn2,hsn10"),
    "two rails of two networks": Job([{"hsn0": [HSN], "hsn1": [IB]}] * 2, "hsn0", "=hsn0,hsn1"),
    "other names on other hosts": Job([{"ibp1s0": [IB]}, {"ib0": [IB]}], "ibp1s0", "=ibp1s0"),
    "one host lacks it": Job([{"eth0": [ETH], "ib0": [IB]}, {"eth0": [ETH]}], None),
    "two fabrics that do not meet": Job([{"eth0": [ETH], "ib0": [IB]}, {"eth0": [ETH], "ib0": [HSN]}], None),
    "one rail is down somewhere": Job([{"hsn0": [HSN], "hsn1": [IB]}, {"hsn1": [IB]}], "hsn1", "=hsn1"),
    "docker's bridge is on every host": Job([{"docker0": ["172.17.0.0/16"], "eth0": [ETH]}] * 2, None),
    "one host": Job([{"eth0": [ETH], "ib0": [IB]}], None),
    "the environment is kept": Job([{"ib0": [IB]}] * 2, "eth0", "=ib0", environment={GLOO: "eth0"}),
    "both are kept": Job([{"ib0": [IB]}] * 2, "eth0", "eth1", environment={GLOO: "eth0", NCCL: "eth1"}),
    "exported without a value": Job([{"ib0": [IB]}] * 2, "ib0", "=ib0", environment={GLOO: "", NCCL: ""}),
    "named, and exported without a value": Job([{"eth0": [ETH]}] * 2, "eth0", "=eth0", "eth0", {GLOO: "", NCCL: ""}),
    "named in the configuration": Job([{"eth0": [ETH], "ib0": [IB]}] * 2, "eth0", "=eth0", "eth0"),
    "named, on one host": Job([{"eth0": [ETH]}], "eth0", "=eth0", "eth0"),
    "named and in the environment": Job([{"eth0": [ETH]}] * 2, "eth0", "=eth0", "eth0", {GLOO: "eth0"}),
    "named and NCCL's in the environment": Job([{"eth0": [ETH]}] * 2, "eth0", "=eth0", "eth0", {NCCL: "=eth0"}),
    "named, a beginning of names for NCCL": Job([{"eth0": [ETH]}] * 2, "eth0", "eth0", "eth0", {NCCL: "eth0"}),
}


def told(monkeypatch: pytest.MonkeyPatch, job: Job) -> str | None:
    """What rank 0 of a rank per host says; its environment is this process's."""
    for variable in (GLOO, NCCL):
        monkeypatch.setenv(variable, "")  # so that it is as before when the patch is undone
        monkeypatch.delenv(variable)
    for variable, value in job.environment.items():
        monkeypatch.setenv(variable, value)
    here = HostView.here()
    views = [HostView(f"n{place}", networks, here.given, here.given_nccl) for place, networks in enumerate(job.hosts)]
    monkeypatch.setattr(interfaces, "decide", lambda store, rank, world, mine, decision: decision(list(map(vars, views))))
    monkeypatch.setattr(HostView, "here", lambda: views[0])
    monkeypatch.setattr(interfaces, "set_gloo_interface", lambda: None)
    store: Any = None
    return use_common_network(store, 0, len(views), job.wanted)


@pytest.mark.parametrize("case", JOBS)
def test_the_network_of_a_job(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = JOBS[case]
    line = told(monkeypatch, job)
    assert (os.environ.get(GLOO), os.environ.get(NCCL)) == (job.gloo, job.nccl)
    if line is None:
        assert len(job.hosts) == 1, "a user of several hosts is told"
    else:
        assert line.startswith(f"network: {job.gloo or 'the interface of the host'}") and "\n" not in line
        assert ("from the environment" in line) == any(job.environment.values())


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (
            Job([{"ib0": [IB]}, {"eth0": [ETH]}], None, wanted="ib0"),
            r"^topology\.interface: ib0: n1 has no such .*; it has eth0$",
        ),
        (Job([{}], None, wanted="ib0"), r"^topology\.interface: ib0: n0 .*; it has none but loopback$"),
        (
            Job([{"ib0": [IB]}] * 2, None, wanted="ib0", environment={GLOO: "eth0"}),
            r"^topology\.interface: ib0: GLOO_SOCKET_IFNAME is eth0 on n0; unset it, or drop the key$",
        ),
        *(
            (
                Job([{"ib0": [IB]}] * 2, None, wanted="ib0", environment={NCCL: value}),
                rf"^topology\.interface: ib0: NCCL_SOCKET_IFNAME is {re.escape(value)} on n0; unset it, or drop the key$",
            )
            for value in ("eth0", "=eth0,ib0", "^ib0")
        ),
    ],
)
def test_an_interface_that_cannot_be(job: Job, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=message):
        told(monkeypatch, job)


NAMES = st.sampled_from(["eth0", "ib0", "ib1", "hsn0", "docker0", "bond0"])
HOST = st.dictionaries(NAMES, st.lists(st.sampled_from([ETH, IB, HSN]), min_size=1, max_size=2), max_size=4)


@given(st.lists(HOST, min_size=2, max_size=5))
@settings(max_examples=200, deadline=None)
def test_every_host_is_on_the_network_that_is_chosen(hosts: list[Networks]) -> None:
    """By an interface of a fabric; and none is left out where there is one."""
    choice: Any = interfaces._choice([HostView(str(place), networks) for place, networks in enumerate(hosts)], None)
    fabrics = [{net for name, nets in host.items() if name.startswith(("ib", "hsn")) for net in nets} for host in hosts]
    assert set(choice["networks"]) == set.intersection(*fabrics)
    assert all(interfaces._names(host, choice["networks"]) for host in hosts) == bool(choice["networks"])


def test_here_are_networks_and_no_loopback() -> None:
    networks = [network for found in HostView.here().networks.values() for network in found]
    assert all("/" in network and not network.startswith("127.") for network in networks)


def test_all_ranks_hear_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a store: what rank 0 decides, and its refusal."""
    monkeypatch.setattr(meeting, "_meetings", iter([0] * 3 + [1] * 3))
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [server, *(TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(2))]

    def ask(decision: Any) -> list[str]:
        answers = [""] * 3

        def rank(number: int) -> None:
            try:
                answers[number] = str(meeting.decide(stores[number], number, 3, number, decision))
            except UserError as error:
                answers[number] = str(error)

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return answers

    def refuse(views: list[int]) -> None:
        raise UserError(f"x: {views}")

    assert ask(sum) == ["3"] * 3
    assert ask(refuse) == ["x: [0, 1, 2]"] * 3
