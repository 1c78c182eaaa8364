"""Base of all methods, and what a method is: a handful of pure functions, and a few words on what it needs.

Legend: L layers, E experts of the model, R adapter rank.

    plan(context)           who takes part, and what each is told                            before a round
    assign(client)          what a client does: active experts, LoRA rows, expert masks      before local training
    observer(client)        what is looked at, decided and minimised inside its layers       during local training
    objective(client)       what is minimised and summed up at the model's output
    reduce_probe(squares)   numbers made of a pass of its gradient probe, before the first step
    start(view)             what it starts from, where that is not what it receives
    adjust(view)            a change of its gradients, before clipping
    project(view)           a change of its values, after a step
    measure(view)           numbers about its tensors                                        after local training
    memorise(update)        what the server knows of it from now on: `plan` and `assign` see it
    weights(update)         its weight in the mean, per block and (layer, expert)            aggregation
    weightings(update)      its weights under several weightings (with `weighing.shares`)
    tally(update)           further numbers of it that are summed (with `weighing.tallies`)
    element_weights(view)   weights of single elements (with `weighing.elements`)
    factor(tallies)         what the sum of weighted changes is multiplied by (with `weighing.changes`)
    summary(client, sums)   its values and weights of each key of a statistic
    survey(targets)         what is summed up of its data after a round, by the new adapters (with `surveys`)
    after_mean(context)     what becomes of the mean before the server's step
    renew(spec, value, ...) the next value of a block that the server changes and no client trains
    server_rate(clients)    a factor on the server's learning rate
    combine(pair)           the new adapter from everybody's factors, where no mean gives it

The defaults are FedAvg on everything that is trained. A method never touches a process group and the expert pool never knows
its name. Third parties add one through the entry-point group `fedmoe_ds.methods`, without touching a file of this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedmoe_ds.aggregation.averaged_statistics import Summary
from fedmoe_ds.aggregation.lora_factors import FactorPair
from fedmoe_ds.aggregation.weighing import MEAN, Weighing
from fedmoe_ds.clients.assignment import Assignment, leading
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.tiers import BudgetKind
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import Config
from fedmoe_ds.methods.combined import Combined
from fedmoe_ds.methods.method_info import MethodInfo
from fedmoe_ds.methods.model_facts import ModelFacts
from fedmoe_ds.methods.round_plan import MeanContext, PlanContext, RoundContext, RoundPlan, TensorRule
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.model.moe_layer import RESCALER
from fedmoe_ds.model.objective import Objective, Sums, Targets
from fedmoe_ds.model.pass_context import RoutingObserver


class MethodParams(BaseModel):
    """Base of a method's own parameters; they stand beside `method.name` in the configuration."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def idle(self, config: Config) -> dict[str, str]:
        """Keys that do nothing beside the others, and why ("with ..."); set away from their defaults, they are refused."""
        return {}

    def resolved(self, config: Config) -> Self:
        """With what they take from other keys filled in: what a run saves, and what its identity compares."""
        return self


