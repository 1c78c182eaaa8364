"""Finite: one number out of bounds leaves its client out, and no other."""

from __future__ import annotations

import math

import pytest
import torch

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
