"""FedMox: a server with labelled images, clients with unlabelled ones of low resolution (arXiv 2508.16568).

Legend: N targets of one local step, V classes; k a client, t a round from 1.

READ (a public third-party trace of the paper) and CODE (its package): the setting is practical semi-supervised federated
learning. A frozen backbone; heads with a mixture of experts are trained: K = 4 experts, hard top-1, the router a 1x1
convolution. The server warms up for 50 epochs on its labelled images of high resolution. Then 50 rounds: a share r = 0.33 of
the clients trains one epoch without labels on images of low resolution, with a weight of 4 on that loss and thresholds of 0.9
(classes) and 0.02 (boxes) on pseudo-labels; the server takes their mean by data size, mixes it with what it had, and trains
one more epoch on its labels. AdamW, rate 1e-4, decay 0.05, cosine with 5 epochs of warm-up, batches of 2.

    soft mixture   w = alpha w_prev + (1 - alpha) mean_k        it is server.lr = 1 - alpha
    then           w <- server epoch on public labels           server.training

COMPLETION:
- Detection is out of reach here; this is classification. Experts stand beside every feed-forward block (`adapters.moe`).
- The straight-through gate p / stopgrad(p) of the package (`adapters.moe.gate`): a top-1 softmax over the chosen expert alone
  has no gradient for the router.
- The client's loss, with q the model that it has received, on the same view of an image as its own, without augmentation:

      u / N sum_n [max_v q_n(v) >= tau] CE(argmax_v q_n(v), p_n)          u = 4, tau = 0.9

  Targets below the threshold count in N, so that a client that is sure of little learns little.
- alpha is not known: the example has 0.5.
- Low resolution is 2x2 mean pooling and upsampling (`data.form.kind: low-resolution`); the labelled split is drawn from all
  samples (`data.public`).
- The teacher's forward pass counts as a rollout in FLOPs, virtual time and energy. This machine makes it.

Where labels are shown (`data.labels`), clients train on them by cross-entropy: with alpha 0 and no server training that is
FedAvg. Limits: recorded losses of clients without labels are the loss above, which is 0 where a client is sure of nothing. The
optimizer's moments of the server begin anew in every round, as those of clients do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedmoe_ds.methods import (
    Assignment,
    Client,
    Config,
    Method,
    MethodInfo,
    MethodParams,
    Objective,
    PlanContext,
    Predictions,
    RoundContext,
    RoundPlan,
)

UNSURE = -1
"""In the place of a pseudo-label: below the threshold."""


class FedMoxParams(MethodParams):
    """How clients learn whose labels are hidden."""

    threshold: float = Field(0.9, ge=0, description="tau: least probability of a pseudo-label; above 1 there is none")
    weight: float = Field(4.0, ge=0, description="u: weight of the clients' loss")

    def idle(self, config: Config) -> dict[str, str]:
        why = "with data.labels=shown: clients train on their labels"
        return dict.fromkeys(("threshold", "weight"), why) if config.data.labels == "shown" else {}


class FedMox(Method):
    """Clients without labels, who learn from what the received model is sure of."""

    Params: ClassVar[type[MethodParams]] = FedMoxParams
    unlabelled: ClassVar[bool] = True
    # The one-hot labels' gradient, beside cross-entropy's own that nobody minimises.
    logit_copies: ClassVar[int] = 2
    info = MethodInfo(
        title="FedMox",
        paper="arXiv 2508.16568",
        adapts="active experts k",
        trains="what the configuration trains, on pseudo-labels; the server on public labels",
        sends="adapters",
        weighs="data size",
        completion="classification; straight-through gate; pseudo-labels on the client's own view; alpha",
    )

    def teaches(self) -> bool:
        return not self.facts.labelled

    def plan(self, context: PlanContext) -> RoundPlan:
        return RoundPlan([replace(client, rollouts=int(self.teaches())) for client in context.drawn])

    def objective(self, client: Client, assignment: Assignment, context: RoundContext) -> Objective | None:
        return Objective(self.loss, teach=self.pseudo_labels, labelled=False) if self.teaches() else None

    def pseudo_labels(self, logits_NV: Tensor) -> Tensor:
        """The likeliest class of every target, int64 [N], or UNSURE."""
        best_N = logits_NV.softmax(-1).max(-1)
        return torch.where(best_N.values >= self.params.threshold, best_N.indices, UNSURE)

    def loss(self, given: Predictions) -> tuple[Tensor, dict[str, Tensor]]:
        """u times the cross-entropy of the pseudo-labels, summed over the targets that have one."""
        label_N = given.taught_N
        assert label_N is not None, "a model was received and asked"
        nll_N = cross_entropy(given.logits_NV, label_N, ignore_index=UNSURE, reduction="none")
        return self.params.weight * nll_N.sum(), {}
