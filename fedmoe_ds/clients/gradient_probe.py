"""Gradient probe: what a client's gradients are before its first step, reduced to a few numbers; no step is taken along them.

A probe is a few passes, forward and backward, over samples that the method names (`Assignment.probe`), one after the other.
After each, the squared norms of the gradient come together on all ranks of the cluster, per block, layer and expert; the method
makes its numbers of them, and the gradient is cleared. A pass is that of training with plain cross-entropy, and with the
auxiliary losses that the configuration names: every expert and layer has a gradient, nothing is dropped out, and of what the
method observes or minimises nothing is asked. Which layers a client trains may follow from it (`Assignment.settle`). The light
form has no pass of its own: it takes the gradient of the first local step, of what the method minimises, before
pseudo-gradients and corrections of drift; where the client trains nothing it is zero.

A squared norm is a sum over one item of one client, and kernels keep the rows of clients apart, so a probe's numbers depend on
the client alone: not a bit follows from who shares its wave, or on how many ranks the experts lie.

Legend: C client slots of the wave, N blocks times layers, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedmoe_ds.clients.assignment import FIRST_STEP
from fedmoe_ds.clients.client_work import ClientWork
from fedmoe_ds.clients.optimizer import gathered_norms
from fedmoe_ds.clients.update import ClientUpdate, Counts, Gatherer, Probed
from fedmoe_ds.model.pass_context import Execution, InTraining

Squares = Mapping[str, NDArray[np.float64]]
"""Squared norms of the gradient by trained block: float64 [L, E], or [L] of a dense one."""
Passes = Callable[[int, list[list[ClientWork]], Counts], None]
"""(step, work of the clients by home rank, what is counted): all passes of one step of theirs."""
Cut = Callable[[int, list[np.ndarray]], tuple[list[list[int]], list[list[int]]]]
"""(client, its steps) -> where the passes of each begin in it, and their sizes."""


@dataclass
class GradientProbe:
    """The probes of one wave.

    Attributes:
        works: its clients, by home rank; the same on every rank of the cluster.
        reduce: what the method makes of the squared norms after one pass.
        numbers: by wave slot, that of every pass so far.
        probing: the passes of all clients, as if they were steps; none before `run`.
    """

    works: list[list[ClientWork]]
    execution: Execution
    layers: list[int]
    reduce: Callable[[Squares], NDArray[np.float64]]
    numbers: dict[int, list[NDArray[np.float64]]] = field(default_factory=dict)
    probing: list[list[ClientWork]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Every rank of the cluster knows everybody's assignment, so either all of them probe or none does.
        self.asked = any(work.assignment.probe is not None for home in self.works for work in home)

    def run(self, passes: Passes, cut: Cut) -> None:
        """Take the passes of all clients, one of each at a time. Raises OutOfMemory as `passes` does."""
        if not self.asked:
            return
        pool = self.execution.pool
        self.counts = Counts(pool.home_clients, len(self.layers), pool.num_experts, self.execution.bank.device)
        self.probing = [[_probing(work, cut) for work in home] for home in self.works]
        training = self.execution.wave
        # Factors on the LoRA scale belong to the model of a client; observers, objectives and masks to its training.
        self.execution.wave = InTraining(wave_factors=training.wave_factors, home_factors=training.home_factors)
        for step in range(max((len(work.batches) for home in self.probing for work in home), default=0)):
            passes(step, self.probing, self.counts)
            self._take([work for home in self.probing for work in home if step < len(work.batches)])
            self.execution.bank.zero_grad()
        self.execution.wave = training
        for work in (work for home in self.works for work in home if work.assignment.settle is not None):
            # Every rank of the cluster knows the numbers, so all go on with one assignment.
            work.assignment = work.assignment.settled(np.stack(self.numbers[pool.wave_slot(work.home, work.slot)]))

    def look(self, step: int) -> None:
        """Take the gradients of the first local step, before it is taken, of clients without passes of their own."""
        if step > 0 or not self.asked:
            return
        light = [work for home in self.works for work in home if work.assignment.probe == FIRST_STEP]
        if light:
            self._take(light)

    @torch.no_grad()
    def _take(self, works: list[ClientWork]) -> None:
        pool = self.execution.pool
        squares_C = squared_gradients(self.execution)
        for work in works:
            slot = pool.wave_slot(work.home, work.slot)
            squares = self._of_trained(work, squares_C[slot])
            self.numbers.setdefault(slot, []).append(np.asarray(self.reduce(squares), dtype=np.float64))

    def _of_trained(self, work: ClientWork, squares: Squares) -> Squares:
        """Zero in layers and experts that the client does not train."""
        # The first step's passes go back as far as the first layer that anyone in them trains: in the layers of another client
        # this one has a gradient, too, which follows from who shares its wave.
        found = dict(squares)
        for name, square in squares.items():
            if (trained := work.assignment.trains(self.execution.bank.specs[name])) is not None:
                found[name] = np.where(trained, square, 0.0)
        return found

    def tell(self, updates: Sequence[ClientUpdate]) -> None:
        """Write into clients' updates what their probes have found, and what they took. Collective."""
        if not self.asked:
            return
        gatherer, home = Gatherer(self.execution.pool, self.execution.bank.device), self.execution.pool.shard
        tokens_CN = gatherer.numbers({work.slot: (work.tokens, work.targets) for work in self.probing[home]})
        counts_CLE = gatherer.home(self.counts.routed).numpy()
        for update in updates:
            slot = update.wave_slot
            if slot in self.numbers:
                update.probed = Probed(np.stack(self.numbers[slot]), tokens_CN[slot][0], counts_CLE[slot])


def _probing(work: ClientWork, cut: Cut) -> ClientWork:
    """A client's probe, as if its passes were steps."""
    samples = list(work.assignment.probe or ())
    # All experts and layers have a gradient, also those that it is told not to train.
    everything = replace(work.assignment, trained_LE=None, trained_N=None, trains_common=True, trains_head=True)
    place, cuts = (work.home, work.slot), cut(work.client.index, samples)
    return ClientWork(work.client, *place, everything, samples, *cuts, work.round_index, work.lr, work.data, probing=True)


def squared_gradients(execution: Execution) -> Sequence[Squares]:
    """By wave slot, the squared norms of the gradients that the bank holds, on every rank of the cluster. Collective."""
    # Contiguous: whoever sums a client's numbers adds them up in an order that no number of clients or ranks decides.
    expert_CNE, dense_CN = (values.cpu().contiguous() for values in gathered_norms(execution.bank, execution.pool))
    found: list[dict[str, NDArray[np.float64]]] = [{} for _ in expert_CNE]
    first = {True: 0, False: 0}
    for spec in execution.bank.specs.values():
        if not spec.trained:
            continue
        rows = slice(first[spec.expert], first[spec.expert] + len(spec.layers))
        for squares, own in zip(found, expert_CNE if spec.expert else dense_CN, strict=True):
            squares[spec.name] = own[rows].numpy()
        first[spec.expert] = rows.stop
    return found
