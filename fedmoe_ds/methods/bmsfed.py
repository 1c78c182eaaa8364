"""BMSFed: balanced modality selection; clients and modalities are chosen so that the weaker modality catches up.

Fan et al., arXiv 2401.00403. Legend: N targets, B samples, C classes, D width of a feature, L layers, E experts, J numbers of a
fingerprint; k a client, c a class, m one of the modalities 0 and 1, f_m its feature, z_m its logits, o the other one.

READ (the abstract): modalities are unbalanced within clients and between them; modal enhancement alleviates the first, and
the choice of clients and of modalities, by submodular functions, the second. CODE
(fanyunfeng-bit/Balanced-Modality-Selection-in-MFL @ 14c762c3) gives the formulas:

    prototypes   a_{m,c} = sum_k n_{k,c} f_{k,m,c} / sum_k n_{k,c}                   mean features of a class, by modality
    likeness     s_m(x, c) = -|f_m(x) - a_{m,c}|
    imbalance    r = sum_n softmax(s_0)[y_n] / sum_n softmax(s_1)[y_n]               of a batch
    loss         CE(z, y) + alpha CE(s_w, y),   w = 1 where r > 1, 0 where r < 1, no second term where r = 1
                 CE(z_m, y) + alpha CE(s_m, y)                                       of a client that trains m alone
    choice       one client after the other, out of max(S, N/10) drawn ones not chosen yet, the one that minimises
                 sum_i min(own_i, |u_i - u_j|): facility location on the clients' updates u
    modality     where the weighted mean R of the clients' r_k is above 1, the best candidate by updates of encoder 1 alone is
                 taken, to train 1 alone, if its own r_k exceeds a threshold, otherwise the best by whole updates; mirrored for
                 R at most 1 and 1 / r_k. Updates of modality m alone have nearest chosen ones of their own
    mean         an encoder over the clients that trained it, by data size

COMPLETION:
- A modality is one view of an image (`data.form`), its encoder the frozen foundation with adapter expert m alone. Fusion is
  late, z = (z_0 + z_1) / 2, with the frozen head; the paper's fusion layer is trained.
- A client's r_k is the ratio of the likenesses of its last local epoch by the prototypes that it received, not an accuracy by
  its own ones in one more pass; of a modality that it has not trained since, the last one counts. Before there are any it is 1.
- Prototypes are summed up in the last local epoch, as FedFM's stale anchors; a class without any keeps what it has.
- An update's fingerprint are 64 numbers per modality (`clients/fingerprint.py`). That of a whole update is both: with the
  fingerprint of a modality both matrices are refreshed, where the code refreshes the one that the client was chosen by.
- The code trains everybody once before the first round. Here clients that nobody has seen come first, in drawn order, with both
  modalities, so that ceil(N / S) rounds have seen all. Ties go by index, candidates are drawn by round and pick.
- `selection: random` is the baseline without a choice: the drawn clients, both modalities.

Limits: two modalities, which every client has. Whoever `federation.sampling` would draw only says how many take part. All ranks
keep 130 numbers of every client, and choose alike: N^2 / 10 S distances of 64 numbers at most. Reported training losses are the
mean of the modalities' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import (
    Assignment,
    BlockSpec,
    Client,
    ClientUpdate,
    ClientView,
    Config,
    Facilities,
    Memory,
    Method,
    MethodInfo,
    MethodParams,
    Objective,
    PlanContext,
    Predictions,
    Projection,
    RoundContext,
    RoundPlan,
    Statistic,
    Summary,
    Sums,
    UserError,
    check_own_experts,
    class_means,
    class_shapes,
    class_sums,
    generator,
    without_routers,
)

BOTH = (0, 1)
PROTOTYPES = "prototypes"
"""Statistic [2 C, D]: those of modality 0, then those of modality 1."""
LIKENESS, LIKENED = "likeness", "likened"
"""Sums [2] over the last local epoch: likenesses of the right class by modality, and of how many targets."""
FINGERPRINT, NUMBERS = "fingerprint", 64
_NOT_ENHANCED = -100


class BMSFedParams(MethodParams):
    """BMSFed's balance; the released script has alpha 1 or 2, and thresholds of 1 to 2."""

    alpha: float = Field(1.0, ge=0, description="weight of the weaker modality's loss by prototypes; 0: cross-entropy alone")
    threshold: float = Field(
        1.0, ge=1, description="imbalance of a client above which it trains the weaker modality alone; .inf: never"
    )
    selection: Literal["balanced", "random"] = Field(
        "balanced", description="balanced: clients and modalities by facility location; random: the drawn clients, both"
    )

    def idle(self, config: Config) -> dict[str, str]:
        return {"threshold": "with method.selection=random"} if self.selection == "random" else {}


