"""An expert that a client may not use gets none of its rows, and its adapter there gets exactly zero gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from federations import alone, build, make_config, write_inputs

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.hooks import LocalTrainingHooks
from fedmoe_ds.federation.schedule import schedule


@pytest.mark.parametrize("mode", ["bitwise", "fast"])
def test_masked_experts_are_not_used(tmp_path: Path, mode: str) -> None:
    write_inputs(tmp_path)
    parts, journal = build(make_config(tmp_path, mode, {"execution": {"reproducible": mode}}), *alone())
    journal.close()
    layers, experts = parts.counts_shape
    even_LE = np.tile(np.arange(experts) % 2 == 0, (layers, 1))

    def assign(client: Client, round_index: int) -> Assignment:
        return Assignment(client.cap, allowed_LE=even_LE if client.index % 2 else None)

    parts.trainer.hooks = LocalTrainingHooks(assign=assign)
    ((wave,),) = schedule(parts.clients, parts.spec.cost, parts.config.local, 1, 1, None)
    trained = parts.trainer.train(wave, 1, parts.state.adapters, parts.state.personal.state, parts.data.train)
    bank = parts.execution.bank
    for local, report in trained:
        used_E = report.counts_LE.sum(0) > 0
        for name, spec in bank.specs.items():
            if not spec.expert:
                continue
            moved = local.value(spec) != parts.state.adapters.client(name, 0)
            moved_E = moved.transpose(0, 1).flatten(1).any(1).numpy()
            assert not (moved_E & ~used_E).any(), (report.client.name, name)
        if report.client.index % 2:
            assert not used_E[1::2].any() and used_E[::2].any()
        else:
            assert used_E[1::2].any()
    assert torch.isfinite(bank.values["experts.down.lora_B"]).all()
