"""Cross-entropy: the negative log-likelihood of every target, with the logits of a few rows at a time.

Logits [N, V] of a whole pass are the largest tensor that there is: 16 bytes each where autograd keeps and differentiates them,
25 GiB for 16 sequences of 2 048 tokens at a vocabulary of 50 304. Nothing needs them all at once. The head is frozen, and what
the loss weighs each target with is known before the pass, so the gradient of the hidden states is computed where the logits
are, and the logits are dropped. What is kept is a gradient of the size of the hidden states, and nothing is computed twice.
Wijmans et al. (arXiv 2411.09009) and Hsu et al. (arXiv 2410.10989) chunk heads that are trained.

Rows are taken by themselves: on a head that treats them so (`fedmoe_ds.kernels.frozen_layers`) no bit depends on the chunks.

Legend: N targets, D model width, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 2**25
"""Logits at a time: 128 MiB in float32, and enough rows (667 at 50 304 entries) to fill a device with their products."""
COPIES = 3
"""Float32 tensors of a chunk's logits at the most: log-probabilities, their gradient, and that of the logits."""
_TILE = 64


class Head(Protocol):
    """What makes logits of hidden states. One that is trained (`client_head`) adds to its own gradient where logits are
    differentiated."""

    out_features: int

    def __call__(self, x_ND: Tensor, /) -> Tensor: ...


def chunk_rows(classes: int) -> int:
    """Rows of a chunk; their products run in tiles, which a chunk fills."""
    rows = max(1, LOGITS // max(classes, 1))
    return rows - rows % _TILE if rows > _TILE else rows


def chunks(count: int, classes: int) -> Iterator[slice]:
    """Rows whose logits are held at a time."""
    rows = chunk_rows(classes)
    return (slice(first, min(first + rows, count)) for first in range(0, count, rows))


def logits_of(head: Head, x_ND: Tensor) -> Tensor:
    """Float32: a log-softmax over a vocabulary loses its small differences in bfloat16."""
    return head(x_ND).float()


def mean_logits(head: Head, members: Sequence[Tensor]) -> Tensor:
    """Those of an ensemble, the mean over its members' (float32), from the hidden states [N, D] of each; of one its own."""
    first, *others = members
    logits_NV = logits_of(head, first)
    if not others:
        return logits_NV
    total_NV = logits_NV.double()
    for x_ND in others:
        total_NV += logits_of(head, x_ND)
    # In float64, where few float32 numbers add up without rounding: the order of members then matters for no bit.
    return (total_NV / len(members)).float()


@torch.no_grad()
def scores(head: Head, members: Sequence[Tensor], labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of every target (float32), and whether the likeliest token (or class) is the right one.

    Args:
        members: what each model of an ensemble reads out, [N, D]; of a single model one.
    """
    nll_N = members[0].new_empty(len(labels_N), dtype=torch.float32)
    correct_N = labels_N.new_empty(len(labels_N), dtype=torch.bool)
    # The mean over several takes a float64 beside a member's logits: chunks of half as many rows hold no more.
    copies = 1 if len(members) == 1 else 2
    for part in chunks(len(labels_N), copies * head.out_features):
        logits_NV = mean_logits(head, [x_ND[part] for x_ND in members])
        nll_N[part] = F.cross_entropy(logits_NV, labels_N[part], reduction="none")
        correct_N[part] = logits_NV.argmax(-1) == labels_N[part]
    return nll_N, correct_N


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, labels_N: Tensor, weight_N: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        nll_N, grad_ND = torch.empty_like(weight_N), torch.empty_like(x_ND)
        for part in chunks(len(x_ND), head.out_features):
            # Autograd itself differentiates a chunk: whatever the head is, these are the bits of one without chunks.
            with torch.enable_grad():
                own_ND = x_ND[part].detach().requires_grad_()
                own_N = F.cross_entropy(logits_of(head, own_ND), labels_N[part], reduction="none")
            (grad_ND[part],) = torch.autograd.grad(own_N, own_ND, weight_N[part])
            nll_N[part] = own_N.detach()
        ctx.save_for_backward(grad_ND)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weight_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        # Exact where the loss is summed up and differentiated as it is: the factor is one.
        return grad_ND * grads[0], None, None, None


def weighted_loss(head: Head, x_ND: Tensor, labels_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of all targets' negative log-likelihoods, each times its weight (float32), and they themselves.

    Only the sum can be differentiated, by the hidden states. Without targets it is zero, and has a gradient all the same.
    """
    found: tuple[Tensor, Tensor] = _WeightedLoss.apply(x_ND, labels_N, weight_N, head)  # type: ignore[no-untyped-call]
    return found


def weighted_losses(
    heads: Sequence[Head], x_ND: Tensor, labels_N: Tensor, weight_N: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """The same where every client has a head of its own; `sizes` are the targets of each."""
    # Split and not sliced: the gradients of the parts are then joined, and none is added to another's zeros.
    parts = (torch.split(values, sizes) for values in (x_ND, labels_N, weight_N))
    totals, nll = zip(*(weighted_loss(head, *own) for head, *own in zip(heads, *parts, strict=True)), strict=True)
    return torch.stack(totals).sum(), torch.cat(nll)
