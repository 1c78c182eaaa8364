"""Objective: what one client minimises, or sums up, at the model's output, where that is not plain cross-entropy.

An objective with a loss sees logits. They are held for one client at a time: of all targets of its pass where the loss needs
them at once, else of as many as a chunk of cross-entropy has (`fedmoe_ds.model.cross_entropy`), one chunk after the other. An
objective that only sums up sees everything but logits, after the loss, whose bits stay those of cross-entropy.

Legend: N targets, V vocabulary or classes, D model width, L layers with experts, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmoe_ds.model.cross_entropy import Head, chunks, logits_of, weighted_loss, weighted_losses
from fedmoe_ds.model.router import Routing
from fedmoe_ds.model.upload import upload

Sums = dict[str, Tensor]
"""Named numbers that are added up, in float64, over a client's local training."""


@dataclass(frozen=True)
class TokenRouting:
    """Where the tokens that predict the targets went, layer by layer; without gradients.

    Attributes:
        experts_LNK: global ids of the selected experts, best first.
        weights_LNK: their routing weights; zero where not kept.
        kept_LNK: False beyond the client's cap and for masked experts.
    """

    experts_LNK: Tensor
    weights_LNK: Tensor
    kept_LNK: Tensor


@dataclass(frozen=True)
class LocalStep:
    """Which local step of its client a pass belongs to.

    Attributes:
        targets: of the whole step, whose mean loss is minimised.
        index, count: its number, from 0, and how many there are.
        last_epoch: whether it belongs to the last pass over the client's samples.
    """

    targets: int
    index: int = 0
    count: int = 1
    last_epoch: bool = True


@dataclass(frozen=True)
class Targets:
    """Targets of one client in one pass, in the order of its samples: next tokens, or the classes of images.

    Attributes:
        labels_N: the right tokens, or classes.
        nll_N: their negative log-likelihoods, float32.
        hidden_ND: what the head reads.
        sample_N: int64, which of the client's training samples (sequences, images) each target belongs to.
        place_N: the token row that predicts each of them.
        routed: decisions for all token rows of the pass, by layer.
        step: of whose local training this is a part.
        taught_N: what `Objective.teach` has made of the received model's logits of these targets; None: it was not asked.
    """

    labels_N: Tensor
    nll_N: Tensor
    hidden_ND: Tensor
    sample_N: Tensor
    place_N: Tensor
    routed: Mapping[int, Routing]
    step: LocalStep
    taught_N: Tensor | None = field(default=None, kw_only=True)

    @cached_property
    def routing(self) -> TokenRouting:
        """Experts and weights of the tokens that predict these targets."""
        rows = [self.routed[layer].rows(self.place_N) for layer in sorted(self.routed)]
        if not rows:  # a foundation without experts
            none_LNK = self.place_N.new_zeros(0, len(self.place_N), 0)
            return TokenRouting(none_LNK, none_LNK.float(), none_LNK.bool())
        experts, weights = torch.stack([row.experts_TK for row in rows]), torch.stack([row.weights_TK for row in rows])
        return TokenRouting(experts, weights, torch.stack([row.kept_TK for row in rows]))

    def part(self, rows: slice) -> Targets:
        """Some of them."""
        names = [each.name for each in fields(Targets) if each.name.endswith(("_N", "_ND"))]
        return replace(self, **{name: value[rows] for name in names if (value := getattr(self, name)) is not None})


@dataclass(frozen=True)
class Predictions(Targets):
    """Targets with their logits, float32; they, `nll_N` and `hidden_ND` have gradients."""

    logits_NV: Tensor


@dataclass(frozen=True)
class Objective:
    """What one client minimises, or sums up, at the model's output; both functions are called on its home rank alone.

    Attributes:
        loss: (predictions) -> (what is minimised in the place of cross-entropy, named sums). The first is a scalar: the sum
            over these targets, which is divided by the targets of the whole step. None: cross-entropy.
        observe: (targets) -> named sums.
        teach: (logits [N, V] of the model that the client has received) -> a number for each of these targets, which `loss`
            finds as `taught_N`; with `Method.teaches`. Called before the first step, for some targets at a time.
        labelled: whether labels are known, so that the record has cross-entropy whatever is minimised; else it has the loss
            itself.
    """

    loss: Callable[[Predictions], tuple[Tensor, Sums]] | None = None
    observe: Callable[[Targets], Sums] | None = None
    teach: Callable[[Tensor], Tensor] | None = None
    labelled: bool = True


@dataclass(frozen=True)
class Asked:
    """One client's objective, and the part of a pass that it is asked about; `sample_N` and `taught_N` as in `Targets`."""

    objective: Objective
    sample_N: np.ndarray
    step: LocalStep
    taught_N: Tensor | None = None


