"""Copies of a bank's values in the rows' type: made again whenever values change, whoever writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from federations import make_config, run_alone, write_inputs

from fedmoe_ds.clients.fused_step import ClientStep
from fedmoe_ds.clients.optimizer import ClientOptimizer, Turn
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.kernels import rows
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

NAME, HALF = "experts.down.lora_A", torch.bfloat16


def bank() -> Bank:
    made = Bank([BlockSpec(NAME, (1, 2), (8, 16), expert=True)], experts=3, clients=2)
    made.values[NAME].copy_(torch.randn(2, 3, 2, 8, 16, generator=torch.Generator().manual_seed(1)))
    return made


def fresh(made: Bank) -> bool:
    copies = [made.value_in(HALF, NAME, layer) for layer in (1, 2)]
    return all(torch.equal(copy, made.value(NAME, layer).to(HALF)) for copy, layer in zip(copies, (1, 2), strict=True))


def test_copies_follow_what_torch_writes() -> None:
    made = bank()
    assert fresh(made) and made.value_in(torch.float32, NAME, 1).data_ptr() == made.value(NAME, 1).data_ptr()
    first = made.value_in(HALF, NAME, 2)
    assert first.data_ptr() == made.value_in(HALF, NAME, 2).data_ptr(), "kept while nothing changes"
    for write in (
        lambda: made.client(NAME, 1).mul_(2.0),
        lambda: made.broadcast(NAME)[0].copy_(torch.ones(2, 3, 8, 16)),
        lambda: made.value(NAME, 2)[1, 0].zero_(),
    ):
        write()
        assert fresh(made)


def test_copies_follow_the_optimizers_kernels() -> None:
    """These take addresses: torch does not know that anything was written."""
    made = bank()
    optimizer = ClientOptimizer(made, LocalConfig())
    made.value_in(HALF, NAME, 1)
    made.grads[NAME].fill_(1.0)
    assert rows.serves(made.values[NAME], made.grads[NAME])
    optimizer.take(NAME, [Turn(0, 1, 0.1, 1.0)])
    assert fresh(made)
    made.grads[NAME].fill_(1.0)
    optimizer.step_all([ClientStep({True: 1}, 1, 0.1, (1, 0))])
    assert fresh(made)


def test_a_training_step_is_noted(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Bank] = []
    monkeypatch.setattr(Bank, "note_step", lambda bank: steps.append(bank))
    write_inputs(tmp_path)
    run_alone(make_config(tmp_path, "noted", {"federation": {"rounds": 1}}))
    assert steps
