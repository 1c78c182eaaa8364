"""Hooks: what the method, and a correction of client drift, prescribe for local training; and where clients' data come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.client_work import ClientWork
from fedmoe_ds.data import Sequences
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.objective import Objective
from fedmoe_ds.model.pass_context import RoutingObserver

ReadClient = Callable[[int], Sequences]


class TrainingData(Protocol):
    """Where clients' sequences come from; their lengths alone are known without reading them."""

    def train(self, client: int) -> Sequences: ...

    def train_lengths(self, client: int) -> NDArray[np.int64]: ...


def _nobody_is_late(delay: int | None, round_index: int) -> None:
    assert not delay, "a trainer with late clients must be told what they start from"


def _nobody_probes(squares: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    raise NotImplementedError("a trainer with gradient probes must be told what is kept of them")


@dataclass(frozen=True)
class LocalTrainingHooks:
    """What the method, and a correction of client drift, prescribe; see `fedmoe_ds.methods.base` for the meaning.

    Attributes:
        assign: (client, round) -> what it is told to do; the same on every rank.
        observer: what is looked at and decided in its layers, or None; called on the home rank.
        observes: names of the sums that observers return.
        objective: what is minimised, or summed up, at the model's output, or None; called on the home rank. None: cross-entropy
            for everybody.
        sums: names and shapes of what objectives sum up.
        whole_steps: whether an objective needs all targets of a client's step at once.
        teaches: whether objectives ask the received model before the first step (the same on all ranks).
        complete: add to the gradients of the clients that take a step, before `adjust`; collective over the cluster.
        start: by block, what a client starts from in the place of what it receives; None: everybody from that.
        adjust: change the gradients of a step in place, before clipping.
        project: change values in place, after a step.
        reduce_probe: squared norms of the gradient after a pass of a client's probe, by block -> the method's numbers.
        measure: named float64 numbers per (layer, expert) or layer of the finished client, from the tensors of this rank.
        remember: new values of its memory blocks, on the ranks that hold them.
        losses: whether every rank of a cluster is told its clients' losses.
        selective: whether some batches train only some of the experts.
        batches: sequence indices of every step of a client in a round, where they are not its own local ones (pooled data).
        past: (delay, round) -> the global adapters that a client which is late by so many rounds starts from; None: those of
            the round, which those that are not late start from.
    """

    assign: Callable[[Client, int], Assignment] = lambda client, round_index: Assignment(client.cap)
    observer: Callable[[Client, Assignment], RoutingObserver | None] = lambda client, assignment: None
    observes: tuple[str, ...] = ()
    objective: Callable[[Client, Assignment], Objective | None] | None = None
    sums: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    whole_steps: bool = False
    teaches: bool = False
    complete: Callable[[Sequence[tuple[ClientWork, ClientView]], Pool], None] = lambda training, pool: None
    start: Callable[[ClientView], Mapping[str, Tensor]] | None = None
    project: Callable[[ClientView], None] | None = None
    # In order: the method's change of the gradients first, then the correction of client drift.
    adjust: tuple[Callable[[ClientView], None], ...] = ()
    reduce_probe: Callable[[Mapping[str, NDArray[np.float64]]], NDArray[np.float64]] = _nobody_probes
    measure: Callable[[ClientView], dict[str, Tensor]] = lambda view: {}
    remember: tuple[Callable[[ClientView, float], dict[str, Tensor]], ...] = ()
    losses: bool = False
    selective: bool = False
    batches: Callable[[Client, int], list[np.ndarray]] | None = None
    past: Callable[[int | None, int], Bank | None] = _nobody_is_late
