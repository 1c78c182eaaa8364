"""Packing systems: one wave of a workload, packed or not, with whole steps or with micro-batches of so many sequences.

Each runs in a worker process of its own. What it measures goes through the package's own trainer, in the default mode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedmoe_ds.bench.harness.inputs import load_bare
from fedmoe_ds.bench.harness.system import Clock
from fedmoe_ds.bench.packing.workload import PackingWorkload
from fedmoe_ds.clients.batches import Packing
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.local_training import WaveTrainer
from fedmoe_ds.config import AdapterConfig, Config, ExecutionConfig, LocalConfig, MethodConfig
from fedmoe_ds.distributed.runtime import keep_freed_memory
from fedmoe_ds.federation.run_spec import resolve_spec
from fedmoe_ds.machine import peak_mib
from fedmoe_ds.methods import method_for
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.batch import Batch, Rows
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.install import initial_bank, install
from fedmoe_ds.model.pass_context import Execution
from fedmoe_ds.model.per_client_attention import use_per_client_attention

PACKED, UNPACKED, WHOLE = "packed", "unpacked", "whole steps"


def system_name(packing: bool, micro: int | None) -> str:
    return f"{PACKED if packing else UNPACKED}, {WHOLE if micro is None else micro}"


def settings_of(name: str) -> tuple[bool, int | None]:
    """(packing, micro-batch size) of a system's name."""
    kind, _, micro = name.partition(", ")
    return kind == PACKED, None if micro == WHOLE else int(micro)


class CountingModel(AdaptedModel):
    """An adapted model that counts passes and their token rows, padding included."""

    counted: dict[str, int]

    def batch(self, rows: list[Rows]) -> Batch:
        batch = super().batch(rows)
        self.counted["passes"] += 1
        self.counted["rows"] += len(batch.valid_T)
        return batch


class PackedWave:
    """All clients in one wave."""

    def __init__(self, folder: Path, workload: PackingWorkload, packing: bool, micro: int | None) -> None:
        keep_freed_memory()  # as every training run does
        self.workload, device = workload, torch.device("cpu")
        foundation = load_bare(folder)
        adapters = AdapterConfig(rank=workload.rank)
        self.local = LocalConfig(batch_size=workload.samples, lr=workload.lr, clip=None)
        modes = ExecutionConfig(micro_batch_size=micro, packing=packing)
        method = MethodConfig(name="fedit")
        text = {"sequence_length": workload.length, "template": "instruction"}
        config = Config.model_validate(
            {
                "seed": workload.seed,
                "adapters": adapters,
                "local": self.local,
                "execution": modes,
                "method": method,
                "data": text,
            }
        )
        spec = resolve_spec(config, method_for(config), "cpu", foundation.outline)
        experts, clients = workload.shape.experts, workload.clients
        pool = Pool(None, 1, experts, clients, merge=spec.shares_passes)
        bank = Bank(spec.blocks, experts, clients, clients, device)
        execution = Execution(bank, pool, adapters.alpha / adapters.rank)
        install(foundation, adapters, execution)
        if (spec.bitwise and spec.shares_passes) or packing:  # as fedmoe_ds.federation.execution does
            use_per_client_attention(foundation.model, execution)
        self.start = initial_bank(foundation, spec.blocks, workload.seed, spec.expert_layout.held)
        self.model = CountingModel(foundation, execution, packing)
        # Set past the frozen dataclass: the counts belong to a measurement, not to the model.
        object.__setattr__(self.model, "counted", {"passes": 0, "rows": 0})
        cut = Packing(workload.length, workload.lengths) if packing else None
        layers = spec.expert_layout.layers
        self.trainer = WaveTrainer(self.model, layers, self.local, micro, workload.seed, packing=cut)

    def measure(self) -> dict[str, Any]:
        """One wave from fresh adapters."""
        load = self.workload
        count, top_k = load.steps * load.samples, load.shape.top_k
        data = [load.sequences(client) for client in range(load.clients)]
        clients = [
            Client(i, f"c{i}", top_k, count, count, one.target_count(), top_k, steps=load.steps) for i, one in enumerate(data)
        ]
        self.model.counted.update(passes=0, rows=0)
        clock = Clock()
        updates = [update for _, update in self.trainer.train([clients], 0, self.start, lambda _: {}, data.__getitem__)]
        span = clock.stop()
        losses = [update.losses for update in updates]
        assert all(loss is not None for loss in losses)
        return {"wall": span.wall, "cpu": span.cpu, "losses": losses, **self.model.counted}


class PackingWorker:
    """One system in a process of its own, see `bench.harness.worker`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def open(self, folder: str, workload: dict[str, Any]) -> None:
        self.system = PackedWave(Path(folder), PackingWorkload.from_json(workload), *settings_of(self.name))

    def measure(self) -> dict[str, Any]:
        return self.system.measure()

    def peak(self) -> float:
        return peak_mib()


make_worker = PackingWorker
