"""Interfaces: over which network of their hosts ranks talk to each other, the same for gloo and for NCCL's sockets.

A host of a cluster has a network for management and often a faster one that connects the compute nodes: InfiniBand (ib0),
Slingshot (hsn0). gloo takes the interface of the host's name, which is that of management. One host cannot know whether the
others have what it has, so all tell what they are on, and rank 0 decides for all of them.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch.distributed.distributed_c10d import Store

from fedmoe_ds.distributed.address import ipv4_entries, set_gloo_interface
from fedmoe_ds.distributed.meeting import decide
from fedmoe_ds.errors import UserError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
FABRICS = ("hsn", "ib")
"""How names of interfaces begin that connect compute nodes: HPE Slingshot; InfiniBand and Omni-Path carrying IP."""


@dataclass(frozen=True)
class HostView:
    """What one rank sees of its host.

    Attributes:
        networks: by interface that is up, the IPv4 networks that it is on: `10.1.0.0/16`; loopback left out.
        given: what the environment says for gloo; `given_nccl` for NCCL. None for nothing, and for no value.
    """

    host: str
    networks: dict[str, list[str]]
    given: str | None = None
    given_nccl: str | None = None

    @classmethod
    def here(cls) -> HostView:
        networks: dict[str, list[str]] = {}
        for name, entry in ipv4_entries():
            if entry.netmask:
                network = ipaddress.ip_network(f"{entry.address}/{entry.netmask}", strict=False)
                networks.setdefault(name, []).append(str(network))
        return cls(socket.gethostname(), networks, _given(GLOO), _given(NCCL))


def use_common_network(store: Store, rank: int, world_size: int, wanted: str | None) -> str | None:
    """Tell gloo and NCCL their interfaces; what the environment says already is kept. Every rank calls it.

    Args:
        store: that all ranks have met at.
        wanted: `topology.interface`; None: a fabric that all hosts are on, else what leads to the others.
    Returns:
        A line for the user; None where all ranks are on one host.

    Raises:
        UserError: a host has no interface of the name that is wanted, or the environment says another one; on all ranks.
    """
    here = HostView.here()
    told = decide(store, rank, world_size, asdict(here), lambda views: _choice([HostView(**view) for view in views], wanted))
    if not told["several"] and wanted is None:
        set_gloo_interface()
        return None
    networks = told["networks"]
    names = [wanted] if wanted is not None else _names(here.networks, networks)
    if not names:
        set_gloo_interface()
        return f"network: {_named(_given(GLOO))} for gloo; no fabric ({', '.join(FABRICS)}) connects all hosts"
    kept = {variable: _given(variable) for variable in (GLOO, NCCL)}
    os.environ[GLOO] = kept[GLOO] or names[0]
    # Exactly these: without the sign NCCL takes names for beginnings of names.
    os.environ[NCCL] = kept[NCCL] or f"={','.join(names)}"
    which = f"network: {os.environ[GLOO]} for gloo, {os.environ[NCCL].lstrip('=')} for NCCL"
    return f"{which}{f' ({networks[0]})' if networks else ''}{_kept(kept)}"


def _choice(views: Sequence[HostView], wanted: str | None) -> dict[str, object]:
    """Whether there are several hosts, and the networks of fabrics that all of them are on, the best first."""
    if wanted is not None:
        for view in views:
            _check(view, wanted)
    several = len({view.host for view in views}) > 1
    return {"several": several, "networks": _common_fabrics(views) if several and wanted is None else []}


def _check(view: HostView, wanted: str) -> None:
    """Raise UserError where a host lacks the interface that is wanted, or its environment says another one."""
    if wanted not in view.networks:
        known = ", ".join(sorted(view.networks)) or "none but loopback"
        raise UserError(
            f"topology.interface: {wanted}: {view.host} has no such interface that is up with an IPv4 address; it has {known}"
        )
    for variable, given, alike in ((GLOO, view.given, [wanted]), (NCCL, view.given_nccl, [wanted, f"={wanted}"])):
        if given is not None and given not in alike:
            raise UserError(f"topology.interface: {wanted}: {variable} is {given} on {view.host}; unset it, or drop the key")


def _common_fabrics(views: Sequence[HostView]) -> list[str]:
    """Networks of fabrics that all hosts are on, in the order of the first one's interfaces."""
    first, *others = views
    shared = [
        network
        for name in sorted(first.networks, key=_rank_of)
        for network in first.networks[name]
        if _is_fabric(name) and all(_names(view.networks, [network]) for view in others)
    ]
    return list(dict.fromkeys(shared))


def _names(networks: dict[str, list[str]], common: Sequence[str]) -> list[str]:
    """Interfaces of fabrics on a host that are on one of these networks, in the order of the networks."""
    fabrics = sorted(filter(_is_fabric, networks), key=_rank_of)
    return list(dict.fromkeys(name for network in common for name in fabrics if network in networks[name]))


def _is_fabric(name: str) -> bool:
    return name.startswith(FABRICS)


def _rank_of(name: str) -> tuple[int, list[int], str]:
    """Order of interfaces: by kind, then as people count: ib2 before ib10."""
    kind = next((place for place, beginning in enumerate(FABRICS) if name.startswith(beginning)), len(FABRICS))
    return kind, [int(number) for number in re.findall(r"\d+", name)], name


def _given(variable: str) -> str | None:
    """Of the environment; exported without a value it says nothing."""
    return os.environ.get(variable) or None


def _named(interface: str | None) -> str:
    return interface or "the interface of the host's name"


def _kept(before: dict[str, str | None]) -> str:
    kept = [name for name, value in before.items() if value is not None]
    return f"; {' and '.join(kept)} from the environment" if kept else ""
