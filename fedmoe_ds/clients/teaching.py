"""Teaching: what the received model says of a client's samples, before its first step, for objectives without labels.

A pass of teaching is that of training without its backward pass: the same samples beside each other, the client's factors on
the LoRA scale, nothing dropped out, and of what the method observes nothing asked. What an objective makes of the logits
(`Objective.teach`) waits for the pass of training that has the same samples (`Targets.taught_N`).

Legend: N targets, D model width, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fedmoe_ds.clients.client_work import ClientWork
from fedmoe_ds.model.cross_entropy import chunks, logits_of
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.pass_context import InTraining

OnePass = Callable[[list[ClientWork], int, int, int | None, int], None]
"""(clients at home here, step, pass of the step, common home slot, first trained layer)."""


@dataclass(frozen=True)
class Teaching:
    """The passes of one wave; `factors` are those of clients on the expert output, by home slot."""

    model: AdaptedModel
    factors: Callable[[list[ClientWork]], list[float] | None]

    @torch.no_grad()
    def run(self, steps: int, passes: Callable[[int, OnePass], None]) -> None:
        """Take the passes of all steps; every rank of the cluster does. Raises OutOfMemory as `passes` does."""
        execution = self.model.execution
        training = execution.wave
        # As in an evaluation, but for what belongs to the model of a client.
        execution.wave = InTraining(wave_factors=training.wave_factors, home_factors=training.home_factors)
        for step in range(steps):
            passes(step, lambda works, *at: self._pass(training, works, *at))
        execution.wave = training

    def _pass(
        self, training: InTraining, works: list[ClientWork], step: int, micro: int, slot: int | None, first_layer: int
    ) -> None:
        images = self.model.foundation.images
        # As a probe's: the received model has no dropout.
        batch = self.model.batch([replace(work, probing=True).rows(step, micro, images) for work in works])
        for work, (head, own_ND) in zip(works, self.model.read_out(batch, slot, self.factors(works)), strict=True):
            objective = training.objectives.get(work.slot)
            if objective is not None and objective.teach is not None and len(own_ND):
                parts = chunks(len(own_ND), head.out_features)
                work.taught[step, micro] = torch.cat([objective.teach(logits_of(head, own_ND[part])) for part in parts])
