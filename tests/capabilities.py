"""What a method can ask of the engine, and in which modes a run can be: each by itself, to be put together in pairs.

Legend: L layers with experts, E experts, N transformer layers, R adapter rank, M members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.aggregation.weighing import Weighing
from fedmoe_ds.methods import (
    FIRST_STEP,
    ROUTER_BIAS,
    Assignment,
    BlockSpec,
    Client,
    ClientUpdate,
    ClientView,
    Combined,
    FactorPair,
    Load,
    MeanContext,
    Method,
    MethodInfo,
    Objective,
    PlanContext,
    Predictions,
    PseudoGradient,
    RoundContext,
    RoundPlan,
    Routing,
    RoutingObserver,
    Spending,
    Summary,
    Sums,
    Targets,
    TensorRule,
    generator,
    remembered_block,
    shared_blocks,
)

Told = Callable[[Method, Client, RoundContext], dict[str, Any]]


@dataclass(frozen=True)
class Capability:
    """Attributes that a method overrides, and what it adds to the assignment of a client in training."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    told: Told | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


def plan(self: Method, context: PlanContext) -> RoundPlan:
    """Not everybody, by what is known of them, and for unequal numbers of steps."""
    known = {client.index: float(context.memories.get(client.index, {}).get("loss", 0.0)) for client in context.drawn}
    order = sorted(context.drawn, key=lambda client: (-known[client.index], client.index))
    chosen = order[: max(1, len(order) - 1)]
    return RoundPlan([replace(one, steps=1 + one.index % 2) for one in chosen], {one.index: one.index / 8 for one in chosen})


def plan_and_account(self: Method, context: PlanContext) -> RoundPlan:
    made = plan(self, context)
    loads: dict[int, Load] = {one.index: context.load(one) for one in made.participants}
    return replace(made, spending={index: Spending(load.flops / 1e9, 1.0, load.steps) for index, load in loads.items()})


def memorise(self: Method, update: ClientUpdate) -> dict[str, np.ndarray]:
    assert update.losses is not None
    before = float(update.memory["loss"]) if update.memory else 0.0
    return {"loss": np.array(update.losses[1] + before / 2)}


def minimised(given: Predictions) -> tuple[Tensor, dict[str, Tensor]]:
    peak_N = given.logits_NV.detach().amax(-1)
    # By target: what one factor says of all of them, AdamW takes out again.
    return (given.nll_N * torch.where(given.labels_N % 2 == 0, 2.0, 0.5)).sum(), {"peak": peak_N.double().sum()}


def objective(self: Method, client: Client, assignment: Assignment, context: RoundContext) -> Objective:
    return Objective(minimised, lambda given: {"used": given.routing.kept_LNK.double().sum()})


