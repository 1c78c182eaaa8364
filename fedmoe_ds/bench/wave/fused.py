"""Fused: the workload through this package's own wave trainer, in a world of one."""

from __future__ import annotations

from pathlib import Path

import torch

from fedmoe_ds.bench.harness.inputs import in_order, load_bare, whole_client
from fedmoe_ds.bench.harness.system import Clock, Outcome
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.local_training import WaveTrainer
from fedmoe_ds.config import AdapterConfig, Config, ExecutionConfig, LocalConfig, MethodConfig
from fedmoe_ds.config.foundation_section import FoundationConfig
from fedmoe_ds.data import Sequences
from fedmoe_ds.distributed.runtime import keep_freed_memory
from fedmoe_ds.federation.run_spec import resolve_spec
from fedmoe_ds.methods import method_for
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.install import install
from fedmoe_ds.model.pass_context import Execution
from fedmoe_ds.model.per_client_attention import use_per_client_attention


class Fused:
    """All clients in one wave, in `fast` or in `bitwise` mode."""

    def __init__(self, folder: Path, workload: Workload, bitwise: bool) -> None:
        keep_freed_memory()  # as every training run does
        device = torch.device(workload.device)
        self.workload = workload
        foundation = load_bare(folder, workload.dtype, workload.device, dense=not workload.shape.experts)
        config = _config(workload, bitwise)
        self.spec = spec = resolve_spec(config, method_for(config), workload.device, foundation.outline)
        config = spec.config
        experts, clients = workload.shape.experts, len(workload.caps)
        pool = Pool(None, 1, experts, clients, merge=spec.shares_passes)
        bank = Bank(spec.blocks, experts, clients, clients, device)
        execution = Execution(bank, pool, workload.alpha / workload.rank, kernels=workload.kernels)
        install(foundation, config.adapters, execution)
        if bitwise and spec.shares_passes:  # as fedmoe_ds.federation.execution does
            use_per_client_attention(foundation.model, execution)
        self.start = Bank(spec.blocks, experts, clients=1, device=device, with_grad=False)
        for key, _, value in self.start.items(first_expert=0):
            value.copy_(workload.initial_value(key, value.shape))
        self.foundation, self.local = foundation, config.local
        model = AdaptedModel(foundation, execution)
        self.trainer = WaveTrainer(model, spec.expert_layout.layers, self.local, None, workload.seed)

    def train(self, stage: str) -> Outcome:
        load = self.workload
        count = load.stage_steps(stage) * load.sequences
        clients = [whole_client(i, cap, count, load.length) for i, cap in enumerate(load.caps)]
        data = {client.index: self._sequences(stage, client) for client in clients}
        clock = Clock(load.device)
        updates = [update for _, update in self.trainer.train([clients], 0, self.start, lambda _: {}, data.__getitem__)]
        span = clock.stop()
        losses = [update.losses for update in updates]
        assert all(loss is not None for loss in losses) and [u.client.index for u in updates] == sorted(data)
        return Outcome(span, losses, [update.counts_LE.tolist() for update in updates])  # type: ignore[arg-type]

    def _sequences(self, stage: str, client: Client) -> Sequences:
        return in_order(self.workload.token_ids(stage, client.index), client, self.local, self.workload.seed)


def _config(load: Workload, bitwise: bool) -> Config:
    """What a run of this workload would be configured with; the optimizer is AdamW without decay or clipping."""
    local = LocalConfig(batch_size=load.sequences, lr=load.lr, clip=None, moments=load.moments)
    return Config(
        seed=load.seed,
        foundation=FoundationConfig.model_validate({"dtype": load.dtype}),
        adapters=AdapterConfig(
            rank=load.rank, alpha=load.alpha, attention=list(load.attention), feed_forward=list(load.feed_forward)
        ),
        local=local,
        execution=ExecutionConfig(reproducible="bitwise" if bitwise else "fast"),
        method=MethodConfig(name="fedit"),
    )
