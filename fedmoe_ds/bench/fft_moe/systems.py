"""Pool systems: FFT-MoE's wave with one pool size, and the dense foundation's own forward and backward pass.

Both run in a worker process of their own and answer with the seconds of what they did and each client's first loss. V starts at
zero, so these losses must be the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmoe_ds.bench.fft_moe.workload import DENSE, POOL_PREFIX, PoolWorkload
from fedmoe_ds.bench.harness.inputs import in_order, load_bare, whole_client
from fedmoe_ds.bench.harness.system import Clock
from fedmoe_ds.clients.hooks import LocalTrainingHooks
from fedmoe_ds.clients.local_training import WaveTrainer
from fedmoe_ds.config import AdapterConfig, Config, ExecutionConfig, LocalConfig, MethodConfig, MoEAdapterConfig
from fedmoe_ds.distributed.runtime import keep_freed_memory
from fedmoe_ds.federation.run_spec import resolve_spec
from fedmoe_ds.machine import peak_mib
from fedmoe_ds.methods import RoundContext, method_for
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.install import initial_bank, install
from fedmoe_ds.model.pass_context import Execution

Measured = dict[str, Any]


class TimedTrainer(WaveTrainer):
    """A wave trainer that knows how long its two halves took: `seconds` and `cpu_seconds` by part."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.restart()

    def restart(self) -> None:
        self.seconds = {"passes": 0.0, "optimizer": 0.0}
        self.cpu_seconds = dict(self.seconds)

    def _forward_backward(self, *arguments: Any) -> None:
        self._timed("passes", super()._forward_backward, *arguments)

    def _optimize(self, *arguments: Any) -> None:
        self._timed("optimizer", super()._optimize, *arguments)

    def _timed(self, part: str, act: Callable[..., None], *arguments: Any) -> None:
        clock = Clock()
        act(*arguments)
        span = clock.stop()
        self.seconds[part] += span.wall
        self.cpu_seconds[part] += span.cpu


class ExpertPool:
    """All clients in one wave, with `experts` adapter experts per block."""

    def __init__(self, folder: Path, workload: PoolWorkload, experts: int) -> None:
        keep_freed_memory()  # as every training run does
        self.workload, device = workload, torch.device("cpu")
        foundation = load_bare(folder, dense=True)
        adapters = AdapterConfig(
            attention=[], moe=MoEAdapterConfig(experts=experts, width=workload.width, top_k=workload.top_k)
        )
        self.local = LocalConfig(batch_size=workload.sequences, lr=workload.lr)
        config = Config(
            seed=workload.seed,
            adapters=adapters,
            local=self.local,
            execution=ExecutionConfig(reproducible="bitwise" if workload.bitwise else "fast"),
            method=MethodConfig(name="fft-moe"),
        )
        method = method_for(config)
        spec = resolve_spec(config, method, "cpu", foundation.outline)
        clients = workload.clients
        pool = Pool(None, 1, experts, clients, merge=spec.shares_passes)
        self.bank = Bank(spec.blocks, experts, clients, clients, device)
        model = AdaptedModel(foundation, Execution(self.bank, pool, 1.0))
        install(foundation, adapters, model.execution)
        self.start = initial_bank(foundation, spec.blocks, workload.seed, spec.expert_layout.held)
        hooks = LocalTrainingHooks(observer=lambda client, assignment: method.observer(client, assignment, RoundContext(1, {})))
        self.trainer = TimedTrainer(model, spec.expert_layout.layers, self.local, None, workload.seed, hooks)

    def measure(self) -> Measured:
        """One wave from fresh adapters."""
        load, cap = self.workload, self.workload.top_k
        count = load.steps * load.sequences
        clients = [whole_client(i, cap, count, load.length, steps=load.steps) for i in range(load.clients)]
        data = {one.index: in_order(load.token_ids(one.index), one, self.local, load.seed) for one in clients}
        self.trainer.restart()
        clock = Clock()
        updates = [update for _, update in self.trainer.train([clients], 0, self.start, lambda _: {}, data.__getitem__)]
        span = clock.stop()
        assert all(update.finite and update.losses is not None for update in updates)
        return {
            "wall": span.wall,
            "cpu": span.cpu,
            "parts": self.trainer.seconds,
            "cpu_parts": self.trainer.cpu_seconds,
            "losses": [update.losses[0] for update in updates if update.losses is not None],
            "used": [int((update.counts_LE > 0).sum()) for update in updates],
            "adapter_bytes": self.bank.nbytes(),
            "optimizer_bytes": _nbytes(self.trainer.optimizer.first) + _nbytes(self.trainer.optimizer.second),
        }


class Dense:
    """The same sequences through the frozen foundation alone: forward, and backward down to the embeddings."""

    def __init__(self, folder: Path, workload: PoolWorkload) -> None:
        keep_freed_memory()
        self.model: Any = load_bare(folder, dense=True).model
        self.workload = workload

    def measure(self) -> Measured:
        """All steps of all clients; in `fast` mode the clients of a step share a pass, as they do in a wave."""
        load = self.workload
        ids_CNBS = torch.from_numpy(np.stack([load.token_ids(client) for client in range(load.clients)]))
        losses: list[float] = []
        clock = Clock()
        for step in range(load.steps):
            for group in torch.split(ids_CNBS[:, step], 1 if load.bitwise else load.clients):
                found_C = self._pass(group)
                losses += found_C.tolist() if step == 0 else []
        span = clock.stop()
        return {"wall": span.wall, "cpu": span.cpu, "losses": losses}

    def _pass(self, ids_CBS: Tensor) -> Tensor:
        clients = ids_CBS.shape[0]
        ids_BS = ids_CBS.flatten(0, 1)
        embedded_BSD = self.model.get_input_embeddings()(ids_BS).requires_grad_()
        hidden_BSD = self.model.base_model(inputs_embeds=embedded_BSD, use_cache=False).last_hidden_state
        logits_NV = self.model.get_output_embeddings()(hidden_BSD[:, :-1].flatten(0, 1))
        nll_N = F.cross_entropy(logits_NV, ids_BS[:, 1:].flatten(), reduction="none")
        nll_C = nll_N.view(clients, -1).mean(1)
        nll_C.sum().backward()  # type: ignore[no-untyped-call]
        return nll_C.detach()


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


class PoolWorker:
    """The dense foundation or one pool size in a process of its own, see `bench.harness.worker`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def open(self, folder: str, workload: dict[str, Any]) -> None:
        load, pool = PoolWorkload(**workload), self.name.removeprefix(POOL_PREFIX)
        self.system = Dense(Path(folder), load) if self.name == DENSE else ExpertPool(Path(folder), load, int(pool))

    def measure(self) -> Measured:
        return self.system.measure()

    def peak(self) -> float:
        return peak_mib()


make_worker = PoolWorker
