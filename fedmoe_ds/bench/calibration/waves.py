"""Calibrate waves: how long passes, forward passes and stages of a round take here, on models of several shapes.

Every sample is one real pass of the wave trainer (one client, one rank), beside the amounts of work that the planner counts for
it. `bench plan` measures other shapes.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmoe_ds.aggregation.weighted_average import Statistics
from fedmoe_ds.bench.calibration.kernels import typical
from fedmoe_ds.bench.harness.inputs import load_bare, predicted
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.shapes import Shape, write_model
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.fused_step import ClientStep
from fedmoe_ds.clients.local_training import WaveTrainer
from fedmoe_ds.clients.optimizer import squared_norms
from fedmoe_ds.config import Config
from fedmoe_ds.data import Sequences
from fedmoe_ds.distributed.runtime import keep_freed_memory
from fedmoe_ds.foundation.meta_model import CONFIG_FILE
from fedmoe_ds.machine import peak_mib, resident_mib
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.batch import Rows as ClientRows
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.expert_layout import hosted_layout
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.install import adapter_blocks, install
from fedmoe_ds.model.pass_context import Execution
from fedmoe_ds.planner.activations import activations
from fedmoe_ds.planner.exchanges import exchanged
from fedmoe_ds.planner.work import PassWork, Rows, Work
from fedmoe_ds.planner.workload import resolve
from fedmoe_ds.randomness import generator

CPU = torch.device("cpu")
SHAPES = (
    Shape("a", experts=4, hidden=48, ffn=24, layers=1, heads=2, vocab=384, top_k=4),
    Shape("b", experts=8, hidden=64, ffn=96, layers=3, heads=4, vocab=768, top_k=4),
    Shape("c", experts=24, hidden=96, ffn=48, layers=2, heads=3, vocab=1024, top_k=6),
    Shape("d", experts=12, hidden=192, ffn=64, layers=3, heads=6, vocab=3072, top_k=8),
    Shape("e", experts=32, hidden=160, ffn=160, layers=2, heads=4, vocab=1536, top_k=8),
    Shape("f", experts=6, hidden=40, ffn=40, layers=5, heads=2, vocab=320, top_k=2),
)
TOGETHER = (SHAPES[0], SHAPES[2], SHAPES[3])
"""Those that clusters of several ranks run; their experts divide by all sizes."""
BATCHES = ((1, 24), (2, 96), (5, 48), (6, 112), (3, 192))
"""(sequences, length) of a pass."""
ATTENTION: tuple[list[str], ...] = ([], ["q_proj"], ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"])
RANKS = {"b": 16, "c": 32, "e": 16, "f": 4}
"""Adapter rank by shape; 8 for the others."""
REPEATS = 7
FEW, SEVERAL = 2, 4
"""Ranks of the timed clusters and collectives."""


@dataclass
class Sample:
    """One kind of pass: what it is made of, its seconds (median of several), its token all-to-alls and their bytes."""

    work: Work
    seconds: float
    exchanges: float = 0.0
    bytes: float = 0.0


class Bench:
    """A random model of one shape with adapters for two clients, ready for passes."""

    def __init__(
        self,
        shape: Shape,
        attention: list[str],
        folder: Path,
        group: Any = None,
        ep_size: int = 1,
        rank: int = 0,
        device: torch.device = CPU,
        dtype: str = "float32",
        in_halves: bool = False,
    ) -> None:
        keep_freed_memory()  # as every training run does
        torch.set_num_threads(1)
        if not (folder / CONFIG_FILE).exists():
            write_model(shape, 0, folder)
        self.shape, self.ep_size = shape, ep_size
        self.job = resolve(_config(folder, attention, RANKS.get(shape.name, 8), dtype), kind=device.type)
        self.foundation = load_bare(folder, dtype, str(device), ep_size, rank)
        places, model = hosted_layout(self.foundation.layers), self.foundation.model
        blocks = self.job.method.blocks(adapter_blocks(model, places, self.job.config.adapters, self.job.method.rescaler))
        # On the CPU a pass has one client per rank; on a GPU clients share passes.
        merge = device.type == "cuda"
        pool = Pool(group, ep_size, places.num_experts, 2 * ep_size, merge=merge, shard=rank, in_halves=in_halves)
        bank = Bank(blocks, places.num_experts // ep_size, 2, pool.wave_clients, device)
        self.execution = Execution(bank, pool, 2.0, rescaler=True)
        install(self.foundation, self.job.config.adapters, self.execution)
        self.start = Bank(blocks, places.num_experts // ep_size, clients=1, device=device, with_grad=False)
        for value in self.start.values.values():
            value.copy_(torch.empty(value.shape).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1)))
        self.personal = {spec.name: torch.ones(len(spec.layers), *spec.item) for spec in blocks if spec.personal}
        self.model, config = AdaptedModel(self.foundation, self.execution), self.job.config
        self.trainer = TimedTrainer(self.model, places.layers, config.local, config.execution.micro_batch_size, seed=0)

    def train(self, sequences: int, length: int, cap: int) -> Sample:
        """A pass of one client per rank, several times."""
        clients = [Client(i, "c", cap, sequences, sequences, sequences * length, cap) for i in range(self.ep_size)]
        data = self._data(sequences, length)
        self.trainer.seconds = []  # one entry per step; the first one warms up
        self.trainer.train([[client] for client in clients], 1, self.start, lambda _: self.personal, lambda _: data)
        return self._sample(True, sequences, length, cap, self.trainer.seconds[1:])

    def forward(self, sequences: int, length: int, cap: int) -> Sample:
        """One evaluation pass, several times."""
        rows = [ClientRows.of(0, cap, self._data(sequences, length), range(sequences))]
        batch = self.model.batch(rows)
        seconds = []
        with torch.no_grad():
            for _ in range(REPEATS):
                began = time.perf_counter()
                result = self.model.forward(batch, 0)
                float(result.nll_N.double().sum())
                seconds.append(time.perf_counter() - began)
        return self._sample(False, sequences, length, cap, seconds[1:])

    def _sample(self, training: bool, sequences: int, length: int, cap: int, seconds: list[float]) -> Sample:
        work = PassWork(self.job, training)
        amounts = work.fixed() + work.home(Rows(sequences, length, sequences * (length - 1)))
        routed = float(sequences * length * cap)
        local, parts = self.shape.experts // self.ep_size, len(self.execution.pool.parts)
        amounts = amounts + work.experts(routed, self.ep_size, local, parts)
        amounts = amounts + work.gradients(sum(value.numel() for value in self.execution.bank.values.values()))
        exchanges, numbers = exchanged(self.job, training, routed, parts)
        return Sample(amounts, statistics.median(seconds), exchanges, numbers * work.number_bytes)

    def _data(self, sequences: int, length: int) -> Sequences:
        return predicted(generator(0, "calibrate", sequences, length).integers(2, self.shape.vocab, (sequences, length)))


class TimedTrainer(WaveTrainer):
    """Notes the seconds of every pass."""

    seconds: list[float]

    def _pass(self, *arguments: Any) -> None:
        began = time.perf_counter()
        super()._pass(*arguments)
        self.seconds.append(time.perf_counter() - began)


def _config(folder: Path, attention: list[str], rank: int, dtype: str) -> Config:
    return Config.model_validate(
        {
            "foundation": {"path": str(folder), "cache": str(folder), "dtype": dtype},
            "adapters": {"attention": attention, "rank": rank},
            "local": {"steps": REPEATS, "batch_size": 64},
            "data": {"partition": {"clients": 2}},
        }
    )


def pass_samples_together(group: Any, ep_size: int, rank: int, folder: Path) -> list[Sample]:
    """As `pass_samples` for one of several real ranks; `folder` holds the models of `write_models`.

    With a group they are one cluster; without one (ep_size 1) they are strangers that happen to compute at the same time.
    """
    samples = []
    for i, shape in enumerate(TOGETHER):
        bench = Bench(shape, ATTENTION[i % len(ATTENTION)], folder / shape.name, group, ep_size, rank)
        bench.train(2, 32, 1)
        for j, (sequences, length) in enumerate(BATCHES[1:4]):
            cap = max(1, shape.top_k >> (i + j) % 3)
            samples += [bench.train(sequences, length, cap), bench.forward(sequences, length, cap)]
    return samples


def write_models(folder: Path) -> None:
    """The models of `pass_samples_together`."""
    for shape in TOGETHER:
        write_model(shape, 0, folder / shape.name)


def pass_samples() -> list[Sample]:
    """Training and forward passes over all shapes, batches and a few caps."""
    samples = []
    for i, shape in enumerate(SHAPES):
        with scratch_folder("fedmoe-calibrate-") as folder:
            bench = Bench(shape, ATTENTION[i % len(ATTENTION)], folder)
            for sequences, length in BATCHES:  # first passes choose kernels and allocate
                bench.train(sequences, length, shape.top_k)
            for j, (sequences, length) in enumerate(BATCHES):
                cap = max(1, shape.top_k >> (i + j) % 4)
                samples.append(bench.train(sequences, length, cap))
                samples.append(bench.forward(sequences, length, cap))
    return samples


def activation_slack() -> float:
    """Memory of passes of unequal clients over what their tensors add up to, in a process that has trained nothing yet."""
    sequences, length = 8, 192
    with scratch_folder("fedmoe-calibrate-") as folder:
        bench = Bench(SHAPES[3], ATTENTION[2], folder)
        config, job = bench.job.config, bench.job
        bench.train(1, 32, 1)  # touches adapters and moments
        before = resident_mib()
        for cap in (8, 2, 4, 1, 8):
            bench.train(sequences, length, cap)
        local = config.local.model_copy(update={"batch_size": sequences})
        counted = activations(replace(job, config=config.model_copy(update={"local": local})), 1, length)
        return (peak_mib() - before) * 2**20 / counted


STAGES = ("update", "norm", "move", "fold", "serve")


def stage_samples() -> dict[str, list[tuple[int, int, float]]]:
    """(blocks, trainable numbers, seconds) of every stage of a round, for few and for many numbers."""
    found: dict[str, list[tuple[int, int, float]]] = {stage: [] for stage in STAGES}
    for shape in (SHAPES[0], SHAPES[3]):
        with scratch_folder("fedmoe-calibrate-") as folder:
            for stage, sample in _stages(Bench(shape, ATTENTION[2], folder)).items():
                found[stage].append(sample)
    return found


def _stages(bench: Bench) -> dict[str, tuple[int, int, float]]:
    bank, optimizer = bench.execution.bank, bench.trainer.optimizer
    specs = [spec for spec in bank.specs.values() if not spec.personal]
    names = [spec.name for spec in specs]
    blocks, each = len(names), sum(bank.client(name, 0).numel() for name in names)
    sums = Statistics(specs, bench.shape.experts, exact=True)
    steps = [ClientStep({True: slot, False: slot}, 3, 1e-3, (1, slot)) for slot in range(2)]
    # AdamW leaves alone what nothing moves; after one step with gradients, moments move all of it.
    for name in names:
        bank.grads[name].fill_(1e-3)
    return {
        "update": (2 * blocks, 2 * each, typical(lambda: optimizer.step_all(steps))),
        "norm": (blocks, 2 * each, typical(lambda: (squared_norms(bank, True), squared_norms(bank, False)))),
        "move": (blocks, 4 * each, typical(lambda: _move(bank, bench.start))),
        "fold": (blocks, each, typical(lambda: _fold(sums, bank, names))),
        "serve": (blocks, each, typical(lambda: _serve(sums, bench.start))),
    }


def _move(bank: Bank, start: Bank) -> None:
    """What a wave does before it starts: two clients' gradients to zero, values from the global adapters."""
    bank.zero_grad()
    for name in bank.specs:
        bank.broadcast(name).copy_(start.broadcast(name).expand_as(bank.broadcast(name)))


def _fold(sums: Statistics, bank: Bank, names: list[str]) -> None:
    for name in names:
        value = bank.client(name, 1)
        sums.add(name, value, np.ones(value.shape[: 2 if bank.specs[name].expert else 1]))


def _serve(sums: Statistics, start: Bank) -> None:
    for name, mean in sums.average(start).items():
        start.client(name, 0).copy_(mean)
