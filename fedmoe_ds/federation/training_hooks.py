"""Training hooks: what the method and the correction of client drift prescribe, bound to the state of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from fedmoe_ds.aggregation.averaged_statistics import AveragedStatistics
from fedmoe_ds.aggregation.past_adapters import PastAdapters
from fedmoe_ds.aggregation.pseudo_gradients import add_pseudo_gradients
from fedmoe_ds.checkpoint.state import State
from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.hooks import LocalTrainingHooks
from fedmoe_ds.clients.pooled import pooled_batches
from fedmoe_ds.federation.most_delay import most_delay
from fedmoe_ds.federation.round_planning import RoundPlanning
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.federation.virtual_clock import VirtualClock
from fedmoe_ds.methods import Objective, RoundContext
from fedmoe_ds.methods.client_drift import FedVRA, Scaffold, correction


def training_hooks(
    spec: RunSpec, state: State, clients: Sequence[Client], planning: RoundPlanning, clock: VirtualClock | None = None
) -> LocalTrainingHooks:
    """What the method and the correction of drift prescribe, bound to the state of the run."""
    method, local, seed, past = spec.method, spec.config.local, spec.config.seed, PastAdapters(most_delay(spec))
    averaged = AveragedStatistics(method.statistics())

    def context(client: Client, round_index: int) -> RoundContext:
        own, told = state.personal.dense(client.index), planning.part(client.index, round_index)
        known, statistics = planning.memory(client.index), averaged.delivered(state.server)
        # Counts of clients' tokens, without noise: no other client may hear of them where clients are private.
        used_LE = state.utilisation_LE if spec.config.privacy.clip is None else None
        return RoundContext(round_index, own, used_LE, told, known, statistics)

    def assign(client: Client, round_index: int) -> Assignment:
        assignment = method.assign(client, context(client, round_index))
        late = None if clock is None else clock.delay(state.clock, round_index, client.index)
        return assignment if late is None else replace(assignment, delay=late)

    def pooled(client: Client, round_index: int) -> list[np.ndarray]:
        return pooled_batches(clients, spec.drawn_among(clients, round_index), local, seed, round_index)

    def objective(client: Client, assignment: Assignment) -> Objective | None:
        return method.objective(client, assignment, context(client, state.round + 1))

    drift = correction(local, state.server)
    # A method that does not override it is left out, so that no wave pays for an empty call in every step.
    adjusts = [method.adjust] if method.overrides("adjust") else []
    remembers: list[Callable[[ClientView, float], dict[str, Tensor]]] = []
    if isinstance(drift, Scaffold | FedVRA):
        remembers.append(drift.remember)
    if method.overrides("remember_blocks"):
        remembers.insert(0, lambda view, rates: method.remember_blocks(view))
    return LocalTrainingHooks(
        assign=assign,
        observer=lambda client, assignment: method.observer(client, assignment, context(client, state.round + 1)),
        observes=method.observes,
        objective=objective if method.overrides("objective") else None,
        sums=method.sums(),
        whole_steps=method.whole_steps,
        teaches=method.teaches(),
        complete=add_pseudo_gradients,
        start=method.start if method.overrides("start") else None,
        project=method.project if method.overrides("project") else None,
        adjust=(*adjusts, drift.adjust) if drift is not None else tuple(adjusts),
        reduce_probe=method.reduce_probe,
        measure=method.measure,
        remember=tuple(remembers),
        losses=method.weighs_losses,
        selective=method.selective,
        batches=pooled if method.pooled else None,
        past=lambda delay, round_index: past.of(delay, round_index, state.server),
    )
