"""FedFM: features are matched with anchors, the mean features of the classes over all clients (arXiv 2210.07615).

Legend: N targets, C classes, D width of a feature (what the head reads); k a client, c a class, n_{k,c} its targets of it.

READ (the abstract): clients' features are guided to shared category-wise anchors; contrastive guiding draws a feature to its
own anchor and away from the others. CODE (rui-ye/FedFM @ 3f55af52) gives the formulas:

    anchors      a_c = sum_k n_{k,c} f_{k,c} / sum_k n_{k,c},       f_{k,c} = mean feature of class c at client k
    contrastive  CE + lambda mean_n CE(softmax_c(cos(f_n, a_c) / tau), y_n)                            lambda 50, tau 0.1
    squared      CE + lambda mean_n |f_n / |f_n| - a_{y_n} / |a_{y_n}||^2 / D

Anchors are those of the participants' training data by the model that a round has made, in one more pass over them. Matching
begins in a later round: 20 of 100 by default. The released script says 200 of 100, and so runs plain FedAvg.

COMPLETION:
- `anchors: stale` is the default: features are summed up in the last local epoch, while they are trained, so that anchors are
  some steps old and cost no pass. `survey` is the released pass.
- A class that no participant has keeps its anchor (the code divides zero by zero). One that never was there has none: it is in
  no softmax, and its targets are not matched.
- Matching begins as soon as there are anchors, `first_round: 2`.
- A class is what the head tells apart: of an image its class, of a text the target token. Where answers alone are targets, the
  classes of a text are the tokens of its labels.

Limits: C mean features travel both ways, and C counts to the server, which therefore knows how many targets of each class a
client has. A vocabulary of more than 4096 tokens is refused. The abstract's FedFM-Lite, whose anchors travel less often than
the model, is not here. Reported training losses are plain cross-entropy, and a client's reported FLOPs are without the survey.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import (
    Assignment,
    Client,
    Config,
    Method,
    MethodInfo,
    MethodParams,
    ModelFacts,
    Objective,
    Predictions,
    RoundContext,
    Statistic,
    Summary,
    Sums,
    Targets,
    UserError,
    class_means,
    class_shapes,
    class_sums,
)

ANCHORS = "anchors"
MOST_CLASSES = 4096
_NOT_MATCHED = -100


class FedFMParams(MethodParams):
    """FedFM's matching; the released values are matching 50, temperature 0.1, first_round 21, anchors survey."""

    matching: float = Field(1.0, ge=0, description="lambda: weight of the matching loss beside cross-entropy; 0: FedAvg")
    loss: Literal["contrastive", "squared"] = Field(
        "contrastive", description="contrastive: own anchor against the others; squared: distance to the own one"
    )
    temperature: float = Field(0.1, gt=0, description="tau of the contrastive loss")
    anchors: Literal["stale", "survey"] = Field(
        "stale", description="stale: features of the last local epoch; survey: of one more pass, by the new model"
    )
    first_round: int = Field(2, ge=2, description="round in which matching begins; before the second there are no anchors")

    def idle(self, config: Config) -> dict[str, str]:
        if self.matching == 0:
            none = "with method.matching=0: nothing is matched"
            return dict.fromkeys(("loss", "temperature", "anchors", "first_round"), none)
        return {"temperature": "with method.loss=squared"} if self.loss == "squared" else {}


class FedFM(Method):
    """Features near shared anchors."""

    Params: ClassVar[type[MethodParams]] = FedFMParams
    info = MethodInfo(
        title="FedFM",
        paper="arXiv 2210.07615",
        adapts="active experts k",
        trains="what the configuration trains",
        sends="adapters, mean feature and number of targets per class",
        weighs="data size; anchors: targets of the class",
        completion="anchors of the last local epoch; absent classes keep theirs; tokens are the classes of texts",
    )
    # Beside the logits: cosines and their log-probabilities, or before them which class a target is of, in float64.
    logit_copies: ClassVar[int] = 2

    def __init__(self, params: FedFMParams) -> None:
        super().__init__(params)
        self.surveys = params.anchors == "survey" and params.matching > 0

    def check_config(self, config: Config) -> None:
        rounds, first = config.federation.rounds, self.params.first_round
        if first > max(rounds, 2):
            raise UserError(
                f"method.first_round: {first}: none of the {rounds} rounds would match any feature; use {rounds} or less, or "
                "method.name=fedit"
            )

    def check(self, facts: ModelFacts) -> None:
        if facts.classes > MOST_CLASSES:
            raise UserError(
                f"method.name: fedfm: the model tells {facts.classes} classes apart, and an anchor of each would travel; use a "
                f"model with at most {MOST_CLASSES} (an image classifier, a small vocabulary)"
            )

    def sums(self) -> dict[str, tuple[int, ...]]:
        return class_shapes(self.facts.classes, self.facts.width) if self.params.matching else {}

    def statistics(self) -> dict[str, tuple[int, ...]]:
        return {ANCHORS: (self.facts.classes, self.facts.width)} if self.params.matching else {}

    def summary(self, client: Client, sums: Mapping[str, np.ndarray]) -> Summary:
        return {ANCHORS: class_means(sums)}

    def survey(self, targets: Targets) -> Sums:
        return class_sums(targets.hidden_ND, targets.labels_N, self.facts.classes)

    def objective(self, client: Client, assignment: Assignment, context: RoundContext) -> Objective | None:
        if not self.params.matching:
            return None
        anchors = context.statistics[ANCHORS]
        if context.round < self.params.first_round or not bool(anchors.known.any()):
            return None if self.surveys else Objective(observe=self._features)
        return Objective(loss=lambda given: self._loss(given, anchors))

    def _features(self, targets: Targets) -> Sums:
        """Sums of the last local epoch; none where a survey makes them."""
        if self.surveys:
            return {}
        return class_sums(targets.hidden_ND, targets.labels_N, self.facts.classes, counted=targets.step.last_epoch)

    def _loss(self, given: Predictions, anchors: Statistic) -> tuple[Tensor, Sums]:
        # Sums first: what they need has gone before there are cosines.
        sums = self._features(given)
        return given.nll_N.sum() + self.params.matching * self._matching(given.hidden_ND, given.labels_N, anchors), sums

    def _matching(self, hidden_ND: Tensor, labels_N: Tensor, anchors: Statistic) -> Tensor:
        """The matching losses of these targets added up; zero of those whose class has no anchor."""
        feature_ND, anchor_CD = F.normalize(hidden_ND.float(), dim=-1), F.normalize(anchors.value, dim=-1)
        known_N = anchors.known[labels_N]
        if self.params.loss == "squared":
            apart_N = (feature_ND - anchor_CD[labels_N]).square().mean(-1)
            return torch.where(known_N, apart_N, 0.0).sum()
        cosine_NC = feature_ND @ anchor_CD.T / self.params.temperature
        # No number is read, for which a GPU would be waited for.
        labels_N = torch.where(known_N, labels_N, _NOT_MATCHED)
        cosine_NC = cosine_NC.masked_fill(~anchors.known, -torch.inf)
        return F.cross_entropy(cosine_NC, labels_N, ignore_index=_NOT_MATCHED, reduction="sum")
