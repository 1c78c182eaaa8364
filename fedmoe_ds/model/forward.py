"""Forward: the hosted model as clients use it, one pass over a batch, with the negative log-likelihood of every target.

Legend: B sequences or images, S positions, D model width, N targets (next tokens, or classes), V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.foundation import Foundation
from fedmoe_ds.foundation.pre_gate import pre_gate_of
from fedmoe_ds.model.adapter_bank import HEAD
from fedmoe_ds.model.batch import Batch, Rows, make_batch
from fedmoe_ds.model.client_head import ClientHead, frozen_head
from fedmoe_ds.model.cross_entropy import Head, mean_logits, scores
from fedmoe_ds.model.objective import Asked, Output, Sums
from fedmoe_ds.model.pass_context import Execution, Pass
from fedmoe_ds.model.pre_gated import decide
from fedmoe_ds.model.upload import upload


@dataclass(frozen=True)
class PassResult:
    """Outcome of one forward pass, or of one for each member of an ensemble: per target (row order) its negative
    log-likelihood, and whether the likeliest token (or class) is the right one.

    Attributes:
        targets: counts per segment.
        hidden_BSD, run: of the pass; of an ensemble, of its first member's.
        members: what each model's head reads, [N, D]; of a single model one.
    """

    nll_N: Tensor
    correct_N: Tensor
    targets: list[int]
    hidden_BSD: Tensor
    members: list[Tensor]
    run: Pass
    head: Head

    @property
    @torch.no_grad()
    def logits_NV(self) -> Tensor:
        """The logits of all targets, computed when they are asked for: a pass over many samples never holds them."""
        return mean_logits(self.head, self.members)


@dataclass(frozen=True)
class Loss:
    """What a training pass minimises: the sum over its segments of their part of a step's mean loss, and what it is made of.

    Attributes:
        sum: to be differentiated; a rank without rows has one as well, so that its backward pass meets the others' in every
            layer's all-to-all.
        nll_N: per target, without a gradient: cross-entropy's, whatever is minimised.
        observed: what the objective of each client has summed up, where clients have one.
    """

    sum: Tensor
    nll_N: Tensor
    run: Pass
    observed: list[Sums] = field(default_factory=list)


@dataclass(frozen=True)
class AdaptedModel:
    """The frozen model with the federated layers installed, and what those layers read; `packing` lays samples end to end."""

    foundation: Foundation
    execution: Execution
    packing: bool = False

    def batch(self, rows: list[Rows]) -> Batch:
        """Rows of clients as one batch on the model's device."""
        execution = self.execution
        return make_batch(rows, execution.bank.device, self.foundation.images, self.packing)

    @property
    def head(self) -> Head:
        """What reads hidden states out, of the foundation: to the next token, or to the class of an image."""
        head: Head = frozen_head(self.foundation.model)
        return head

    def heads(self, batch: Batch) -> list[Head] | None:
        """Those of a pass's clients, where clients train one; None: all read out by the foundation's."""
        if HEAD not in self.execution.bank or not batch.segments:
            return None
        return [ClientHead(self.execution, segment.slot) for segment in batch.segments]

    def forward(self, batch: Batch, slot: int | None, rescale_C: list[float] | None = None) -> PassResult:
        """Run the model once, to score targets. `slot` is the common home slot (bitwise) or None (fast)."""
        return self.ensemble([batch], slot, rescale_C)

    def ensemble(self, batches: Sequence[Batch], slot: int | None, rescale_C: list[float] | None = None) -> PassResult:
        """Run the model once for each member of an ensemble, whose logits are averaged.

        Args:
            batches: the same samples for every member, who differ in the experts that their rows may be routed to.
        """
        first, *others = batches
        hidden_BSD, run = self._hidden(first, slot, rescale_C)
        # Of the others no more is kept than what the head reads.
        members = [first.predicting(hidden_BSD)]
        members += [batch.predicting(self._hidden(batch, slot, rescale_C)[0]) for batch in others]
        # All rows of an evaluation are read out by one slot's head.
        head = heads[0] if (heads := self.heads(first)) else self.head
        assert not heads or len({segment.slot for segment in first.segments}) == 1, "several clients' heads in an evaluation"
        nll_N, correct_N = scores(head, members, first.labels_N)
        return PassResult(nll_N, correct_N, first.targets, hidden_BSD, members, run, head)

    def read_out(self, batch: Batch, slot: int | None, rescale_C: list[float] | None = None) -> list[tuple[Head, Tensor]]:
        """Run the model once. By segment, what reads its client's hidden states out, and those of its targets, [N, D]."""
        hidden_BSD, _ = self._hidden(batch, slot, rescale_C)
        own = torch.split(batch.predicting(hidden_BSD), batch.targets)
        return list(zip(self.heads(batch) or [self.head] * len(own), own, strict=True))

    def loss(
        self,
        batch: Batch,
        slot: int | None,
        step_targets: list[int],
        rescale_C: list[float] | None = None,
        first_trained: int = 0,
        asked: list[Asked] | None = None,
    ) -> Loss:
        """Run the model once, to train it.

        The loss is the same for both tasks: cross-entropy of the next token, or of the class that the class token's hidden
        state is read out to; or it is what clients' objectives say.

        Args:
            step_targets: per segment, what its client's sum is divided by: the targets of its whole local step.
            first_trained: the first layer that is trained in this pass, the same on every rank of the cluster.
            asked: the objective of each segment's client, where clients have one.
        """
        hidden_BSD, run = self._hidden(batch, slot, rescale_C, first_trained)
        # Rounded as the division of a float32 loss is, whose derivative this is.
        weight_S = np.float32(1.0) / np.array(step_targets, dtype=np.float32)
        (weight_N,) = upload([np.repeat(weight_S, batch.targets)], hidden_BSD.device)
        hidden_ND = batch.predicting(hidden_BSD)
        if HEAD in self.execution.bank and not hidden_ND.requires_grad:
            # Nothing before the head is trained: the graph begins here.
            hidden_ND = hidden_ND.detach().requires_grad_()
        places = (batch.labels_N, weight_N, batch.predict_N, batch.targets)
        output = Output(self.head, hidden_ND, *places, run.routed, self.execution.wave.whole_steps, self.heads(batch))
        if asked is not None:
            total, nll_N, observed = output.minimise(asked)
            return Loss(total, nll_N, run, observed)
        total, nll_N = output.cross_entropy()
        return Loss(total, nll_N, run)

    def _hidden(
        self, batch: Batch, slot: int | None, rescale_C: list[float] | None, first_trained: int = 0
    ) -> tuple[Tensor, Pass]:
        """The body without its head: logits of all positions would be [B, S, V], and only those of targets are needed."""
        rows = (batch.segments, slot, batch.slot_T, batch.cap_T, batch.valid_T, batch.masks)
        run = Pass(*rows, rescale_C, batch.demands, batch.packed, batch.drawn_at, first_trained, batch.scores_T)
        # Stays set after this call: with activation checkpointing the layers run again in the backward pass and read it.
        self.execution.current = run
        model: Any = self.foundation.model
        if (gate := pre_gate_of(model)) is not None:
            run.gate_TE = decide(gate, self.execution, run, batch.input_ids)
        if self.foundation.task == "image_classification":
            return model.base_model(pixel_values=batch.pixels_BCHW).last_hidden_state, run
        at = {} if batch.packed is None else {"position_ids": batch.packed.position_T1}
        return model.base_model(input_ids=batch.input_ids, use_cache=False, **at).last_hidden_state, run


def segment_sums(values_N: Tensor, batch: Batch) -> list[Tensor]:
    """Sum of a per-target value for each segment of the batch; each sum covers one client's own values."""
    return [part.sum() for part in torch.split(values_N, batch.targets)]
