"""Client work: what one client's local training in one round consists of, and what it has found so far."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.lr_schedule import learning_rate
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.data import ImageInput, Sequences
from fedmoe_ds.model.adapter_bank import HEAD, Bank
from fedmoe_ds.model.adapter_dropout import Address
from fedmoe_ds.model.batch import Rows
from fedmoe_ds.model.objective import Asked, LocalStep, Objective, Sums
from fedmoe_ds.model.pass_context import Pass


@dataclass
class ClientWork:
    """One client's local training, on any rank.

    Attributes:
        home, slot: its home rank in the cluster, and its home slot there.
        batches: indices of the sequences of every step.
        bounds: where the passes of every step begin in it, and the end of the last one (`pass_bounds`). A client with members
            takes all of them for one member after the other, unless these share their passes.
        sizes: of the passes of every step, in sequences (`pass_sizes`), of one member.
        round_index, lr: of the round: its number, and its peak learning rate.
        data: on its home rank only.
        losses: mean over the targets of every step, once they are read.
        on_device: (step, part of its mean loss) of every pass so far, which nobody has waited for yet.
        tokens, targets: passed so far.
        observed: the method's sums over the round's batches, [L, E] each.
        summed: those of its objective.
        offered: of the running step, where the client has pseudo-gradients: [3, L, E] float64, rows of every expert, and its
            router probabilities (`routed_forward.offered`).
        taught: by (step, pass of the step), what the received model has said of its targets (`clients/teaching.py`).
        probing: whether its steps are the passes of a gradient probe, of which nothing is learnt.
    """

    client: Client
    home: int
    slot: int
    assignment: Assignment
    batches: list[np.ndarray]
    bounds: list[list[int]]
    sizes: list[list[int]]
    round_index: int
    lr: float
    data: Sequences | None = None
    losses: list[float] = field(default_factory=list)
    on_device: list[tuple[int, Tensor]] = field(default_factory=list)
    tokens: int = 0
    targets: int = 0
    observed: dict[str, Tensor] = field(default_factory=dict)
    summed: Sums = field(default_factory=dict)
    offered: Tensor | None = None
    taught: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    probing: bool = False

    def micro_batches(self, step: int) -> int:
        """Passes of a step, of all members."""
        members = 1 if self.assignment.fused else self.assignment.models
        return members * (len(self.bounds[step]) - 1) if step < len(self.batches) else 0

    def largest_pass(self, step: int) -> int:
        """Sequences of a step's largest pass."""
        return max(self.sizes[step]) if step < len(self.batches) else 0

    def chosen(self, step: int, micro: int) -> tuple[np.ndarray, Address | None]:
        """Its sequences in one pass of a step, and where their draws are addressed; a probe draws nothing."""
        _, place = self._member(step, micro)
        first, end = self.bounds[step][place : place + 2]
        return self.batches[step][first:end], None if self.probing else (self.round_index, self.client.index, step, first)

    def rows(self, step: int, micro: int, images: ImageInput | None) -> Rows:
        """Its token rows in one pass of a step."""
        assert self.data is not None
        own, (chosen, address), (member, _) = self.assignment, self.chosen(step, micro), self._member(step, micro)
        parts = [
            Rows.of(self.slot, own.cap, self.data, chosen, own.allowed_by(one), images, address, own.view_of(one))
            for one in (range(own.models) if own.fused else [member])
        ]
        return Rows.fused(parts) if own.fused else parts[0]

    def step_sums(self, step: int, images: ImageInput | None) -> tuple[int, int]:
        """Targets and tokens of a whole step, so that micro-batches add up to the mean over the step."""
        assert self.data is not None
        whole = Rows.of(self.slot, self.assignment.cap, self.data, self.batches[step], images=images)
        return max(whole.targets, 1), whole.tokens

    def size(self, step: int, micro: int) -> int:
        """Sequences of one pass of a step."""
        _, place = self._member(step, micro)
        return self.sizes[step][place]

    def _member(self, step: int, micro: int) -> tuple[int, int]:
        """Whose pass it is, and which one of its passes; of members that share it, the first one's."""
        return divmod(micro, len(self.bounds[step]) - 1)

    def observe(self, observed: dict[int, dict[int, dict[str, Tensor]]], layers: list[int], names: tuple[str, ...]) -> None:
        """Add up what the method has seen in one pass; on its device, where nobody waits for it."""
        for name in names:
            sums_LE = torch.stack([observed[layer][self.slot][name].double() for layer in layers])
            self.observed[name] = self.observed[name] + sums_LE if name in self.observed else sums_LE

    def take_offers(self, run: Pass, layers: list[int]) -> None:
        """Add up what its rows of one pass have offered to experts, for pseudo-gradients of the step."""
        if self.assignment.pseudo is None:
            return
        rows_LE = torch.stack([run.counts[layer][self.slot] for layer in layers]).double()
        offered_2LE = torch.stack([run.offered[layer][self.slot] for layer in layers], 1)
        found_3LE = torch.cat([rows_LE.unsqueeze(0), offered_2LE])
        self.offered = found_3LE if self.offered is None else self.offered + found_3LE

    def local_step(self, step: int, targets: int) -> LocalStep:
        """What an objective is told about one of its steps."""
        # The last steps that hold no more samples than the client uses: steps run over the boundaries of its passes.
        left, used = sum(map(len, self.batches[step:])), len(np.unique(np.concatenate(self.batches)))
        return LocalStep(targets, step, len(self.batches), left <= used or step == len(self.batches) - 1)

    def rate(self, local: LocalConfig, step: int) -> float:
        """Learning rate of one of its steps."""
        return learning_rate(local, self.lr, step, len(self.batches))


