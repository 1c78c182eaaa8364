"""Router: top-k with a per-client cap on the number of active experts.

Legend: T token rows, E experts of the model, K the model's own top-k.

FLAME section on client-specific activation: R_i(x, k_i)^j = p_j if j is among the k_i largest, else 0 (the notation is the
paper's, the explicit form our completion). The cap, the validity of a row and the expert mask are data, one entry per row, so
clients with different budgets share one call. Score functions, normalisation, expert groups and correction biases follow the
hosted DeepSpeed router, so that an uncapped row routes exactly like the original model. A `Modulation` is what a
federation adds to the logits of the experts that a row likes best, among which it then chooses. A straight-through gate weighs
the chosen expert p / stopgrad(p): its value is 1 whatever p is, its gradient that of log p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

UNIT = "unit"
"""Score function of gates that are one for whoever is chosen."""


class RouterSpec(Protocol):
    """The fields of DeepSpeed's TokenChoiceTopKRouter that routing reads."""

    @property
    def num_experts(self) -> int: ...

    @property
    def num_expert_groups(self) -> int | None: ...

    @property
    def num_limited_groups(self) -> int | None: ...

    @property
    def top_k(self) -> int: ...

    @property
    def score_func(self) -> str: ...

    @property
    def route_norm(self) -> bool: ...

    @property
    def route_scale(self) -> float: ...

    @property
    def group_score_func(self) -> str: ...

    @property
    def e_score_correction_bias(self) -> Tensor | None: ...


@dataclass(frozen=True)
class ZeroSlots:
    """What rows have given to experts that add nothing: scores (fp32, differentiable), and whether they have chosen them."""

    probs_TZ: Tensor
    chosen_TZ: Tensor


@dataclass(frozen=True)
class Routing:
    """The decision for every row.

    Attributes:
        probs_TE: scores of all experts (fp32, differentiable), for the auxiliary losses.
        weights_TK: routing weights of the selected experts, best first (differentiable); zero where not kept.
        experts_TK: their global ids.
        kept_TK: False for slots beyond the row's cap, masked experts and padding rows. Such slots cost nothing downstream.
        kept: how many slots are kept, where that is known without a look at the device; None where it depends on the scores.
        overlap_TE: how many of a row's largest channels each expert has (`foundation/pre_gate.py`), where observers ask for it.
        zeros: of experts that add nothing, where there are some: they are none of the E, and no slot of theirs is kept.
    """

    probs_TE: Tensor
    weights_TK: Tensor
    experts_TK: Tensor
    kept_TK: Tensor
    kept: int | None = None
    overlap_TE: Tensor | None = None
    zeros: ZeroSlots | None = None

    def counts_E(self) -> Tensor:
        """int64 [E]: kept slots per expert."""
        # Zeros are added for the others: to pick slots by their mask, the host would wait for the device to say how many.
        zeros_E = self.experts_TK.new_zeros(self.probs_TE.shape[1])
        return zeros_E.scatter_add_(0, self.experts_TK.flatten(), self.kept_TK.flatten().long())

    def with_zeros(self) -> tuple[Tensor, Tensor]:
        """Scores [T, E + Z], and slots per expert [E + Z]: experts that add nothing stand last, where there are some."""
        if self.zeros is None:
            return self.probs_TE, self.counts_E()
        counts = torch.cat([self.counts_E(), self.zeros.chosen_TZ.sum(0)])
        return torch.cat([self.probs_TE, self.zeros.probs_TZ], dim=1), counts

    def apart(self, experts: int) -> Routing:
        """Of a decision among more than so many experts: the others become `zeros`, and their slots are dropped."""
        zero_TK = self.experts_TK >= experts
        chosen_TZ = torch.zeros_like(self.probs_TE, dtype=torch.bool).scatter_(1, self.experts_TK, self.kept_TK)[:, experts:]
        # Slots are padded with an expert that exists: whoever looks one up must find something.
        real_TK = self.experts_TK.masked_fill(zero_TK, 0)
        zeros = ZeroSlots(self.probs_TE[:, experts:], chosen_TZ)
        weights_TK, kept_TK = self.weights_TK * ~zero_TK, self.kept_TK & ~zero_TK
        return Routing(self.probs_TE[:, :experts], weights_TK, real_TK, kept_TK, zeros=zeros)

    def detached(self) -> Routing:
        """The decision without its graph, and without the scores of experts that were not selected."""
        none_TE = self.probs_TE.new_empty(len(self.probs_TE), 0)
        return Routing(none_TE, self.weights_TK.detach(), self.experts_TK, self.kept_TK, self.kept)

    def rows(self, places: slice | Tensor) -> Routing:
        """The decision for some of the rows, given as a slice or by their numbers."""

        def some(values: Tensor) -> Tensor:
            return values[places] if isinstance(places, slice) else values.index_select(0, places)

        zeros = None if self.zeros is None else ZeroSlots(some(self.zeros.probs_TZ), some(self.zeros.chosen_TZ))
        overlap_TE = None if self.overlap_TE is None else some(self.overlap_TE)
        own = (some(self.probs_TE), some(self.weights_TK), some(self.experts_TK), some(self.kept_TK))
        return Routing(*own, overlap_TE=overlap_TE, zeros=zeros)


