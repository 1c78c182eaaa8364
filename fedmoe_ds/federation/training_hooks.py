"""Training hooks: what the method and the correction of client drift prescribe, bound to the state of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmoe_ds.checkpoint.state import State
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.hooks import LocalTrainingHooks
from fedmoe_ds.clients.pooled import pooled_batches
from fedmoe_ds.federation.round_planning import RoundPlanning
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.methods import Method, RoundContext
from fedmoe_ds.methods.client_drift import FedVRA, Scaffold, correction


def training_hooks(spec: RunSpec, state: State, clients: Sequence[Client], planning: RoundPlanning) -> LocalTrainingHooks:
    """What the method and the correction of drift prescribe, bound to the state of the run."""
    method, local, seed = spec.method, spec.config.local, spec.config.seed

    def context(client: Client, round_index: int) -> RoundContext:
        own, told = state.personal.dense(client.index), planning.part(client.index, round_index)
        return RoundContext(round_index, own, state.utilisation_LE, told, planning.memory(client.index))

    def pooled(client: Client, round_index: int) -> list[np.ndarray]:
        return pooled_batches(clients, spec.drawn_among(clients, round_index), local, seed, round_index)

    drift = correction(local, state.server)
    # A method that does not override it is left out, so that no wave pays for an empty call in every step.
    adjusts = [method.adjust] if type(method).adjust is not Method.adjust else []
    return LocalTrainingHooks(
        assign=lambda client, round_index: method.assign(client, context(client, round_index)),
        observer=lambda client, assignment: method.observer(client, assignment, context(client, state.round + 1)),
        observes=method.observes,
        adjust=(*adjusts, drift.adjust) if drift is not None else tuple(adjusts),
        measure=method.measure,
        remember=(drift.remember,) if isinstance(drift, Scaffold | FedVRA) else (),
        selective=method.selective,
        batches=pooled if method.pooled else None,
    )