class Method:
    """FedAvg on whatever is trained; methods override what they change.

    Attributes:
        Params: the method's parameters, a `MethodParams` subclass.
        info: its row in the table of methods.
        spends: what a client's budget buys.
        needs: what the configuration must have: `lora` (adapters in pairs), `router` (trained), `experts` (trained).
        unequal_ranks: whether clients may train different LoRA rows.
        missing_rows: what a row counts as in the mean for a client that does not hold it: `zero`, or its `global` value.
        rescaler: None, `client` or `layer`: whether clients learn a personal factor on the expert output.
        observes: names of the sums that `observer` returns.
        attends: whether its observers ask for the attention that tokens receive (`RoutingObserver.attended`).
        scored: whether they ask for the scores of samples (`RoutingObserver.scored`), which not all data have.
        selective: whether some batches train only some of the experts.
        whole_steps: whether its observer or objective needs all rows of a local step at once: for a decision, or a quantile.
        logit_copies: float32 tensors in the shape of its logits that its objective holds, beside cross-entropy's own.
        collects: whether `combine` replaces the mean of LoRA pairs.
        absorbs: whether `combine` moves products into the frozen weights.
        chooses_rank: whether it decides how many rows these have: rounds report them, and clients receive so many.
        averages: whether anything is averaged at all.
        accounts: whether its plans say what clients spend (`RoundPlan.spending`); the record then has virtual time and energy.
        ensembles: whether a client trains as many models side by side as its budget has experts (`Assignment.members_MLE`).
        fuses: whether the passes of these models are one (`Assignment.fused`).
        views: how many views of an image its models read, one each (`Assignment.views`); data must have as many.
        held_softmax: whether a client that may use some experts alone has a router of these: its softmax is over them.
        candidates: of a method whose blocks have a `ROUTER_BIAS`: so many experts that a row's router likes best get the bias
            on their logits, and the row chooses among them; at least the model's top-k.
        personal_models: whether clients keep adapters of their own; evaluation then scores every client's model.
        pooled: whether all data are one client's (the centralised bound).
        most_delay: largest `Assignment.delay`; the server keeps the global adapters of so many past rounds.
        surveys: whether statistics are those of a pass over clients' data after the aggregation, and not of their training.
        weighs_losses: whether `weights` or `tally` read `update.shared_losses`.
        weighing: what `weights` are: those of one mean, or factors on what clients changed.
        pre_gated: whether it trains a router before the layers (`foundation/pre_gate.py`), which has no gradient otherwise.
        unlabelled: whether it can train clients whose labels the data hide (`data.labels`).
        without_experts: the name of the method that its equations become where there are no experts; None: it stays itself.
    """

    Params: ClassVar[type[MethodParams]] = MethodParams
    info: ClassVar[MethodInfo]
    spends: ClassVar[BudgetKind] = "top_k"
    needs: frozenset[str] = frozenset()
    unequal_ranks: ClassVar[bool] = False
    missing_rows: ClassVar[Literal["zero", "global"]] = "zero"
    # Not ClassVar, like the seven below: a method may set these from its parameters (FLAME, FFT-MoE).
    rescaler: Literal["client", "layer"] | None = None
    observes: tuple[str, ...] = ()
    attends: bool = False
    scored: bool = False
    selective: bool = False
    whole_steps: bool = False
    logit_copies: ClassVar[int] = 1
    surveys: bool = False
    weighing: Weighing = MEAN
    weighs_losses: ClassVar[bool] = False
    collects: ClassVar[bool] = False
    absorbs: ClassVar[bool] = False
    chooses_rank: ClassVar[bool] = False
    averages: ClassVar[bool] = True
    accounts: ClassVar[bool] = False
    ensembles: ClassVar[bool] = False
    fuses: ClassVar[bool] = False
    views: ClassVar[int] = 1
    held_softmax: ClassVar[bool] = False
    personal_models: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    pre_gated: ClassVar[bool] = False
    unlabelled: ClassVar[bool] = False
    without_experts: ClassVar[str | None] = None
    most_delay: int = 0  # may be set from the parameters, too
    candidates: int = 0  # and this

    def __init__(self, params: Any) -> None:
        self.params = params
        # Until a run has resolved its model: checks of a configuration come first and ask nothing of it.
        self.facts = ModelFacts(1, 1, 1, 0)

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Whether it has a function of its own in the place of the default: what is not asked for costs nothing."""
        return getattr(cls, hook) is not getattr(Method, hook)

    # Before anything is trained

    def check_config(self, config: Config) -> None:
        """Raise UserError where the configuration lacks what the method needs; called before anything is loaded."""

    def check(self, facts: ModelFacts) -> None:
        """Raise UserError where the model lacks what the method needs; called before any weight is loaded for it."""

    def blocks(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        """The blocks of the run: some may be marked `personal`, or not `trained`."""
        return specs

    def client_state(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        """Further personal blocks that clients remember from round to round and do not train."""
        return []

    def initial(self, spec: BlockSpec, client: Client) -> float | None:
        """What a personal block of the bank, or of `client_state`, is filled with before the first round; None: the global
        initial value, or zero. Never asked for what a correction of drift keeps."""
        return 1.0 if spec.name == RESCALER else None

    def begins_as(self, spec: BlockSpec) -> str | None:
        """The block whose global initial value a block of `client_state` begins with; None: `initial`, or zero."""
        return None

    def memory(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the numbers that the server knows of every client that has been trained: few, float64, on every
        rank and in every checkpoint. What is large, or must not leave the client, is `client_state`."""
        return {}

    # Before and during local training

    def plan(self, context: PlanContext) -> RoundPlan:
        """Who takes part in a round, and what each of them is told: a pure function of what every rank knows.

        At most as many clients as were drawn, each once; `dataclasses.replace(client, steps=K)` gives one K local steps. A
        method that keeps this one costs nothing here.
        """
        return RoundPlan(context.drawn)

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        """What the client does in this round."""
        # Leading rows: a smaller rank is then a prefix of a larger one, so clients of all ranks overlap in the mean.
        return Assignment(client.cap, leading(client.rank, self.facts.rank))

    def observer(self, client: Client, assignment: Assignment, context: RoundContext) -> RoutingObserver | None:
        """What is looked at, decided and minimised in the client's layers."""
        return None

    def objective(self, client: Client, assignment: Assignment, context: RoundContext) -> Objective | None:
        """What the client minimises, or sums up, at the model's output; None: cross-entropy, and no sums."""
        return None

    def teaches(self) -> bool:
        """Whether its objectives ask the received model before the first step (`Objective.teach`)."""
        return False

    def sums(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the numbers that its objectives sum up; `observed` of a client's update has them, float64."""
        return {}

    def reduce_probe(self, squares: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """What is kept of a pass of a client's gradient probe (`Assignment.probe`); `probed.numbers` of its update stacks them.

        `squares` has the squared norm of the gradient by name of every trained block: [L, E], or [L] of a dense one. A method
        that asks for a probe says in its plan how many sequences it takes, `dataclasses.replace(client, probed=N)`: what is
        predicted of a client's time counts them.
        """
        raise NotImplementedError("a method whose assignments name a probe makes numbers of it: override `reduce_probe`")

    def statistics(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes [K, *item] of what is averaged over clients key by key, and delivered with the adapters."""
        return {}

    def survey(self, targets: Targets) -> Sums:
        """With `surveys`: what `sums` names, of some of a client's data, by the adapters that a round has made; no routing."""
        raise NotImplementedError

    def start(self, view: ClientView) -> dict[str, Tensor]:
        """What it starts from, and what its change is measured from, by block, where that is not what it receives."""
        return {}

    def adjust(self, view: ClientView) -> None:
        """Change the gradients of a step in place; elementwise or per item, so that no bit depends on the topology."""

    def project(self, view: ClientView) -> None:
        """Put values back into where they must be, in place, after each of the client's steps; elementwise or per item."""

    # After local training

    def measure(self, view: ClientView) -> dict[str, Tensor]:
        """Named float64 numbers [L, E] or [L, E, ...] about expert blocks, [L] about dense ones, from the tensors in `view`."""
        return {}

    def remember(self, update: ClientUpdate) -> dict[str, Tensor]:
        """New values of dense memory blocks, from the client's update."""
        return {}

    def remember_blocks(self, view: ClientView) -> dict[str, Tensor]:
        """New values of `client_state` blocks that are shaped like trained ones, where the tensors are (this rank's part)."""
        return {}

    def memorise(self, update: ClientUpdate) -> dict[str, np.ndarray]:
        """All numbers of `memory` about the client, at its home; `update.memory` has those of before, if there are any.

        They count from the next round on.
        """
        return {}

    # Aggregation

    def resting(self, round_index: int) -> frozenset[str]:
        """Names of the blocks that nobody is to train in this round; where the round averages nothing of others, it says so."""
        return frozenset()

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        """The client's weight in the mean of a block: float64 [L, E] or [L]. `data_share` = |D_i| / sum_j |D_j|."""
        # The same for all experts, used or not: FedAvg. The mean divides by the sum of weights, so a share need not sum to one.
        shape = update.counts_LE.shape if spec.expert else (len(spec.layers),)
        trained = update.assignment.trains(spec)
        # What a client was told not to train is as it received it, which says nothing about its data.
        return np.full(shape, data_share) if trained is None else np.full(shape, data_share) * trained

    def weightings(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> list[np.ndarray]:
        """The client's weight under each of several weightings, one per `weighing.shares`; by default `weights` alone."""
        return [self.weights(spec, update, data_share)]

    def tally(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> dict[str, np.ndarray]:
        """The numbers that `weighing.tallies` names: float64 [L, E] or [L] each, not negative."""
        raise NotImplementedError

    def element_weights(self, spec: BlockSpec, view: ClientView, update: ClientUpdate) -> Tensor:
        """Weights of a block's elements, float32, not negative, where the tensors are (this rank's part of the block)."""
        raise NotImplementedError

    def summary(self, client: Client, sums: Mapping[str, np.ndarray]) -> Summary:
        """By statistic, the client's own value [K, *item] and its weight of every key [K], of what `sums` names."""
        raise NotImplementedError

    def factor(self, tallies: dict[str, np.ndarray]) -> np.ndarray | float:
        """What the sum of a block's weighted changes is multiplied by, from the sums of its tallies, [L, E] or [L] each."""
        return 1.0

    def after_mean(self, context: MeanContext) -> TensorRule | None:
        """What becomes of a round's mean, tensor by tensor, before the server's step; None: nothing, and it costs nothing.

        The rule knows a tensor by its canonical name, with layer and global expert: whoever holds it must do the same.
        """
        return None

    def renew(self, spec: BlockSpec, value: Tensor, context: MeanContext) -> Tensor:
        """The next value, [L, *item], of a dense block that all clients receive and nobody trains."""
        return value

    def server_rate(self, round_index: int, participants: Sequence[Client]) -> float:
        """A factor on `server.lr` in this round; `participants` are those of its plan, whether or not they came back."""
        return 1.0

    def combine(self, pair: FactorPair, fresh_a_RI: Tensor) -> Combined:
        """The new adapter from all participants' factors (only with `collects`); `fresh_a_RI` is a newly drawn A."""
        raise NotImplementedError
