"""FL Games: clients are players of a game whose equilibrium drops what only some of them can use (Gupta et al., arXiv
2205.11101).

READ (public notes): a representation phi of all clients and predictors w_1..w_N, one of each; everybody predicts by their mean,

    min over phi and w_av of sum_k R_k(w_av o phi),   w_av = (1/N) sum_q w_q,   each w_k a best response to the others.

Variant F has phi fixed; V trains it in even rounds, and predictors in odd ones. Parallel: all play at once. SMOOTH: a client
plays against the others' predictors and the mean b_p of their buffers, the past ones, as printed (1/|S|) (w_k' +
sum_{q != k} w_q + sum_{p != k} b_p). FAST: phi by the gradient of all data.

What is computed, with u_k the head that client k trains, eta its rate, B its bound, [.]_B elementwise in [-B, B]:

    parallel        T = N        u_k begins as m, the mean of all w
    players         T = N        u_k begins as (w_k + sum_{q != k} (w_q + b_q1 + ... + b_qn) / (1 + n)) / T
    terms           T = 2N - 1   u_k begins as (w_k + sum_{q != k} (w_q + b_q)) / T
    local step      u_k <- u_k - (eta / T^2) grad R_k(u_k)           a step of w_k at rate eta: the mean gives 1/T, twice
    box             w_k' = [w_k + T (u_k - its start)]_B             after every step
    server          m <- m + (T/N) sum_k (u_k - its start)           the mean of all w_k'; where T = N the sum of changes
    adapters        x <- x + (1/N) sum_k (x_k - x)                   R_k count alike; the rate is that of their mean

Sequential play, the form that the parallel one is made from, is one player after the other, a round each. A client keeps w_k
and, for SMOOTH, the mean of the others' heads of its last head rounds, (N m - w_k) / (N - 1): as all take part, it has seen
every m, and no head travels but their mean and a change of it.

COMPLETION. With buffers the printed weights do not sum to one. `smooth: terms` divides by their number; `players`, the default,
takes a player's present and past heads as one. Of players who move slowly against losses of equal curvature, the first has the
gains (2N - 1, -1, ..., -1): it runs away in every direction in which players differ, until the box holds it. The second has
those of parallel play, (N, 0, ..., 0). Buffers begin full of the first head. B: without a bound there is no equilibrium unless
the clients' optima agree; with one, a direction on which they disagree ends at a bound for some of them, and in the mean at
what the least of them wants, or at zero where signs differ. Momentum is that of w_k: what is linear commutes with the mean.
FAST is `local.steps: 1` with a batch as large as a client's data.

Limits. The mean drifts from the w_k by rounding alone. A client that is left out of a round (not finite, no memory) keeps w_k.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedmoe_ds.methods import (
    Assignment,
    BlockSpec,
    Client,
    ClientUpdate,
    ClientView,
    Config,
    Method,
    MethodInfo,
    MethodParams,
    PlanContext,
    RoundContext,
    RoundPlan,
    UserError,
    Weighing,
    remembered_block,
)

OWN, OTHERS = "own", "others"


class FLGamesParams(MethodParams):
    """How the game is played."""

    play: Literal["parallel", "sequential"] = Field(
        "parallel", description="sequential: one client after the other, a round each"
    )
    buffer: int = Field(0, ge=0, description="SMOOTH: past heads of every client that the others play against; 0: none")
    smooth: Literal["players", "terms"] = Field(
        "players", description="what a past head counts: as a share of its player, or as one more head"
    )
    box: float | None = Field(5.0, gt=0, description="B: every number of a client's head stays in [-B, B]; null: no bound")

    def idle(self, config: Config) -> dict[str, str]:
        found = {"buffer": "with method.play=sequential: one plays at a time"} if self.play == "sequential" else {}
        return found if self.buffer else found | {"smooth": "with method.buffer=0"}


class FLGames(Method):
    """Every client has a head, and all of them predict by the mean of their heads."""

    Params: ClassVar[type[MethodParams]] = FLGamesParams
    info = MethodInfo(
        title="FL Games",
        paper="arXiv 2205.11101",
        adapts="active experts k",
        trains="heads in odd rounds, adapters in even ones; without adapters heads",
        sends="what it trains",
        weighs="changes of heads: their sum; of adapters: equal",
        completion="a player's present and past heads are one; buffers begin full; a box for heads",
    )
    weighing = Weighing(changes=True)

    def __init__(self, params: FLGamesParams) -> None:
        super().__init__(params)
        self._adapters = self._heads = frozenset[str]()  # until its blocks are known

    def check_config(self, config: Config) -> None:
        local, federation, server = config.local, config.federation, config.server
        if config.adapters.head == "frozen":
            raise UserError("adapters.head: frozen: the players of method fl-games are clients' heads; use adapters.head=train")
        if federation.participation < 1.0:
            raise UserError(
                f"federation.participation: {federation.participation}: method fl-games is a game of all clients, of whom each "
                "plays against the mean of all; use 1.0"
            )
        if config.devices.simulated:
            raise UserError("devices: some of them may be off or late, and method fl-games needs all clients; drop the section")
        if local.optimizer != "sgd":
            raise UserError(
                f"local.optimizer: {local.optimizer}: method fl-games plays at rate lr / T^2 in the place of lr, which is the "
                "same for plain steps only; use sgd"
            )
        for key, value, usual in (("clip", local.clip, None), ("weight_decay", local.weight_decay, 0.0)):
            if value != usual:
                way = "null" if usual is None else usual
                raise UserError(
                    f"local.{key}: {value}: method fl-games steps along the gradient of a client's head alone; use {way}"
                )
        if local.drift != "none":
            raise UserError(f"local.drift: {local.drift}: in method fl-games clients differ on purpose; use none")
        if (server.optimizer, server.lr) != ("fedavg", 1.0):
            told = f"lr: {server.lr}" if server.optimizer == "fedavg" else f"optimizer: {server.optimizer}"
            raise UserError(
                f"server.{told}: the model of method fl-games is the mean of all heads, to which no other step leads; "
                "use server.optimizer=fedavg and server.lr=1"
            )
        if server.training is not None:
            raise UserError(
                "server.training: the model of method fl-games is the mean of all heads, which the server would lead away from "
                "them; drop the section, and data.public"
            )

    # Before and during local training

    def blocks(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        self._adapters = frozenset(spec.name for spec in specs if spec.trained and not spec.after_layers)
        self._heads = frozenset(spec.name for spec in specs if spec.after_layers)
        return specs

    def client_state(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        words = [OWN, *(self._past(age) for age in range(self._buffer))]
        return [remembered_block(spec, word) for spec in specs if spec.after_layers for word in words]

    def begins_as(self, spec: BlockSpec) -> str | None:
        head, _, leaf = spec.name.split(".")
        return f"{head}.{leaf}"

    def plan(self, context: PlanContext) -> RoundPlan:
        if self.params.play == "parallel" or not self._heads_play(context.round):
            return RoundPlan(context.drawn)
        turn = (context.round - 1) // (2 if self._adapters else 1)
        return RoundPlan([context.drawn[turn % len(context.drawn)]])

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        assignment = super().assign(client, context)
        if not self._adapters or context.round == 0:
            return assignment
        if self._heads_play(context.round):
            return replace(assignment, trained_N=np.zeros(self.facts.depth, dtype=bool))
        return replace(assignment, trains_head=False)

    def start(self, view: ClientView) -> dict[str, Tensor]:
        if not self._buffer or not view.assignment.trains_head:
            return {}
        found = {}
        for spec in self._heads_of(view):
            past = torch.stack([view.client_state[self._named(spec, self._past(age))] for age in range(self._buffer)])
            # In float64 and rounded once, as everything here that is computed of several heads.
            own, mean = view.client_state[self._named(spec, OWN)].double(), view.received(spec).double()
            found[spec.name] = self._against(own, mean, past.double().mean(0)).float()
        return found

    def _against(self, own: Tensor, mean: Tensor, past: Tensor) -> Tensor:
        """What a client predicts by before it moves; `past` is the mean of all heads in the others' buffers."""
        players, n = self.facts.clients, self._buffer
        now, before = players * mean - own, (players - 1) * past
        others = now + before if self.params.smooth == "terms" else (now + n * before) / (1 + n)
        return (own + others) / self._terms

    def adjust(self, view: ClientView) -> None:
        for spec in self._heads_of(view):
            view.grad(spec).div_(self._terms**2)

    def project(self, view: ClientView) -> None:
        if self.params.box is None or not view.assignment.trains_head:
            return
        for spec in self._heads_of(view):
            own, start, value = view.client_state[self._named(spec, OWN)], view.received(spec), view.value(spec)
            value.copy_(_in_box(own, start, value, self._terms, self.params.box))

    # After local training

    def remember_blocks(self, view: ClientView) -> dict[str, Tensor]:
        if not view.assignment.trains_head:
            return {}
        found, players = {}, self.facts.clients
        for spec in self._heads_of(view):
            own, mean = view.client_state[self._named(spec, OWN)], view.start.client(spec.name, 0)
            found[self._named(spec, OWN)] = _moved(own, view.received(spec), view.value(spec), self._terms, self.params.box)
            others = (players * mean.double() - own.double()) / max(players - 1, 1)
            ring = [others.float(), *(view.client_state[self._named(spec, self._past(age))] for age in range(self._buffer - 1))]
            found |= {self._named(spec, self._past(age)): value for age, value in enumerate(ring[: self._buffer])}
        return found

    # Aggregation

    def resting(self, round_index: int) -> frozenset[str]:
        return self._adapters if self._heads_play(round_index) else self._heads

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        terms = self._terms if spec.after_layers else 1
        return super().weights(spec, update, terms / self.facts.clients)

    @property
    def _buffer(self) -> int:
        return int(self.params.buffer)

    @property
    def _terms(self) -> int:
        """T."""
        players = self.facts.clients
        return 2 * players - 1 if self._buffer and self.params.smooth == "terms" else players

    def _heads_play(self, round_index: int) -> bool:
        return round_index % 2 == 1 or not self._adapters

    @staticmethod
    def _past(age: int) -> str:
        return f"{OTHERS}-{age}"

    @staticmethod
    def _named(spec: BlockSpec, word: str) -> str:
        return remembered_block(spec, word).name

    @staticmethod
    def _heads_of(view: ClientView) -> list[BlockSpec]:
        return [spec for spec in view.blocks() if spec.after_layers]


def _moved(own: Tensor, start: Tensor, trained: Tensor, terms: int, box: float | None) -> Tensor:
    """w_k after its client has trained u_k from `start`."""
    moved = own.double() + terms * (trained.double() - start.double())
    return (moved if box is None else moved.clamp(-box, box)).float()


def _in_box(own: Tensor, start: Tensor, trained: Tensor, terms: int, box: float) -> Tensor:
    """u_k with w_k in the box; where it is already, its very bits."""
    moved = own.double() + terms * (trained.double() - start.double())
    bounded = start.double() + (moved.clamp(-box, box) - own.double()) / terms
    return torch.where(moved.abs() <= box, trained, bounded.float())
