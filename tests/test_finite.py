"""Finite: one number out of bounds leaves its client out, and no other."""

from __future__ import annotations

import math

import pytest
import torch

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.update import LARGEST_VALUE, Gatherer
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.dispatcher import Pool

CLIENTS = 3
BLOCKS = [
    BlockSpec("experts.up.lora_A", (0, 1), (4, 5), expert=True),
    BlockSpec("attention.q.lora_B", (0, 1), (6, 4)),
    BlockSpec("rescaler", (-1,), (1,), personal=True),
]


def finite(bank: Bank, losses: dict[int, list[float]] | None = None) -> list[bool]:
    return Gatherer(Pool(None, 1, 2, CLIENTS, merge=True), torch.device("cpu")).finite(bank, losses or {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, LARGEST_VALUE, -LARGEST_VALUE])
@pytest.mark.parametrize("block", [spec.name for spec in BLOCKS])
def test_one_number_is_enough(block: str, value: float) -> None:
    bank = Bank(BLOCKS, 2, CLIENTS)
    assert finite(bank) == [True] * CLIENTS
    part = bank.client(block, 1)
    part[(-1,) * part.dim()] = value
    assert finite(bank) == [True, False, True]


def test_a_loss_counts_and_large_numbers_within_bounds_do_not() -> None:
    bank = Bank(BLOCKS, 2, CLIENTS)
    for values in bank.values.values():
        values.fill_(-0.999 * LARGEST_VALUE)
    assert finite(bank, {0: [1.0, 2.0], 2: [1.0, math.nan]}) == [True, True, False]


def test_measures_see_what_the_method_lets_a_client_start_from() -> None:
    """With experts and without: a change is counted from there, and not from what everybody receives."""
    specs = [BlockSpec("head.weight", (-1,), (2,)), BlockSpec("experts.w", (0,), (2,), expert=True)]
    bank, start = Bank(specs, 2, CLIENTS), Bank(specs, 2, 1, with_grad=False)
    starts = {spec.name: torch.full_like(start.client(spec.name, 0), 2.0) for spec in specs}
    view = ClientView(Client(0, "c", 1, 1, 1, 1), Assignment(1), bank, start, {True: 1, False: 1}, {}, starts=starts)
    for spec in specs:
        view.value(spec).fill_(5.0)
    gatherer = Gatherer(Pool(None, 1, 2, CLIENTS, merge=True), torch.device("cpu"))
    (found,) = gatherer.measures([view], lambda own: {s.name: (own.value(s) - own.received(s)).sum(-1) for s in own.blocks()})
    assert found["head.weight"].tolist() == [6.0] and found["experts.w"].tolist() == [[6.0, 6.0]]