class BMSFed(Method):
    """Modalities of one client, and the choice of the weaker one."""

    Params: ClassVar[type[MethodParams]] = BMSFedParams
    info = MethodInfo(
        title="BMSFed",
        paper="arXiv 2401.00403",
        adapts="nothing",
        trains="an adapter expert per modality (dense foundation)",
        sends="what it trained, class means of its features, a fingerprint",
        weighs="data size among those who train the modality; prototypes: targets of the class",
        completion="late fusion with a frozen head; imbalance of the last local epoch; fingerprints of 64 numbers",
    )
    spends = "experts"
    ensembles = True
    fuses = True
    views = 2
    # Which modality a step is weaker in, and the mean of both logits, are those of the whole step.
    whole_steps = True
    logit_copies: ClassVar[int] = 2

    def check_config(self, config: Config) -> None:
        check_own_experts(config, self.info.title, "modality")
        assert config.adapters.moe is not None
        if (experts := config.adapters.moe.experts) != len(BOTH):
            raise UserError(f"adapters.moe.experts: {experts}: BMSFed has an adapter expert for each of two modalities; use 2")
        for place, tier in enumerate(config.federation.tiers or ()):
            if tier.experts not in (None, len(BOTH)):
                raise UserError(
                    f"federation.tiers.{place}.experts: {tier.experts}: clients of BMSFed have both modalities; drop the key"
                )
        if self.params.selection == "random":
            return
        if (sampling := config.federation.sampling) != "uniform":
            raise UserError(
                f"federation.sampling: {sampling}: BMSFed chooses who takes part; use uniform, or method.selection=random"
            )
        if config.devices.simulated:
            raise UserError(
                "devices: BMSFed chooses among all clients, and simulated devices are asked before; drop the section, or use "
                "method.selection=random"
            )

    def blocks(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        self.projection = Projection(self.facts.seed, NUMBERS)
        return without_routers(specs)

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {FINGERPRINT: (len(BOTH), NUMBERS), LIKENESS: (len(BOTH),)}

    # Who takes part, with which modalities

    def plan(self, context: PlanContext) -> RoundPlan:
        if self.params.selection == "random":
            return RoundPlan(context.drawn, {client.index: BOTH for client in context.drawn})
        chosen = self._chosen(context)
        # What a client trains is what it costs.
        participants = [replace(context.clients[index], experts=len(own)) for index, own in sorted(chosen.items())]
        return RoundPlan(participants, chosen)

    def _chosen(self, context: PlanContext) -> dict[int, tuple[int, ...]]:
        """The modalities of every chosen client."""
        count, seed = len(context.drawn), self.facts.seed
        order = generator(seed, "unseen clients", context.round).permutation(len(context.clients)).tolist()
        unseen = [index for index in order if index not in context.memories][:count]
        chosen: dict[int, tuple[int, ...]] = dict.fromkeys(unseen, BOTH)
        seen = sorted(context.memories)
        if not seen or len(chosen) == count:
            return chosen
        memories = [context.memories[index] for index in seen]
        ratio_K = np.array([_imbalance(memory) for memory in memories])
        samples_K = np.array([context.clients[index].samples for index in seen], dtype=np.float64)
        weak = 1 if float((ratio_K * samples_K).sum() / samples_K.sum()) > 1.0 else 0
        # By how much a client's other modality is ahead of the weaker one.
        ahead_K = ratio_K if weak == 1 else 1.0 / ratio_K
        prints_KMJ = np.stack([memory[FINGERPRINT] for memory in memories])
        whole, alone = Facilities(prints_KMJ.reshape(len(seen), -1)), Facilities(prints_KMJ[:, weak])
        for place, kind in self._greedy(context.round, count - len(chosen), whole, alone, ahead_K):
            chosen[seen[place]] = BOTH if kind is whole else (weak,)
        return chosen

    def _greedy(
        self, round_index: int, count: int, whole: Facilities, alone: Facilities, ahead_K: np.ndarray
    ) -> list[tuple[int, Facilities]]:
        """Places of chosen clients, and by which of the two kinds of update each was chosen."""
        left, found = list(range(len(ahead_K))), list[tuple[int, Facilities]]()
        asked = max(count, len(ahead_K) // 10)
        for pick in range(min(count, len(left))):
            candidates = self._candidates(round_index, pick, left, asked)
            by_weak = alone.best(candidates)
            lone = bool(ahead_K[by_weak] > self.params.threshold)
            place, kind = (by_weak, alone) if lone else (whole.best(candidates), whole)
            kind.choose(place)
            left.remove(place)
            found.append((place, kind))
        return found

    def _candidates(self, round_index: int, pick: int, left: Sequence[int], asked: int) -> Sequence[int]:
        if asked >= len(left):
            return left
        drawn = generator(self.facts.seed, "candidates", round_index, pick).choice(len(left), asked, replace=False)
        return [left[place] for place in sorted(drawn.tolist())]

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        # An evaluation is of both.
        own = BOTH if context.plan is None else context.plan
        members_MLE = np.zeros((len(own), len(self.facts.layers), self.facts.num_experts), dtype=bool)
        members_MLE[np.arange(len(own)), :, own] = True
        return Assignment(client.cap, members_MLE=members_MLE, fused=True, views=tuple(own))

    # What it minimises

    def sums(self) -> dict[str, tuple[int, ...]]:
        shapes = class_shapes(len(BOTH) * self.facts.classes, self.facts.width)
        return shapes | {LIKENESS: (len(BOTH),), LIKENED: (len(BOTH),)}

    def statistics(self) -> dict[str, tuple[int, ...]]:
        return {PROTOTYPES: (len(BOTH) * self.facts.classes, self.facts.width)}

    def summary(self, client: Client, sums: Mapping[str, np.ndarray]) -> Summary:
        return {PROTOTYPES: class_means(sums)}

    def objective(self, client: Client, assignment: Assignment, context: RoundContext) -> Objective | None:
        assert assignment.views is not None
        own, prototypes = assignment.views, context.statistics[PROTOTYPES]
        return Objective(loss=lambda given: self._loss(given, own, prototypes))

    def _loss(self, given: Predictions, own: tuple[int, ...], prototypes: Statistic) -> tuple[Tensor, Sums]:
        """Of B samples, whose N = M B targets lie one modality after the other."""
        size = len(given.labels_N) // len(own)
        labels_B, last = given.labels_N[:size], given.step.last_epoch
        hidden_MBD = given.hidden_ND.view(len(own), size, -1)
        sums = self._features(hidden_MBD, labels_B, own, last)
        logits_BC = given.logits_NV.view(len(own), size, -1).mean(0)
        loss = F.cross_entropy(logits_BC, labels_B, reduction="sum")
        right_M, count, enhanced_M = self._likened(hidden_MBD, labels_B, own, prototypes)
        if self.params.alpha:
            loss = loss + self.params.alpha * (_weaker(right_M) * enhanced_M).sum()
        counted_2 = torch.zeros(len(BOTH), dtype=torch.float64, device=labels_B.device)
        likeness_2 = counted_2.clone()
        if last:
            likeness_2[list(own)], counted_2[list(own)] = right_M.double(), count.double()
        return loss, sums | {LIKENESS: likeness_2, LIKENED: counted_2}

    def _features(self, hidden_MBD: Tensor, labels_B: Tensor, own: tuple[int, ...], last: bool) -> Sums:
        """Sums by modality and class; zeros of a modality that is not trained."""
        # Each modality by itself: of equal features, equal bits.
        each = [
            class_sums(hidden_MBD[own.index(m) if m in own else 0], labels_B, self.facts.classes, last and m in own)
            for m in BOTH
        ]
        return {name: torch.cat([sums[name] for sums in each]) for name in each[0]}

    def _likened(
        self, hidden_MBD: Tensor, labels_B: Tensor, own: tuple[int, ...], prototypes: Statistic
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By modality the likenesses of the right classes added up, of how many samples, and the losses by prototypes."""
        known_MC = prototypes.known.view(len(BOTH), -1)
        # A class counts where both modalities have it, so that their sums are of the same samples.
        known_C = known_MC.all(0)
        labels_B = torch.where(known_C[labels_B], labels_B, _NOT_ENHANCED)
        right, losses = [], []
        for hidden_BD, prototype_CD in zip(
            hidden_MBD.float(), prototypes.value.view(*known_MC.shape, -1)[list(own)], strict=True
        ):
            apart_BC = (hidden_BD.unsqueeze(1) - prototype_CD.float()).square().sum(-1)
            # Where a feature is its prototype, the distance has no gradient.
            alike_BC = -torch.where(apart_BC > 0, apart_BC, 1.0).sqrt() * (apart_BC > 0)
            # Without any known class no row counts; all would be infinite.
            alike_BC = alike_BC.masked_fill(~known_C & known_C.any(), -torch.inf)
            loss_B = F.cross_entropy(alike_BC, labels_B, ignore_index=_NOT_ENHANCED, reduction="none")
            losses.append(loss_B.sum())
            right.append(torch.where(labels_B >= 0, torch.exp(-loss_B.detach()), 0.0).sum())
        return torch.stack(right), (labels_B >= 0).sum(), torch.stack(losses)

    # What is known of it afterwards

    def measure(self, view: ClientView) -> dict[str, Tensor]:
        return {FINGERPRINT: self.projection.changes(view)} if True in view.slots else {}

    def memorise(self, update: ClientUpdate) -> dict[str, np.ndarray]:
        before: Memory = update.memory or {name: np.zeros(shape) for name, shape in self.memory().items()}
        found = {name: np.array(values) for name, values in before.items()}
        own = list(update.plan)
        # Of expert m in all layers.
        found[FINGERPRINT][own] = update.measured[FINGERPRINT].sum(0)[own]
        counted_2 = update.observed[LIKENED]
        likened = [modality for modality in own if counted_2[modality] > 0]
        found[LIKENESS][likened] = update.observed[LIKENESS][likened] / counted_2[likened]
        return found


def _weaker(right_M: Tensor) -> Tensor:
    """1 of the modality that is less like its prototypes, 0 of the other, and of both where they are equal; of one alone 1."""
    if len(right_M) == 1:
        return torch.ones_like(right_M)
    # No number is read, for which a GPU would be waited for.
    return (right_M < right_M.flip(0)).to(right_M.dtype)


def _imbalance(memory: Memory) -> float:
    """r_k, 1 until both modalities were likened to prototypes."""
    first, second = memory[LIKENESS].tolist()
    return float(first / second) if first > 0 and second > 0 else 1.0
