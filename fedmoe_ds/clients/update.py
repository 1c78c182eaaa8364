"""Update: what a client reports after local training, the same on every rank of its cluster.

Legend: C client slots of the wave, H home slots of the rank with most, L layers, E experts of the model, P ranks of the
cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.distributed.collectives import all_gather
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.objective import Sums
from fedmoe_ds.model.pass_context import Pass


@dataclass(frozen=True)
class Probed:
    """What a client's gradient probe has found, and what it took; the same on every rank of its cluster.

    Attributes:
        numbers: float64 [passes, *what the method makes of one].
        tokens: token rows of its passes; zero where it looked at the first step's gradient.
        counts_LE: routed rows of these.
    """

    numbers: np.ndarray
    tokens: int
    counts_LE: np.ndarray


LARGEST_VALUE = 2.0**19
"""An adapter value beyond this has blown up."""


@dataclass
class ClientUpdate:
    """What a client reports after local training; the same on every rank of its cluster, but for the marked fields.

    Attributes:
        counts_LE: routed rows per (layer, expert): FLAME's a_i^j.
        tokens: token rows it trained on: FLAME's S_i, in tokens, so that a/S is in [0, 1].
        finite: False when its loss or any adapter value is not finite.
        losses: mean loss of the first and the last local step (known on the home rank only).
        trained_LE: routed rows that took part in the backward pass; equal to `counts_LE` unless the method holds some back.
        observed: float64 sums over the round's batches: [L, E] of what its observer saw in the layers, and in the shapes that
            it names (`Method.sums`) of what its objective saw at the output.
        measured: float64 [L, E] for expert blocks and [L] for dense ones, by name: what the method measured at the end.
        remembered: new values of personal memory blocks (this rank's part).
        targets: predictions that its loss was taken over, of next tokens or of classes: at most one per token row.
        rates: learning rates of its steps.
        shared_losses: mean loss of its first step, and of all its steps, on every rank; None unless the method asks for them.
        probed: of its gradient probe; None where it has none.
        plan, memory: its part of the round's plan, and what the server knew of it when the round began.
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
    assignment: Assignment = field(default_factory=lambda: Assignment(1))
    trained_LE: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    observed: dict[str, np.ndarray] = field(default_factory=dict)
    measured: dict[str, np.ndarray] = field(default_factory=dict)
    remembered: dict[str, Tensor] = field(default_factory=dict)
    targets: int = 0
    rates: tuple[float, ...] = ()
    shared_losses: tuple[float, float] | None = None
    probed: Probed | None = None
    plan: Any = None
    memory: Mapping[str, np.ndarray] = field(default_factory=dict)


class Counts:
    """Routed and trained rows per home slot, [H, L, E] int64, on the device of the passes: they are read once per wave."""

    def __init__(self, home: int, layers: int, experts: int, device: torch.device) -> None:
        self.routed = torch.zeros(home, layers, experts, dtype=torch.int64, device=device)
        self.trained = torch.zeros_like(self.routed)
        self.selective = False

    def add(self, run: Pass, layers: list[int]) -> None:
        """Add what the layers of one pass counted."""
        # A foundation without experts, of which attention alone is trained, counts nothing.
        if layers:
            self.routed += torch.stack([run.counts[layer] for layer in layers], 1)
        # Only a method that holds rows back writes `trained`, in every layer; for all others the two counts are the same.
        if run.trained:
            self.selective = True
            self.trained += torch.stack([run.trained[layer] for layer in layers], 1)


class Gatherer:
    """Makes what single ranks of a cluster know known to all of them; every method is one collective."""

    def __init__(self, pool: Pool, device: torch.device) -> None:
        self.pool, self.shard, self.device = pool, pool.shard, device

    def home(self, values_H: Tensor) -> Tensor:
        """[H, ...] of every rank -> [C, ...], on the CPU."""
        gathered = all_gather(values_H.to(self.device), self.pool.group, self.pool.ep_size)
        return self.pool.slots.of_wave(gathered.flatten(0, 1)).cpu()

    def numbers(self, by_slot: dict[int, tuple[int, int]]) -> list[list[int]]:
        """Two integers per home slot -> two per wave slot."""
        values_HN = torch.zeros(self.pool.home_clients, 2, dtype=torch.int64)
        for slot, numbers in by_slot.items():
            values_HN[slot] = torch.tensor(numbers)
        found: list[list[int]] = self.home(values_HN).tolist()
        return found

    def losses(self, by_slot: dict[int, list[float]]) -> list[tuple[float, float]]:
        """Losses of all steps per home slot -> (first, mean) per wave slot."""
        values_HN = torch.zeros(self.pool.home_clients, 2, dtype=torch.float64)
        for slot, losses in by_slot.items():
            values_HN[slot] = torch.tensor([losses[0], math.fsum(losses) / len(losses)], dtype=torch.float64)
        return [(first, mean) for first, mean in self.home(values_HN).tolist()]

    def observations(self, by_slot: dict[int, dict[str, Tensor]], names: tuple[str, ...], layers: int) -> dict[str, Tensor]:
        """Named [L, E] sums per home slot -> [C, L, E] by name."""
        if not names:
            return {}
        shape = (self.pool.home_clients, len(names), layers, self.pool.num_experts)
        values_HNLE = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for slot, sums in by_slot.items():
            values_HNLE[slot] = torch.stack([sums[name] for name in names])
        return dict(zip(names, self.home(values_HNLE).unbind(1), strict=True))

    def sums(self, by_slot: dict[int, Sums], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Named sums of these shapes per home slot -> [C, *shape] by name; zero where a client has none."""
        if not shapes:
            return {}
        widths = [math.prod(shape) for shape in shapes.values()]
        values_HN = torch.zeros(self.pool.home_clients, sum(widths), dtype=torch.float64, device=self.device)
        for slot, sums in by_slot.items():
            if sums:
                given = {name: tuple(value.shape) for name, value in sums.items()}
                assert given == dict(shapes), f"an objective sums up {given}, its method names {dict(shapes)}"
                values_HN[slot] = torch.cat([sums[name].flatten() for name in shapes])
        parts = torch.split(self.home(values_HN), widths, dim=1)
        return {name: part.reshape(-1, *shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}

    def measures(
        self, views: list[ClientView], measure: Callable[[ClientView], dict[str, Tensor]]
    ) -> list[dict[str, np.ndarray]]:
        """Per client: measures of expert blocks joined over the ranks, [L, E]; those of dense blocks from its home, [L]."""
        found: list[dict[str, np.ndarray]] = []
        for view in views:
            # Expert and dense part by themselves: the first is joined over all ranks, the second exists at home alone.
            expert = measure(replace(view, slots={True: view.slots[True]}, client_state={}))
            result = {name: self._join(value).numpy() for name, value in sorted(expert.items())}
            home = self.pool.slots.rank_of(view.slots[True])
            # A rank that is not the client's home, and may be that of none, takes part with numbers that are not used.
            bank, slot = (view.bank, view.slots[False]) if False in view.slots else (view.start, 0)
            own = replace(view, bank=bank, slots={False: slot}, client_state={})
            # Sorted: each name is a collective, and all ranks must come to them in one order.
            for name, value in sorted(measure(own).items()):
                parts = all_gather(value.to(self.device), self.pool.group, self.pool.ep_size)
                result[name] = parts[home].cpu().numpy()
            found.append(result)
        return found

    def _join(self, value_LE: Tensor) -> Tensor:
        parts_PLE = all_gather(value_LE.to(self.device), self.pool.group, self.pool.ep_size)
        return torch.cat(parts_PLE.unbind(0), dim=1).cpu()

    def finite(self, bank: Bank, losses: dict[int, list[float]]) -> list[bool]:
        """For every wave slot: loss and all adapter values are finite (and sane), on all ranks of the cluster."""
        bad_C = torch.zeros(self.pool.wave_clients, dtype=torch.int64, device=self.device)
        for name, spec in bank.specs.items():
            items = bank.broadcast(name).flatten(-len(spec.item))  # extremes of an item are NaN where there is one
            # Strict comparisons under `not`: NaN fails them and is flagged.
            flags = ~((items.amax(-1) < LARGEST_VALUE) & (items.amin(-1) > -LARGEST_VALUE)).flatten(1).all(1)
            bad_C[slice(None) if spec.expert else self.pool.slots.span(self.shard)] += flags
        for slot, values in losses.items():
            if not all(math.isfinite(loss) for loss in values):
                bad_C[self.pool.wave_slot(self.shard, slot)] += 1
        total_C = all_gather(bad_C, self.pool.group, self.pool.ep_size).sum(0)
        return [bool(bad == 0) for bad in total_C.tolist()]