def asked_of(
    works: list[ClientWork], rows: list[Rows], place: tuple[int, int], targets: list[int], objectives: Mapping[int, Objective]
) -> list[Asked] | None:
    """What the clients of a pass are asked at the model's output; None where no client of the wave has an objective.

    Args:
        rows: of each client.
        place: (step, pass of the step).
        targets: of each client's whole step.
        objectives: by home slot; clients that are not there have cross-entropy.
    """
    if not objectives:
        return None
    found = []
    for work, part, count in zip(works, rows, targets, strict=True):
        chosen, _ = work.chosen(*place)
        sample_N = np.repeat(np.tile(chosen, len(part.masks)), part.targets_of_samples)
        step, taught_N = work.local_step(place[0], count), work.taught.get(place)
        found.append(Asked(objectives.get(work.slot, Objective()), sample_N, step, taught_N))
    return found


def first_trained(everyone: list[ClientWork], bank: Bank) -> int:
    """The first layer that one of these clients trains, those of other ranks among them: no gradient is needed before it."""
    first = min((work.assignment.first_trained for work in everyone), default=0)
    if first == 0 and HEAD not in bank:
        return 0
    trained = [spec for spec in bank.specs.values() if spec.trained]
    layers = [layer for spec in trained if not spec.after_layers for layer in spec.layers]
    if not layers:  # heads alone
        return sys.maxsize
    # What serves the whole model is of layer -1: its gradient comes through all layers. A loss without any has no graph, but
    # that of a trained head begins after them.
    return 0 if min(layers) < 0 else first if HEAD in bank else min(first, max(layers))


def read_losses(works: list[ClientWork]) -> None:
    """Wait for the losses of all passes, once, and add up those of each step, in float64."""
    parts = [(work, step, value) for work in works for step, value in work.on_device]
    values = torch.stack([value for _, _, value in parts]).tolist() if parts else []
    for work in works:
        work.losses, work.on_device = [0.0] * len(work.batches), []
    for (work, step, _), value in zip(parts, values, strict=True):
        work.losses[step] += value
