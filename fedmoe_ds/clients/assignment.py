"""Assignment: what a client is told to do in one round, decided by the method from the client's budget.

Legend: L layers with experts, E experts of the model, N transformer layers of the model, R adapter rank, M members.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmoe_ds.model.adapter_bank import BlockSpec

FIRST_STEP: tuple[np.ndarray, ...] = ()
"""A gradient probe without passes: it looks at gradients that exist anyway."""


@dataclass(frozen=True)
class PseudoGradient:
    """What an expert's gradient is given beside its own, out of those of the experts that a step has used.

    Attributes:
        factor: on all of it.
        of: which router probability of an expert counts: that of all `tokens` that did not use it, or that of a whole `batch`
            which did not.
    """

    factor: float
    of: Literal["tokens", "batch"] = "tokens"


@dataclass(frozen=True)
class Assignment:
    """What a client does in a round: a pure function of the two, so every rank of a cluster computes the same.

    Attributes:
        cap: most active experts per token.
        rows_R: bool, the LoRA rows (rows of A, columns of B) that the client receives and trains; None for all of them. The
            others are zero for this client: they change neither its output nor, since A and B vanish together, its gradient.
        scale: factor on the LoRA scale alpha / rank (FSLoRA's R / r).
        rescale: fixed factor on the expert output, or None (FLAME's static rescaler).
        allowed_LE: bool, the experts that it may route to in every layer, or None for all.
        trained_LE: bool, the experts that it trains, or None for all: rows of the others only run forward.
        trained_N: bool, the transformer layers whose adapters it trains, or None for all.
        trains_common: whether it trains what serves the whole model and belongs to no layer.
        trains_head: whether it trains its head, where clients have one.
        samples: int64 numbers of the training samples that it uses, or None for all.
        delay: it starts from the global adapters of so many rounds ago; None or 0: from those of this round.
        pseudo: what experts' gradients are given for rows that did not use them, or None.
        members_MLE: bool, the experts of each of the models that it trains side by side, in the place of `allowed_LE`; none has
            an expert of another. A step has passes of its own for every member, and their losses are added; an evaluation
            averages their logits. None: one model.
        fused: whether the passes of its members are one: their rows lie one member after the other, and its objective sees the
            logits of all of them.
        views: which view of its images each member reads, where the data have several; None: the whole image.
        density: it sends this share of the numbers of every tensor, those that it changed most; None: all.
        probe: numbers of the samples of every pass of its gradient probe, before the first step; `FIRST_STEP`: no pass of its
            own, the gradient of the first step is looked at; None: no probe.
        settle: what it makes of the numbers of that probe, [passes, ...]: bool [N], the transformer layers that it trains, in
            the place of `trained_N`. For probes with passes of their own; the same on every rank of its cluster.
    """

    cap: int
    rows_R: np.ndarray | None = None
    scale: float = 1.0
    rescale: float | None = None
    allowed_LE: np.ndarray | None = None
    trained_LE: np.ndarray | None = None
    trained_N: np.ndarray | None = None
    trains_common: bool = True
    trains_head: bool = True
    samples: np.ndarray | None = None
    delay: int | None = None
    pseudo: PseudoGradient | None = None
    members_MLE: np.ndarray | None = None
    fused: bool = False
    views: tuple[int, ...] | None = None
    density: float | Fraction | None = None
    probe: tuple[np.ndarray, ...] | None = None
    settle: Callable[[NDArray[np.float64]], NDArray[np.bool_]] | None = None

    @property
    def models(self) -> int:
        """How many models it trains side by side."""
        return 1 if self.members_MLE is None else len(self.members_MLE)

    def settled(self, numbers: NDArray[np.float64]) -> Assignment:
        """What the client does after its gradient probe has found these numbers."""
        return self if self.settle is None else replace(self, trained_N=self.settle(numbers), settle=None)

    def allowed_by(self, member: int) -> np.ndarray | None:
        """Bool [L, E], the experts that a member's rows may be routed to, or None for all."""
        return self.allowed_LE if self.members_MLE is None else self.members_MLE[member]

    def view_of(self, member: int) -> int | None:
        """The view that a member reads, or None for the whole image."""
        return None if self.views is None else self.views[member]

    @property
    def held_LE(self) -> np.ndarray | None:
        """Bool, the experts that some of its rows may be routed to, or None for all."""
        if self.members_MLE is None:
            return self.allowed_LE
        held_LE: np.ndarray = np.logical_or.reduce(self.members_MLE)
        return held_LE

    def rank(self, full: int) -> int:
        """Number of LoRA rows trained."""
        return full if self.rows_R is None else int(self.rows_R.sum())

    @property
    def first_trained(self) -> int:
        """The first layer that it trains; the one after the last where it trains none."""
        if self.trained_N is None:
            return 0
        return int(self.trained_N.argmax()) if self.trained_N.any() else len(self.trained_N)

    def mask(self, spec: BlockSpec, device: torch.device) -> Tensor | None:
        """Bool, shaped to broadcast over one `item` of this block: True where the client holds it. None: everywhere."""
        if self.rows_R is None or spec.rank_axis is None:
            return None
        rows_R = torch.from_numpy(self.rows_R).to(device)
        return rows_R.unsqueeze(1) if spec.rank_axis == 0 else rows_R.unsqueeze(0)

    def trains(self, spec: BlockSpec) -> np.ndarray | None:
        """Bool, to be broadcast over [L, E] of an expert block or [L] of a dense one: what the client trains; None for all."""
        if spec.after_layers:
            return None if self.trains_head else np.zeros(len(spec.layers), dtype=bool)
        experts_LE = self._trained_LE if spec.expert else None
        common = not self.trains_common and min(spec.layers, default=0) < 0
        if self.trained_N is None and not common:
            return experts_LE
        # What serves the whole model belongs to no layer that could be left out.
        layers_L = np.array([self._trains_layer(layer) for layer in spec.layers])
        layers = layers_L[:, None] if spec.expert else layers_L
        return layers if experts_LE is None else experts_LE & layers

    def _trains_layer(self, layer: int) -> bool:
        return self.trains_common if layer < 0 else self.trained_N is None or bool(self.trained_N[layer])

    @property
    def all_trained(self) -> bool:
        """Whether it trains all that there is to train."""
        whole = self.trained_N is None and self.trained_LE is None and self.members_MLE is None
        return whole and self.trains_common and self.trains_head

    @property
    def _trained_LE(self) -> np.ndarray | None:
        # No row of a member goes to experts of none, which would move by weight decay alone.
        if self.members_MLE is None or self.held_LE is None:
            return self.trained_LE
        return self.held_LE if self.trained_LE is None else self.held_LE & self.trained_LE


def leading(rank: int, full: int) -> np.ndarray | None:
    """The first `rank` of `full` LoRA rows as a mask; None when these are all."""
    # None and not a mask of ones: a client of full rank then shares the global rows without a masked copy.
    return None if rank >= full else np.arange(full) < rank
