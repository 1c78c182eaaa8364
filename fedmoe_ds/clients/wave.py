"""Wave: the fused local training of the clients in flight on one cluster.

Legend: C client slots of the wave, H home slots per rank, L layers, E experts of the model, N gradient norms.

Every rank of a cluster runs the same sequence of passes and collectives, because all of them are derived from sizes that every
rank knows; a rank without rows joins with a stand-in row that is not routed. In `bitwise` mode a pass holds the rows of one
client per rank, so no kernel ever sees two clients at once; in `fast` mode a pass holds all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.adapters.bank import Bank
from fedmoe_ds.clients.batch import Batch, Rows, make_batch
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.model import forward_pass, segment_sums
from fedmoe_ds.clients.optimizer import ClientOptimizer, squared_norms
from fedmoe_ds.clients.schedule import Wave
from fedmoe_ds.clients.steps import learning_rate, local_batches, step_count
from fedmoe_ds.collectives import all_gather
from fedmoe_ds.config import ExecutionConfig, LocalConfig
from fedmoe_ds.data import Sequences
from fedmoe_ds.experts.execution import Execution
from fedmoe_ds.foundation import Foundation

LARGEST_VALUE = 2.0**19
"""An adapter value beyond this has blown up; it would also leave the range of the exact aggregation sums."""

ReadClient = Callable[[int], Sequences]


@dataclass(frozen=True)
class ClientRules:
    """What a method prescribes for a client, as pure functions of the client.

    Attributes:
        rescale: fixed factor on the expert output, or None.
        allowed: [E] bool expert mask, or None.
    """

    rescale: Callable[[Client], float | None] = lambda client: None
    allowed: Callable[[Client], np.ndarray | None] = lambda client: None


@dataclass
class Report:
    """What a client reports after local training; the same on every rank of its cluster.

    Attributes:
        counts_LE: routed rows per (layer, expert): FLAME's a_i^j.
        tokens: token rows it trained on: FLAME's S_i, in tokens, so that a/S is in [0, 1].
        finite: False when its loss or any adapter value is not finite.
        losses: mean loss of the first and the last local step (known on the home rank only).
    """

    client: Client
    wave_slot: int
    home: int
    steps: int
    tokens: int
    counts_LE: np.ndarray
    finite: bool
    losses: tuple[float, float] | None = None
    seconds: float = 0.0


@dataclass
class _Work:
    """One client's local training on any rank; `data` only on its home rank."""

    client: Client
    slot: int
    batches: list[np.ndarray]
    data: Sequences | None = None
    losses: list[float] = field(default_factory=list)
    tokens: int = 0

    def micro_batches(self, step: int, size: int | None) -> int:
        if step >= len(self.batches):
            return 0
        return math.ceil(len(self.batches[step]) / (size or len(self.batches[step])))