def observed(routing: Routing, valid_T: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Trains the busier half of the experts that a batch uses."""
    counts_E = routing.counts_E()
    return counts_E >= counts_E[counts_E > 0].float().mean(), {"seen": counts_E.double()}


def watch_experts(self: Method, client: Client, assignment: Assignment, context: RoundContext) -> RoutingObserver:
    return RoutingObserver(observe=observed)


def received(num_experts: int, routing: Routing, attention_T: Tensor) -> dict[str, Tensor]:
    """The attention that tokens receive, added up where they are routed to."""
    kept_TK = routing.kept_TK.double() * attention_T.double()[:, None]
    return {"attention": kept_TK.new_zeros(num_experts).index_add(0, routing.experts_TK.flatten(), kept_TK.flatten())}


def watch_attention(self: Method, client: Client, assignment: Assignment, context: RoundContext) -> RoutingObserver:
    return RoutingObserver(attended=partial(received, self.facts.num_experts))


def reduce_probe(self: Method, squares: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.array([float(square.sum()) for square in squares.values()])


def found_weights(self: Method, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
    """Times what a gradient probe has found, and by the attention that an expert's tokens received, where it was asked."""
    found: np.ndarray = Method.weights(self, spec, update, data_share)
    if update.probed is not None:
        found = found * (1e-3 + float(np.sqrt(update.probed.numbers).sum()))
    if "attention" in update.observed:
        attention_LE = update.observed["attention"] / max(update.tokens, 1) + 0.1
        found = found * (attention_LE if spec.expert else attention_LE.sum(1)[:1])
    return found


def biased(self: Method, specs: list[BlockSpec]) -> list[BlockSpec]:
    return [*specs, BlockSpec(ROUTER_BIAS, self.facts.layers, (self.facts.num_experts,), decay=False, trained=False)]


def renew(self: Method, spec: BlockSpec, value: Tensor, context: MeanContext) -> Tensor:
    if spec.name != ROUTER_BIAS or not context.tokens:
        return value
    used_LE = context.counts_LE / context.tokens
    return torch.from_numpy(np.tanh(8.0 * (used_LE.mean(1, keepdims=True) - used_LE))).to(value.dtype)


def peaks(targets: Targets) -> Sums:
    """How many targets there are, and how well they are met."""
    return {
        "met": torch.exp(-targets.nll_N.detach().double()).sum(),
        "targets": targets.nll_N.new_ones(()).double() * len(targets.nll_N),
    }


def by_statistic(given: Predictions, level: Tensor, sums: Callable[[Targets], Sums]) -> tuple[Tensor, Sums]:
    return given.nll_N.sum() * (1.0 + level), sums(given)


def stale(self: Method, client: Client, assignment: Assignment, context: RoundContext) -> Objective:
    return Objective(partial(by_statistic, level=context.statistics["met"].value.mean(), sums=peaks))


def surveyed(self: Method, client: Client, assignment: Assignment, context: RoundContext) -> Objective:
    return Objective(partial(by_statistic, level=context.statistics["met"].value.mean(), sums=lambda given: {}))


def summary(self: Method, client: Client, sums: Mapping[str, np.ndarray]) -> Summary:
    """Of two keys every client has one."""
    own_K = np.arange(2) == client.index % 2
    return {"met": (own_K * sums["met"] / max(float(sums["targets"]), 1.0), own_K * sums["targets"])}


AVERAGED: dict[str, Any] = {
    "statistics": lambda self: {"met": (2,)},
    "summary": summary,
    "sums": lambda self: {"met": (), "targets": ()},
}


def tally(self: Method, spec: BlockSpec, update: ClientUpdate, data_share: float) -> dict[str, np.ndarray]:
    return {"shares": self.weights(spec, update, data_share)}


def factor(self: Method, tallies: dict[str, np.ndarray]) -> np.ndarray:
    return 1.0 / tallies["shares"]


def weightings(self: Method, spec: BlockSpec, update: ClientUpdate, data_share: float) -> list[np.ndarray]:
    return [self.weights(spec, update, share) for share in (data_share, 1.0 + update.client.index)]


def element_weights(self: Method, spec: BlockSpec, view: ClientView, update: ClientUpdate) -> Tensor:
    return (view.value(spec) - view.received(spec)).abs() + 0.5


def after_mean(self: Method, context: MeanContext) -> TensorRule:
    louder = 1e-3 * (1 + len(context.memories))

    def receive(key: str, mean: Tensor) -> Tensor:
        noise = generator(self.facts.seed, "capability", context.round, key).standard_normal(tuple(mean.shape))
        return (mean.double() + louder * torch.from_numpy(noise)).float()

    return receive


def own_b(self: Method, specs: list[BlockSpec]) -> list[BlockSpec]:
    return [replace(spec, personal=True) if spec.rank_axis == 1 else spec for spec in specs]


def client_state(self: Method, specs: list[BlockSpec]) -> list[BlockSpec]:
    return [remembered_block(spec, "last") for spec in shared_blocks(specs)]


def remember_blocks(self: Method, view: ClientView) -> dict[str, Tensor]:
    return {remembered_block(spec, "last").name: view.value(spec).clone() for spec in shared_blocks(view.blocks())}


def adjust(self: Method, view: ClientView) -> None:
    for spec in shared_blocks(view.blocks()):
        name = remembered_block(spec, "last").name
        if name in view.client_state:
            view.grad(spec).add_(1e-3 * (view.value(spec) - view.client_state[name]))


def combine(self: Method, pair: FactorPair, fresh_a_RI: Tensor) -> Combined:
    share_P11 = pair.share_P.view(-1, 1, 1)
    # Not quite the means, which would be the plain method's own.
    return Combined((pair.a_PRI * share_P11).sum(0), 0.75 * (pair.b_POR * share_P11).sum(0))


def checkered(method: Method, client: Client) -> np.ndarray:
    """Bool [L, E], another half of the experts in every layer and for every client."""
    layers, experts = len(method.facts.layers), method.facts.num_experts
    found: np.ndarray = (np.arange(experts)[None] + np.arange(layers)[:, None] + client.index) % 2 == 0
    return found


def halves(method: Method, client: Client) -> np.ndarray:
    """Bool [M, L, E], two models with half of the experts each, or for every third client one alone."""
    first_LE = checkered(method, client)
    return np.stack([first_LE, ~first_LE][: 1 if client.index % 3 == 2 else 2])


CAPABILITIES: dict[str, Capability] = {
    "plan": Capability({"plan": plan}),
    "spending": Capability({"plan": plan_and_account, "accounts": True}),
    "memory": Capability(
        {"memory": lambda self: {"loss": ()}, "memorise": memorise},
        lambda method, client, context: {"cap": 1} if context.memory else {},
    ),
    "delay": Capability({"most_delay": 1}, lambda method, client, context: {"delay": min(client.index % 2, context.round - 1)}),
    "allowed experts": Capability(told=lambda method, client, _: {"allowed_LE": checkered(method, client)}),
    "members": Capability(told=lambda method, client, _: {"members_MLE": halves(method, client)}),
    "sparse": Capability(told=lambda method, client, _: {"density": 0.25 + client.index % 2 / 2}),
    "trained experts": Capability(told=lambda method, client, _: {"trained_LE": checkered(method, client)}),
    "trained layers": Capability(
        told=lambda method, client, _: {"trained_N": np.arange(method.facts.depth) > client.index % 2 - 1}
    ),
    "samples": Capability(
        told=lambda method, client, _: {"samples": np.arange(client.index % min(client.sequences, 2), client.sequences)}
    ),
    "rows": Capability(
        {"unequal_ranks": True, "missing_rows": "global"},
        lambda method, client, _: {"rows_R": np.arange(method.facts.rank) % 2 == client.index % 2, "scale": 2.0},
    ),
    "objective": Capability({"objective": objective, "sums": lambda self: {"peak": (), "used": ()}}),
    "statistics": Capability({**AVERAGED, "objective": stale}),
    "survey": Capability({**AVERAGED, "objective": surveyed, "surveys": True, "survey": lambda self, targets: peaks(targets)}),
    "gradient probe": Capability(
        {"reduce_probe": reduce_probe, "weights": found_weights},
        lambda method, client, _: {"probe": (np.arange(1),) * 2 if client.index % 2 else FIRST_STEP},
    ),
    "attention": Capability(
        {"observer": watch_attention, "observes": ("attention",), "attends": True, "weights": found_weights}
    ),
    "pseudo-gradients": Capability(
        told=lambda method, client, _: {"pseudo": PseudoGradient(0.5, "tokens" if client.index % 2 else "batch")}
    ),
    "router bias": Capability({"blocks": biased, "candidates": 3, "renew": renew}),
    "observer": Capability({"observer": watch_experts, "observes": ("seen",), "selective": True}),
    "changes": Capability({"weighing": Weighing(changes=True, tallies=("shares",)), "tally": tally, "factor": factor}),
    "shares": Capability({"weighing": Weighing(shares=(1.0, 0.5)), "weightings": weightings}),
    "elements": Capability({"weighing": Weighing(elements=True), "element_weights": element_weights}),
    "after the mean": Capability({"after_mean": after_mean}),
    "server rate": Capability(
        {"server_rate": lambda self, index, participants: 1.0 / len(participants) if participants else 1.0}
    ),
    "own models": Capability({"blocks": own_b, "personal_models": True}),
    "client state": Capability({"client_state": client_state, "remember_blocks": remember_blocks, "adjust": adjust}),
    "factors": Capability({"combine": combine, "collects": True}),
}
MODES: dict[str, Mapping[str, Any]] = {
    "packing": {"execution": {"packing": True}},
    "recomputed": {"execution": {"activation_checkpointing": True}},
    "micro-batches": {"execution": {"micro_batch_size": 1}},
    "whole experts": {"adapters": {"expert_training": "full"}},
    "ranks": {
        "adapters": {"moe": {"experts": 4, "width": 1, "top_k": 2, "linear": True, "shared": 2, "zero": 2}},
    },
    "groups": {"foundation": {"convert": {"experts": 4}}, "adapters": {"expert_training": "full", "router": "frozen"}},
    "head": {"adapters": {"head": "train"}},
    "server training": {"data": {"public": 0.2}, "server": {"training": {"epochs": 0.5, "lr": 0.02, "warm_up": 0.5}}},
    "private": {"privacy": {"clip": 0.05, "noise_multiplier": 0.5}},
    "dropout": {"adapters": {"dropout": 0.2}},
    "balance": {"local": {"balance_loss": 0.1}},
    "fedprox": {"local": {"drift": "fedprox"}},
    "scaffold": {"local": {"drift": "scaffold", "optimizer": "sgd", "lr": 0.05}},
    "feddyn": {"local": {"drift": "feddyn", "proximal": 0.5}},
    "fedams": {"server": {"optimizer": "fedams", "lr": 0.01}},
    "synchronous": {"devices": {"mix": {"phone-mid": 1.0, "laptop": 1.0}, "dropout": 0.3}},
    "deadline": {
        "devices": {"mix": {"phone-mid": 1.0, "laptop": 1.0}, "aggregation": "deadline", "over_selection": 2.0},
        "federation": {"participation": 0.5},
    },
    "buffered": {
        "devices": {"mix": {"phone-mid": 1.0, "laptop": 1.0}, "aggregation": "buffered", "buffer": 2, "concurrency": 3},
    },
}
ALTERNATIVES: Sequence[frozenset[str]] = [
    frozenset(group)
    for group in (
        {"plan", "spending"},
        {"allowed experts", "members"},
        {"whole experts", "ranks", "groups"},
        {"members", "survey"},
        {"objective", "statistics", "survey"},
        {"observer", "attention"},
        {"own models", "router bias"},
        # Groups have no router.
        {"groups", "router bias"},
        {"changes", "shares", "elements"},
        {"fedprox", "scaffold", "feddyn"},
        {"synchronous", "deadline", "buffered"},
    )
]
"""One of each at most: they are values of one key, or of one attribute, or the one takes the place of the other."""
FEATURES = [*CAPABILITIES, *MODES]
MOST = 9
"""Features of a run."""


def pairs() -> list[frozenset[str]]:
    """All pairs that one run can have."""
    found = (frozenset(pair) for pair in combinations(FEATURES, 2))
    return [pair for pair in found if not any(pair <= group for group in ALTERNATIVES)]


def method_of(features: Sequence[str]) -> type[Method]:
    """A method with these capabilities; modes among the features say nothing about it."""
    chosen = [CAPABILITIES[name] for name in features if name in CAPABILITIES]

    def assign(self: Method, client: Client, context: RoundContext) -> Assignment:
        made = Method.assign(self, client, context)
        # Round 0 is an evaluation, in which a client does what it was told and trains nothing.
        told = [one.told(self, client, context) for one in chosen if one.told is not None and context.round]
        return replace(made, **{key: value for own in told for key, value in own.items()})

    info = MethodInfo("Probe", "none", "what it is told", "all", "all", "data size", "all of it")
    overrides = {key: value for one in chosen for key, value in one.overrides.items()}
    return type("Probe", (Method,), {"info": info, "assign": assign, **overrides})


def covering(wanted: Sequence[frozenset[str]]) -> list[list[str]]:
    """Few sets of features, every two of which may meet, that have all wanted pairs between them."""
    allowed, left, rows = set(wanted), set(wanted), list[list[str]]()
    while left:
        row = sorted(min(left, key=sorted), key=FEATURES.index)
        # A row that has everything shows little: masks, ranks and steps leave less and less to be seen.
        while len(row) < MOST:
            fits = [one for one in FEATURES if one not in row and all(frozenset((one, other)) in allowed for other in row)]
            gains = {one: sum(frozenset((one, other)) in left for other in row) for one in fits}
            best = max(fits, key=lambda one: (gains[one], -FEATURES.index(one)), default=None)
            if best is None or not gains[best]:
                break
            row.append(best)
        left -= {frozenset(pair) for pair in combinations(row, 2)}
        rows.append(row)
    return rows
