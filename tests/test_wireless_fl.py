"""The choice of wireless FL against brute force, and its long-term promises over runs of the plan alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.clients.client import Client
from fedmoe_ds.config import MethodConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import Load, ModelFacts, PlanContext, RoundPlan, load_method
from fedmoe_ds.methods.wireless_fl import best_choice, divergence, drained

SEEDS = st.integers(0, 10**6)
ROUNDS = 30


def term(term_MN: np.ndarray, place: int, subset: tuple[int, ...]) -> float:
    return math.fsum(term_MN[place, list(subset)])


@given(SEEDS, st.integers(1, 6), st.integers(1, 7))
def test_the_choice_is_that_of_brute_force(seed: int, most: int, clients: int) -> None:
    draw = np.random.default_rng(seed)
    term_MN = draw.normal(size=(4, min(clients, 6)))
    term_MN[draw.random(term_MN.shape) < 0.2] = math.inf
    subsets = [s for size in range(most + 1) for s in itertools.combinations(range(term_MN.shape[1]), size)]
    best = min(term(term_MN, place, subset) for place in range(4) for subset in subsets)
    place, chosen = best_choice(term_MN, most)
    assert len(chosen) <= most and term(term_MN, place, tuple(chosen)) == best


def test_equal_choices_take_the_first() -> None:
    assert best_choice(np.array([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]]), 2) == (0, [0, 1])
    # Nobody, where everybody costs more than he brings.
    assert best_choice(np.array([[0.0, 1.0, math.inf]]), 2) == (0, [])


def test_divergence_is_total_variation() -> None:
    counts_NC = np.array([[4, 0], [1, 1], [0, 2]])
    assert divergence(counts_NC, np.array([6, 6])).tolist() == [0.5, 0.0, 0.5]


@given(st.floats(0, 100), st.floats(0.01, 10), st.integers(0, 50))
def test_idle_rounds_drain_a_queue_one_by_one(queue: float, limit: float, rounds: int) -> None:
    expected = queue
    for _ in range(rounds):
        expected = max(expected - limit, 0.0)
    assert math.isclose(drained(queue, limit, rounds), expected, abs_tol=1e-9)


class Run:
    """The plans of a federation whose clients train in no time."""

    def __init__(self, seed: int, clients: int = 8, labels: int = 3, **params: Any) -> None:
        draw = np.random.default_rng(seed)
        self.method = load_method(MethodConfig.model_validate({"name": "wireless-fl", **params}))
        self.method.facts = ModelFacts(1, 1, 1, seed)
        sizes, counts = draw.integers(5, 60, size=clients), draw.integers(1, 9, size=(clients, labels))
        self.clients = [Client(i, f"c{i}", 1, n, n, n) for i, n in enumerate(sizes.tolist())]
        self.counts_NC = counts
        self.loads = {client.index: Load(3, client.samples * 4e7, 50_000) for client in self.clients}
        self.memories: dict[int, dict[str, np.ndarray]] = {}
        self.spent = np.zeros((ROUNDS, clients))

    def plan(self, round_index: int) -> RoundPlan:
        return self.method.plan(self.context(round_index))

    def context(self, round_index: int) -> PlanContext:
        load, labels = (lambda client: self.loads[client.index]), (lambda: self.counts_NC)
        return PlanContext(round_index, self.clients, self.clients, self.memories, load, labels)

    def go(self) -> list[RoundPlan]:
        plans = []
        for round_index in range(1, ROUNDS + 1):
            plan = self.plan(round_index)
            for client in plan.participants:
                part = plan.parts[client.index]
                update: Any = SimpleNamespace(plan=part)
                self.spent[round_index - 1, client.index] = part.joules
                self.memories[client.index] = self.method.memorise(update)
            plans.append(plan)
        return plans


@settings(max_examples=10)
@given(SEEDS, st.sampled_from([0.05, 0.3, 2.0]), st.sampled_from([0.01, 1.0, 100.0]))
def test_promises_of_every_run(seed: int, limit: float, trade_off: float) -> None:
    run = Run(seed, energy_j=limit, trade_off=trade_off, deadline_s=5.0, channels=3)
    plans, params = run.go(), run.method.params
    for plan in plans:
        for index, part in plan.parts.items():
            spent = plan.spending[index]
            assert spent.compute_s > 0 and spent.up_s > 0 and spent.compute_s + spent.up_s <= 5.0 * (1 + 1e-12)
            assert 0.0 < part.power <= params.power_w and part.joules == spent.joules > 0.0
    queue_N = np.zeros(len(run.clients))
    for spent_N in run.spent:
        queue_N = np.maximum(queue_N + spent_N - limit, 0.0)
    # The queues that memories know are those of the definition, drained since, and they bound what was spent.
    for client, memory in run.memories.items():
        now = drained(float(memory["queue"]), limit, ROUNDS - int(memory["round"]))
        assert math.isclose(now, queue_N[client], rel_tol=1e-9, abs_tol=1e-9)
    assert every((run.spent.mean(0) <= limit + queue_N / ROUNDS + 1e-12).tolist())


def test_without_a_limit_the_best_clients_do_all_epochs() -> None:
    run = Run(3, deadline_s=60.0, channels=3)
    plans = run.go()
    method: Any = run.method
    worth = method._worth(run.context(1))
    best = sorted(np.argsort(-worth, kind="stable")[:3].tolist())
    assert every([c.index for c in plan.participants] == best for plan in plans)
    assert every(part.epochs == 5 and part.queue == 0.0 for plan in plans for part in plan.parts.values())
    assert every(client.steps == 15 for plan in plans for client in plan.participants)


def test_fewest_and_most_epochs_bound_the_choice() -> None:
    tight = {"energy_j": 0.02, "trade_off": 0.05, "channels": 3, "deadline_s": 60.0}
    chosen = [
        {part.epochs for plan in Run(4, **tight, **bounds).go() for part in plan.parts.values()}
        for bounds in ({}, {"least_epochs": 3}, {"least_epochs": 2, "epochs": 2})
    ]
    assert min(chosen[0]) < 3 <= min(chosen[1]) and chosen[2] == {2}


def test_clients_whose_labels_are_like_everybodys_come_first() -> None:
    run = Run(2, clients=2, labels=2, channels=1, divergence=10.0)
    run.clients = [replace(client, samples=10) for client in run.clients]
    run.counts_NC = np.array([[9, 1], [40, 60]])
    assert [client.index for client in run.plan(1).participants] == [1]
    run.method = load_method(MethodConfig.model_validate({"name": "wireless-fl", "channels": 1, "divergence": 0.0}))
    run.method.facts = ModelFacts(1, 1, 1, 2)
    assert [client.index for client in run.plan(1).participants] == [0]


def test_with_a_channel_for_everybody_and_no_limit_it_is_fedavg() -> None:
    run = Run(3, deadline_s=600.0, channels=8)
    assert every([c.index for c in plan.participants] == list(range(8)) for plan in run.go())


def test_a_plan_follows_from_its_context() -> None:
    assert Run(5, energy_j=0.1).go() == Run(5, energy_j=0.1).go()


def test_more_weight_on_utility_leaves_longer_queues() -> None:
    queues = []
    for trade_off in (0.01, 1.0, 100.0):
        run = Run(4, energy_j=0.05, trade_off=trade_off, channels=3)
        run.go()
        queues.append(sum(float(memory["queue"]) for memory in run.memories.values()))
    assert queues == sorted(queues) and queues[0] < queues[-1]


def test_lots_fall_among_those_who_can_meet_the_deadline() -> None:
    run = Run(6, schedule="random", deadline_s=4.0, channels=3)
    plans = run.go()
    everybody = {client.index for plan in plans for client in plan.participants}
    assert len(everybody) > 3 and every(len(plan.participants) <= 3 for plan in plans)
    assert every(part.power <= 0.1 and part.epochs == 5 for plan in plans for part in plan.parts.values())
    # Nobody is fast enough for five epochs: nobody is drawn.
    assert not Run(6, schedule="random", deadline_s=0.01).plan(1).participants


def test_data_without_labels_have_no_divergence() -> None:
    with pytest.raises(UserError, match=r"method\.divergence: 1\.0: the data have no labels"):
        Run(1, labels=0).plan(1)
    assert Run(1, labels=0, divergence=0.0).plan(1).participants