@dataclass(frozen=True)
class Output:
    """What a pass has at the head: per target its hidden state, label, weight in the loss and token row.

    Attributes:
        sizes: targets of each client.
        heads: of each client, where clients train one; None: `head` reads out everybody's.
        routed: decisions for all token rows, by layer.
        whole: whether a loss needs all targets of a client's pass at once.
    """

    head: Head
    hidden_ND: Tensor
    labels_N: Tensor
    weight_N: Tensor
    place_N: Tensor
    sizes: list[int]
    routed: Mapping[int, Routing]
    whole: bool
    heads: Sequence[Head] | None = None

    def minimise(self, asked: Sequence[Asked]) -> tuple[Tensor, Tensor, list[Sums]]:
        """Ask every client of the pass.

        Returns:
            Their losses added up, the negative log-likelihood of every target, without a gradient, and the sums of each client.
        """
        sums: list[Sums] = [{} for _ in asked]
        if all(one.objective.loss is None for one in asked):
            total, nll_N = self.cross_entropy()
        else:
            # Split and not sliced: the gradients of the parts are then joined, and none is added to another's zeros.
            parts = zip(range(len(asked)), asked, torch.split(self.hidden_ND, self.sizes), sums, strict=True)
            totals, nll = zip(*(self._own_loss(*each) for each in parts), strict=True)
            total, nll_N = torch.stack(totals).sum(), torch.cat(nll)
        for place, own_N in enumerate(torch.split(nll_N, self.sizes)):
            observe = asked[place].objective.observe
            if observe is not None and len(own_N):
                with torch.no_grad():
                    add_sums(sums[place], observe(self._targets(asked[place], place, own_N)))
        return total, nll_N, sums

    def cross_entropy(self) -> tuple[Tensor, Tensor]:
        """What is minimised without objectives: all clients at once, unless each has a head of its own."""
        given = (self.hidden_ND, self.labels_N, self.weight_N)
        return weighted_losses(self.heads, *given, self.sizes) if self.heads else weighted_loss(self.head, *given)

    def _own_loss(self, place: int, one: Asked, x_ND: Tensor, sums: Sums) -> tuple[Tensor, Tensor]:
        """One client's loss, and the negative log-likelihood of its targets."""
        labels_N, weight_N, *_ = self._parts[place]
        head = self.heads[place] if self.heads else self.head
        if one.objective.loss is None:
            return weighted_loss(head, x_ND, labels_N, weight_N)
        given = self._targets(one, place, torch.zeros_like(weight_N))
        found: tuple[Tensor, Tensor] = _OwnLoss.apply(  # type: ignore[no-untyped-call]
            x_ND, weight_N, head, given, one.objective, self.whole, sums
        )
        return found

    def _targets(self, one: Asked, place: int, nll_N: Tensor) -> Targets:
        labels_N, _, hidden_ND, place_N = self._parts[place]
        (sample_N,) = upload([one.sample_N], nll_N.device)
        places = (sample_N, place_N, self.routed, one.step)
        return Targets(labels_N, nll_N, hidden_ND, *places, taught_N=one.taught_N)

    @cached_property
    def _parts(self) -> list[tuple[Tensor, ...]]:
        """Labels, weights, hidden states without a gradient, and token rows of each client."""
        values = (self.labels_N, self.weight_N, self.hidden_ND.detach(), self.place_N)
        return list(zip(*(torch.split(each, self.sizes) for each in values), strict=True))


class _OwnLoss(torch.autograd.Function):
    """A client's own loss, differentiated where its logits are, which are then dropped: see `cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_N: Tensor, head: Head, given: Targets, objective: Objective, whole: bool, sums: Sums
    ) -> tuple[Tensor, Tensor]:
        nll_N, grad_ND, total = torch.empty_like(weight_N), torch.empty_like(x_ND), weight_N.new_zeros(())
        rows = len(x_ND)
        assert objective.loss is not None
        for part in [slice(0, rows)] * (rows > 0) if whole else chunks(rows, head.out_features):
            with torch.enable_grad():
                own_ND = x_ND[part].detach().requires_grad_()
                logits_NV = logits_of(head, own_ND)
                own_N = F.cross_entropy(logits_NV, given.labels_N[part], reduction="none")
                found, more = objective.loss(_predictions(given.part(part), own_N, own_ND, logits_NV))
            # What the loss needs of the logits for its gradient, its graph holds.
            del logits_NV
            assert found.ndim == 0, f"an objective's loss is a scalar, and not {list(found.shape)}"
            # One over the targets of the step, as each target of cross-entropy has it.
            share = weight_N[part][0].to(found.dtype)
            (grad_ND[part],) = torch.autograd.grad(found, own_ND, share)
            # Only the sum over a step is recorded: whose part of it a target is does not count.
            nll_N[part] = own_N.detach() if objective.labelled else found.detach() / len(own_N)
            total += found.detach() * share
            add_sums(sums, more)
        ctx.save_for_backward(grad_ND)
        ctx.mark_non_differentiable(nll_N)
        return total, nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0], None, None, None, None, None, None


def _predictions(given: Targets, nll_N: Tensor, hidden_ND: Tensor, logits_NV: Tensor) -> Predictions:
    known = {each.name: getattr(given, each.name) for each in fields(Targets)}
    return Predictions(**(known | {"nll_N": nll_N, "hidden_ND": hidden_ND}), logits_NV=logits_NV)


def add_sums(sums: Sums, more: Sums) -> None:
    """Add named numbers to those so far, in place."""
    for name, value in more.items():
        # Without a gradient: it would hold the logits from pass to pass.
        value = value.detach().double()
        sums[name] = sums[name] + value if name in sums else value
