"""Forward: the hosted model as clients use it, one pass over a batch, with the negative log-likelihood of every target.

Legend: B sequences or images, S positions, D model width, N targets (next tokens, or classes), V vocabulary or classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmoe_ds.foundation import Foundation
from fedmoe_ds.model.batch import Batch, Rows, make_batch
from fedmoe_ds.model.pass_context import Execution, Pass


@dataclass(frozen=True)
class PassResult:
    """Outcome of one forward pass: per target (row order) its negative log-likelihood, the logits behind it, and the label;
    `targets` are counts per segment."""

    nll_N: Tensor
    logits_NV: Tensor
    labels_N: Tensor
    targets: list[int]
    hidden_BSD: Tensor
    run: Pass

    @property
    def correct_N(self) -> Tensor:
        """Whether the likeliest token (or class) of every target is the right one."""
        return self.logits_NV.argmax(-1) == self.labels_N


@dataclass(frozen=True)
class AdaptedModel:
    """The frozen model with the federated layers installed, and what those layers read; `packing` lays samples end to end."""

    foundation: Foundation
    execution: Execution
    packing: bool = False

    def batch(self, rows: list[Rows]) -> Batch:
        """Rows of clients as one batch on the model's device."""
        execution = self.execution
        return make_batch(rows, execution.pool.num_experts, execution.bank.device, self.foundation.images, self.packing)

    def forward(self, batch: Batch, slot: int | None, rescale_C: list[float] | None = None) -> PassResult:
        """Run the model once. `slot` is the common home slot (bitwise) or None (fast); logits exist for target rows only.

        The loss is the same for both tasks: cross-entropy of the next token, or of the class that the class token's hidden
        state is read out to.
        """
        rows = (batch.segments, slot, batch.slot_T, batch.cap_T, batch.valid_T, batch.allowed_TE)
        run = Pass(*rows, rescale_C, batch.demands, batch.packed, batch.drawn_at)
        # Stays set after this call: with activation checkpointing the layers run again in the backward pass and read it.
        self.execution.current = run
        model: Any = self.foundation.model
        if self.foundation.task == "image_classification":
            hidden_BSD = model.base_model(pixel_values=batch.pixels_BCHW).last_hidden_state
            head = model.classifier
        else:
            # The body without its head: logits of all positions would be [B, S, V], and only those of targets are needed.
            at = {} if batch.packed is None else {"position_ids": batch.packed.position_T1}
            hidden_BSD = model.base_model(input_ids=batch.input_ids, use_cache=False, **at).last_hidden_state
            head = model.get_output_embeddings()
        # Float32: a log-softmax over a vocabulary loses its small differences in bfloat16.
        logits_NV = head(batch.predicting(hidden_BSD)).float()
        nll_N = F.cross_entropy(logits_NV, batch.labels_N, reduction="none")
        # Detached: logits serve accuracies, and would otherwise keep the graph for as long as somebody holds the result.
        return PassResult(nll_N, logits_NV.detach(), batch.labels_N, batch.targets, hidden_BSD, run)


def segment_sums(values_N: Tensor, batch: Batch) -> list[Tensor]:
    """Sum of a per-target value for each segment of the batch; each sum covers one client's own values."""
    return [part.sum() for part in torch.split(values_N, batch.targets)]