@dataclass(frozen=True)
class Modulation:
    """What moves the choice of rows among the experts that they like best; both what is chosen, and what it weighs.

    Attributes:
        bias_TE: added to the logits of a row's candidates, float32.
        candidates: so many experts with the largest scores are a row's candidates, and nobody else is chosen; no fewer than
            the row's cap, which then keeps as many slots as without.
    """

    bias_TE: Tensor
    candidates: int

    def near(self, choice_TE: Tensor) -> Tensor:
        """Bool [T, E]: every row's candidates, none of which it may not choose."""
        places_TN = choice_TE.topk(min(self.candidates, choice_TE.shape[1]), dim=-1).indices
        # Of few eligible experts topk fills up with others, any of them: their logits would count in the softmax of all.
        return torch.zeros_like(choice_TE, dtype=torch.bool).scatter_(1, places_TN, True) & ~choice_TE.isneginf()


@dataclass(frozen=True)
class Demand:
    """What the rows of one client in a pass ask of a router, as the host knows it: rows without padding, their cap, and how
    many experts they may use (None for all)."""

    rows: int
    cap: int
    allowed: int | None = None


def kept_slots(demands: list[Demand], spec: RouterSpec) -> int | None:
    """Slots that these rows keep in a layer: they follow from the caps, unless a mask meets a limit to groups of experts."""
    eligible = spec.num_experts
    if spec.num_expert_groups is not None:
        assert spec.num_limited_groups is not None
        if any(demand.allowed is not None for demand in demands):
            # How many of the allowed experts are in a row's best groups depends on its scores.
            return None
        eligible = eligible // spec.num_expert_groups * spec.num_limited_groups
    most = min(spec.top_k, eligible)
    return sum(d.rows * min(d.cap, most if d.allowed is None else min(most, d.allowed)) for d in demands)