class WaveTrainer:
    """Trains waves on one rank with one set of buffers, allocated once: memory does not grow with the number of clients.

    Args:
        foundation: the frozen model with the federated layers installed.
        execution: what those layers read; its bank is trained here.
        local: local training settings.
        run: execution settings (mode, micro-batch size).
        shard: this rank's place in its cluster.
        seed: run seed.
        rules: what the method prescribes per client.
    """

    def __init__(
        self,
        foundation: Foundation,
        execution: Execution,
        local: LocalConfig,
        run: ExecutionConfig,
        shard: int,
        seed: int,
        device: torch.device,
        rules: ClientRules | None = None,
    ) -> None:
        self.foundation, self.execution, self.rules = foundation, execution, rules or ClientRules()
        self.local, self.micro = local, run.micro_batch_size
        self.shard, self.seed, self.device = shard, seed, device
        self.bank, self.pool = execution.bank, execution.pool
        self.optimizer = ClientOptimizer(self.bank, local)
        self.layers = [hosted.index for hosted in foundation.layers]
        self.expert_blocks = [name for name, spec in self.bank.specs.items() if spec.expert]
        self.dense_blocks = [name for name, spec in self.bank.specs.items() if not spec.expert]

    def train(self, wave: Wave, round_index: int, start: Bank, personal: dict[str, Tensor], read: ReadClient) -> list[Report]:
        """Train one wave from the global adapters `start` and each client's personal state.

        Args:
            wave: clients at home on each rank of the cluster.
            personal: by block name, [n_clients, L, ...]; read for the clients at home here.
            read: training sequences of a client; called for clients at home here only.
        Returns:
            One report per client; the trained adapters are in the bank, at `report.wave_slot` (expert blocks) and
            `report.wave_slot % H` on the home rank (dense blocks).
        """
        began = time.monotonic()
        works = [[self._work(client, slot, round_index) for slot, client in enumerate(home)] for home in wave]
        for work in works[self.shard]:
            work.data = read(work.client.index)
        self._load(works, start, personal)
        counts_HLE = torch.zeros(self.pool.home_clients, len(self.layers), self.pool.num_experts, dtype=torch.int64)
        for step in range(max((len(w.batches) for home in works for w in home), default=0)):
            self._forward_backward(step, works, counts_HLE)
            self._optimize(step, works)
        return self._reports(works, counts_HLE, time.monotonic() - began)

    def _work(self, client: Client, slot: int, round_index: int) -> _Work:
        return _Work(client, slot, local_batches(client, self.local, self.seed, round_index))

    @torch.no_grad()
    def _load(self, works: list[list[_Work]], start: Bank, personal: dict[str, Tensor]) -> None:
        self.bank.zero_grad()
        self.optimizer.reset()
        for name, spec in self.bank.specs.items():
            if not spec.personal:
                self.bank.broadcast(name).copy_(start.broadcast(name).expand_as(self.bank.broadcast(name)))
                continue
            for work in works[self.shard]:
                self.bank.client(name, work.slot).copy_(personal[name][work.client.index])

    def _forward_backward(self, step: int, works: list[list[_Work]], counts_HLE: Tensor) -> None:
        """All passes of one local step, in an order that every rank of the cluster knows."""
        mine = works[self.shard]
        if self.pool.merge:
            passes = max((w.micro_batches(step, self.micro) for home in works for w in home), default=0)
            for micro in range(passes):
                self._pass([w for w in mine if micro < w.micro_batches(step, self.micro)], step, micro, None, counts_HLE)
            return
        for slot in range(self.pool.home_clients):
            here = [home[slot] for home in works if slot < len(home)]
            passes = max((w.micro_batches(step, self.micro) for w in here), default=0)
            for micro in range(passes):
                own = [w for w in mine if w.slot == slot and micro < w.micro_batches(step, self.micro)]
                self._pass(own, step, micro, slot, counts_HLE)

    def _pass(self, works: list[_Work], step: int, micro: int, slot: int | None, counts_HLE: Tensor) -> None:
        rows = [self._rows(work, step, micro) for work in works]
        batch = make_batch(rows, self.pool.num_experts, self.device)
        result = forward_pass(self.foundation, self.execution, batch, slot, self._factors(works))
        loss = result.hidden_BSD.sum() * 0.0 if not works else result.nll_N.new_zeros(())
        for work, part, own in zip(works, rows, segment_sums(result.nll_N, batch), strict=True):
            whole = self._step_sums(work, step)
            task = own / whole[0]
            work.losses[step] += float(task.detach())
            work.tokens += part.tokens
            loss = loss + task + self._auxiliary(result.run.losses, work.slot) * (part.tokens / whole[1])
        loss.backward()  # type: ignore[no-untyped-call]
        self._count(result.run.counts, batch, counts_HLE)

    def _factors(self, works: list[_Work]) -> list[float] | None:
        factors = {work.slot: factor for work in works if (factor := self.rules.rescale(work.client)) is not None}
        return [factors.get(slot, 1.0) for slot in range(self.pool.home_clients)] if factors else None

    def _rows(self, work: _Work, step: int, micro: int) -> Rows:
        assert work.data is not None
        if len(work.losses) == step:
            work.losses.append(0.0)
        size = self.micro or len(work.batches[step])
        chosen = work.batches[step][micro * size : (micro + 1) * size]
        ids, masks = work.data.input_ids, work.data.loss_mask
        allowed = self.rules.allowed(work.client)
        allowed_E = None if allowed is None else torch.from_numpy(allowed)
        return Rows(work.slot, work.client.top_k, [ids[i] for i in chosen], [masks[i] for i in chosen], allowed_E)

    def _step_sums(self, work: _Work, step: int) -> tuple[int, int]:
        """Targets and tokens of a whole step, so that micro-batches add up to the mean over the step."""
        assert work.data is not None
        chosen = work.batches[step]
        targets = sum(int(work.data.loss_mask[i].sum()) for i in chosen)
        return max(targets, 1), sum(len(work.data.input_ids[i]) for i in chosen)

    def _auxiliary(self, losses: dict[int, dict[int, Tensor]], slot: int) -> Tensor | float:
        found = [by_slot[slot] for by_slot in losses.values()]
        return torch.stack(found).mean() if found else 0.0

    def _count(self, counts: dict[int, Tensor], batch: Batch, counts_HLE: Tensor) -> None:
        for row, layer in enumerate(self.layers):
            counts_HLE[:, row] += counts[layer].cpu()

    def _optimize(self, step: int, works: list[list[_Work]]) -> None:
        """One optimizer step for every client of the wave that has not finished."""
        norms = self._global_norms() if self.local.clip is not None else None
        for shard, home in enumerate(works):
            for work in home:
                if step >= len(work.batches):
                    continue
                wave_slot = shard * self.pool.home_clients + work.slot
                factor = 1.0
                if norms is not None and norms[wave_slot] > (self.local.clip or 0.0):
                    factor = (self.local.clip or 0.0) / norms[wave_slot]
                lr = learning_rate(self.local, step, len(work.batches))
                self.optimizer.step(self.expert_blocks, wave_slot, step + 1, lr, factor)
                if shard == self.shard:
                    self.optimizer.step(self.dense_blocks, work.slot, step + 1, lr, factor)

    def _global_norms(self) -> list[float]:
        """Gradient norm of every wave slot over all of its adapters on all ranks, summed in one fixed order."""
        size, group = self.pool.ep_size, self.pool.group
        expert_PNEC = all_gather(squared_norms(self.bank, expert=True), group, size)
        dense_PN1H = all_gather(squared_norms(self.bank, expert=False), group, size)
        expert_CN = expert_PNEC.permute(3, 1, 0, 2).flatten(1)
        dense_CN = dense_PN1H.permute(0, 3, 1, 2).flatten(0, 1).flatten(1)
        return [float(row.sum().sqrt()) for row in torch.cat([expert_CN, dense_CN], 1).contiguous().unbind(0)]

    def _reports(self, works: list[list[_Work]], counts_HLE: Tensor, seconds: float) -> list[Report]:
        size, group = self.pool.ep_size, self.pool.group
        counts_PHLE = all_gather(counts_HLE.to(self.device), group, size).cpu().numpy()
        tokens_H = torch.zeros(self.pool.home_clients, dtype=torch.int64)
        for work in works[self.shard]:
            tokens_H[work.slot] = work.tokens
        tokens_PH = all_gather(tokens_H.to(self.device), group, size).cpu().numpy()
        finite_C = self._finite(works[self.shard])
        reports = []
        for shard, home in enumerate(works):
            for work in home:
                place = shard * self.pool.home_clients + work.slot
                losses = (work.losses[0], work.losses[-1]) if work.losses else None
                counts, tokens = counts_PHLE[shard, work.slot], int(tokens_PH[shard, work.slot])
                steps = step_count(work.client, self.local)
                reports.append(Report(work.client, place, shard, steps, tokens, counts, finite_C[place], losses, seconds))
        return reports

    def _finite(self, mine: list[_Work]) -> list[bool]:
        """For every wave slot: loss and all adapter values are finite (and sane), on all ranks of the cluster."""
        bad_C = torch.zeros(self.pool.wave_clients, dtype=torch.int64, device=self.device)
        for name, spec in self.bank.specs.items():
            flags = ~(self.bank.broadcast(name).abs() < LARGEST_VALUE).flatten(1).all(1)
            offset = 0 if spec.expert else self.shard * self.pool.home_clients
            bad_C[offset : offset + len(flags)] += flags
        for work in mine:
            if not all(math.isfinite(loss) for loss in work.losses):
                bad_C[self.shard * self.pool.home_clients + work.slot] += 1
        total_C = all_gather(bad_C, self.pool.group, self.pool.ep_size).sum(0)
        return [bool(bad == 0) for bad in total_C.tolist()]
