"""What clients keep for themselves, in a world of many clusters: what one rank does and sends when all look at all of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from fedmoe_ds.checkpoint.client_homes import Homes
from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.distributed.control import Alone
from fedmoe_ds.model.adapter_bank import BlockSpec

NAME = "homes"
X = "clusters"
POINTS = (2, 32, 1024)
WALL = "an evaluation of own models brings every row to every rank once; a digest brings them to the first cluster alone"
_CLIENTS = 16_384
_SPEC = BlockSpec("attention.q_proj.lora_B", (0,), (8, 4), personal=True)


@dataclass(frozen=True)
class _Alone(Homes):
    """A rank whose peers send zeros; counts the rows that it gives and gets, and messages."""

    counts: dict[str, int] = field(default_factory=lambda: {"given": 0, "received": 0, "messages": 0})

    def _count(self, given: int, received: int) -> None:
        for name, count in (("given", given), ("received", received), ("messages", 1)):
            self.counts[name] += count

    def _gather(self, part_NW: Tensor) -> Tensor:
        self._count(len(part_NW), self.clusters * len(part_NW))
        return part_NW.new_zeros(self.clusters, *part_NW.shape)

    def _broadcast(self, rows_NW: Tensor, home: int) -> Tensor:
        self._count(len(rows_NW) if home == self.cluster else 0, len(rows_NW))
        return rows_NW

    def _exchange(self, rows_NW: Tensor, receive: list[int], send: list[int]) -> Tensor:
        self._count(sum(send), sum(receive))
        return rows_NW.new_zeros(sum(receive), rows_NW.shape[1])


def measure(x: int) -> dict[str, float]:
    """Of 16 384 clients who all have a row, as a rank of the last of x clusters: seconds of all, rows given and received and
    messages of a mean over all of them, of a digest, and of one client's own model."""
    found: dict[str, float] = {}
    homes = _Alone(clusters=x, cluster=x - 1)
    personal = Personal([_SPEC], 1, _CLIENTS, homes=homes)
    for index in filter(homes.is_here, range(_CLIENTS)):
        personal.store(index, _SPEC.name, torch.tensor(float(index)))
    nobody: list[list[int]] = [[], []]
    personal.share(cast(Any, SimpleNamespace(gather=lambda mine: [nobody] * (x - 1) + [mine])), Alone())
    personal.agree(cast(Any, SimpleNamespace(gather=lambda mine: [list(range(_CLIENTS))])))
    actions: dict[str, Callable[[], object]] = {
        "mean": lambda: personal.means(range(_CLIENTS), [_SPEC.name]),
        "digest": lambda: personal.hashes([_SPEC.name]),
        "one": lambda: list(personal.visit([0], [_SPEC.name])),
    }
    began = time.perf_counter()
    for name, action in actions.items():
        homes.counts.update(dict.fromkeys(homes.counts, 0))
        action()
        found |= {f"{name}_{what}": float(count) for what, count in homes.counts.items()}
    return {"seconds": time.perf_counter() - began, **found}