def route(
    logits_TE: Tensor,
    spec: RouterSpec,
    cap_T: Tensor,
    valid_T: Tensor,
    allowed_TE: Tensor | None = None,
    demands: list[Demand] | None = None,
    held_softmax: bool = False,
    modulation: Modulation | None = None,
    straight_through: bool = False,
) -> Routing:
    """Route rows under their caps.

    Args:
        logits_TE: raw router logits.
        spec: the model's routing rule.
        cap_T: int64, most experts a row may use (1 <= cap <= K).
        valid_T: bool, False for padding.
        allowed_TE: bool expert mask per row; None allows all.
        demands: the same in numbers, per client; with them the number of kept slots is known on the host.
        held_softmax: softmax scores weigh as if the router had no rows of experts that a row may not use.
        modulation: of the logits; None: they are what they are.
        straight_through: chosen experts weigh p / stopgrad(p) each, in the place of their scores.
    """
    scores_TE = _scores(logits_TE, spec)
    # Selection has no gradient; the router learns through the gathered weights and the auxiliary losses alone.
    with torch.no_grad():
        choice_TE = _choice(scores_TE.detach(), spec, allowed_TE)
    if modulation is not None:
        # What was not eligible is not now; groups are those that the model itself would choose.
        near_TE = modulation.near(choice_TE)
        logits_TE = logits_TE.float() + modulation.bias_TE * near_TE
        scores_TE = _scores(logits_TE, spec)
        choice_TE = _corrected(scores_TE.detach(), spec).masked_fill(~near_TE, float("-inf"))
    with torch.no_grad():
        # topk sorts, best first, and the cap relies on it. The shape keeps all K slots, so rows of any cap share a call.
        best_TK, experts_TK = choice_TE.topk(spec.top_k, dim=-1)
        slots_K = torch.arange(spec.top_k, device=logits_TE.device)
        # Slots count from 0, so `<` keeps exactly cap of them, the largest. Where fewer than K experts are eligible, topk
        # fills up with masked ones, at -inf; those are dropped here. A score that is no number keeps its slot: how many are
        # kept then never depends on the scores, and the loss says that a client's router has blown up.
        kept_TK = (slots_K < cap_T.unsqueeze(-1)) & valid_T.unsqueeze(-1) & ~best_TK.isneginf()
    # Zero before the normalisation: the kept weights of a capped row then sum to one by themselves.
    weighing_TE, kept = scores_TE, None if demands is None else kept_slots(demands, spec)
    if held_softmax and allowed_TE is not None and spec.score_func == "softmax":
        # For a row that may use all experts these are the same bits as without a mask, whoever shares the pass.
        # The least number and not minus infinity, of which a row without any expert would make no number.
        logits_TE = logits_TE.float().masked_fill(~allowed_TE, torch.finfo(torch.float32).min)
        weighing_TE = logits_TE.softmax(-1)
    if straight_through:
        return Routing(scores_TE, _straight_through(logits_TE, experts_TK) * kept_TK, experts_TK, kept_TK, kept)
    if spec.score_func == UNIT:
        # Scores say who is chosen, and nothing about what it weighs.
        weighing_TE = torch.ones_like(scores_TE)
    weights_TK = weighing_TE.gather(1, experts_TK) * kept_TK
    if spec.route_norm:
        # The hosted router's own epsilon; a padding row, all of whose weights are zero, stays zero and does not become NaN.
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return Routing(scores_TE, weights_TK * spec.route_scale, experts_TK, kept_TK, kept)


def _straight_through(logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """p / stopgrad(p) of these experts, p their softmax probability."""
    # By its logarithm: a probability that has underflowed, of a masked row's only expert, is divided by zero nowhere.
    log_p_TK = logits_TE.float().log_softmax(-1).gather(1, experts_TK)
    return torch.exp(log_p_TK - log_p_TK.detach())


def _scores(logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    # Scores are float32 whatever the rows are, as in the hosted router: the order of near-equal experts must not change.
    return logits_TE.float().softmax(-1) if spec.score_func in ("softmax", UNIT) else logits_TE.float().sigmoid()


def _corrected(scores_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Scores by which experts are chosen."""
    # The bias decides who is chosen and never what it weighs (auxiliary-loss-free balancing, DeepSeek-V3).
    return scores_TE if spec.e_score_correction_bias is None else scores_TE + spec.e_score_correction_bias


def _choice(scores_TE: Tensor, spec: RouterSpec, allowed_TE: Tensor | None) -> Tensor:
    """The same, minus infinity where a row may not choose."""
    choice_TE = _corrected(scores_TE, spec)
    if spec.num_expert_groups is not None:
        choice_TE = _limit_groups(choice_TE, spec)
    # After the group limit, so that a client's mask does not change which groups the model itself would choose.
    return choice_TE if allowed_TE is None else choice_TE.masked_fill(~allowed_TE, float("-inf"))


def _limit_groups(choice_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Node-limited routing: only the best `num_limited_groups` expert groups of a row stay eligible."""
    assert spec.num_expert_groups is not None and spec.num_limited_groups is not None
    grouped = choice_TE.view(choice_TE.shape[0], spec.num_expert_groups, -1)
    # DeepSeek-V2 scores a group by its best expert, DeepSeek-V3 by the sum of its two best.
    by_max = spec.group_score_func == "max"
    score = grouped.amax(-1) if by_max else grouped.topk(2, dim=-1).values.sum(-1)
    best = score.topk(spec.num_limited_groups, dim=-1).indices
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(-2)
