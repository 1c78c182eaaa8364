"""FLEX-MoE: its plans, pure functions of what the server remembers, and what real runs do with experts and routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import dense_config, write_dense
from every import every
from federations import Result, alone, build, finish, make_config, own_values, run_alone, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import Config, MethodConfig
from fedmoe_ds.methods import (
    EXPERT_LOSS,
    EXPERT_TARGETS,
    ROUTER,
    BlockSpec,
    Memory,
    Method,
    ModelFacts,
    PlanContext,
    RoundContext,
    load_method,
)
from fedmoe_ds.methods.flex_moe import FlexMoE, missed, usual
from fedmoe_ds.report import write_report

L, E = 2, 6
SHAPE = (L, E)
EXPERTS = BlockSpec("experts.down.lora_A", (0, 1), (4, 3), expert=True)
ATTENTION = BlockSpec("attention.q_proj.lora_A", (0, 1), (4, 3))


def flex_moe(experts: int = E, **keys: Any) -> FlexMoE:
    method = load_method(MethodConfig.model_validate({"name": "flex-moe", **keys}))
    assert isinstance(method, FlexMoE)
    method.facts = ModelFacts(2, experts, 4, 7, layers=(0, 1))
    return method


def client(index: int, experts: int = 3, cap: int = 2) -> Client:
    return Client(index, f"c{index}", cap, 5, 5, 50, cap, 4, experts)


def asked(clients: list[Client], memories: dict[int, Memory], round_index: int = 2) -> PlanContext:
    return PlanContext(round_index, clients, clients, memories)


def report(plan: np.ndarray, observed: dict[str, np.ndarray], memory: Memory | None) -> ClientUpdate:
    counts_LE = np.ones(SHAPE, dtype=np.int64)
    return ClientUpdate(client(0), 0, 0, 1, 10, counts_LE, True, observed=observed, plan=plan, memory=memory or {})


def seen(fitness_LE: np.ndarray, assigned: float = 1.0) -> Memory:
    return {"fitness": fitness_LE, "held": np.ones_like(fitness_LE), "assigned": np.full_like(fitness_LE, assigned)}


# Plans


@settings(max_examples=30, derandomize=True)
@given(st.lists(st.integers(1, E), min_size=1, max_size=7), st.sampled_from([0.0, 0.1, 0.5]), st.integers(0, 99))
def test_every_layer_keeps_budgets_and_bounds(budgets: list[int], tolerance: float, seed: int) -> None:
    method, clients = flex_moe(tolerance=tolerance), [client(i, experts) for i, experts in enumerate(budgets)]
    draws = np.random.default_rng(seed)
    memories = {i: seen(draws.random(SHAPE), float(draws.integers(0, 4))) for i in range(0, len(clients), 2)}
    parts = method.plan(asked(clients, memories)).parts
    taken_CLE = np.stack([parts[i] for i in range(len(clients))])
    mean = sum(budgets) / E
    assert (taken_CLE.sum(2) == np.array(budgets)[:, None]).all()
    assert taken_CLE.sum(0).min() >= np.floor((1 - tolerance) * mean)
    assert taken_CLE.sum(0).max() <= np.ceil((1 + tolerance) * mean)
    # In whichever order clients were trained, which is the topology's: to the bit, as sums of floats are not.
    again = method.fitness(asked(clients, dict(reversed(memories.items()))))
    assert (again == method.fitness(asked(clients, memories))).all()


def test_without_bounds_it_is_the_greedy_choice() -> None:
    method, clients = flex_moe(tolerance=None, kappa=0.0), [client(i, 1 + i) for i in range(4)]
    memories = {i: seen(np.random.default_rng(i).random(SHAPE)) for i in range(4)}
    parts = method.plan(asked(clients, memories)).parts
    for i in range(4):
        for layer in range(L):
            best = np.argsort(-memories[i]["fitness"][layer])[: 1 + i]
            assert np.flatnonzero(parts[i][layer]).tolist() == sorted(best.tolist())


def test_random_experts_are_drawn_anew_for_every_client_and_round() -> None:
    method, clients = flex_moe(score="random"), [client(i) for i in range(3)]
    memories = {i: seen(np.random.default_rng(i).random(SHAPE)) for i in range(3)}
    one, same, other = (method.fitness(asked(clients, known, at)) for known, at in ((memories, 1), ({}, 1), (memories, 2)))
    assert (one == same).all() and (one != other).all() and (one[0] != one[1]).all()


def test_fitness_moves_on_what_was_assigned_and_used() -> None:
    method = flex_moe(alpha=0.5, beta=0.25)
    plan = np.zeros(SHAPE, dtype=bool)
    plan[0, :3] = True
    targets_LE, loss_LE = np.zeros(SHAPE), np.zeros(SHAPE)
    targets_LE[0, :2], loss_LE[0, :2] = 4, (8.0, 4.0)
    observed = {EXPERT_TARGETS: targets_LE, EXPERT_LOSS: loss_LE}
    first = method.memorise(report(plan, observed, None))
    assert first["fitness"][0].tolist() == pytest.approx([np.exp(-1.0), np.exp(-0.5), 0, 0, 0, 0])
    assert first["assigned"][0].tolist() == [1, 1, 1, 0, 0, 0] == first["held"][0].tolist()
    loss_LE[0] = (0.0, 4e6, 0, 0, 0, 0)
    second = method.memorise(report(plan, observed, first))
    assert second["fitness"][0, 0] == pytest.approx(0.75 * np.exp(-1.0) + 0.25)
    assert second["fitness"][0, 1] == pytest.approx(0.75 * first["fitness"][0, 1]) and second["assigned"].sum() == 6
    # A loss beyond all bounds is known as such, and is not taken for one that nobody has seen.
    assert method.memorise(report(plan, observed, None))["fitness"][0, 1] > 0
    assert {name: value.shape for name, value in second.items()} == method.memory()


def test_what_a_client_does_not_know_it_expects_as_others_found_it() -> None:
    half = {**seen(np.zeros(SHAPE)), "fitness": np.zeros(SHAPE)}
    one, other = ({**half, "fitness": np.zeros(SHAPE)} for _ in range(2))
    one["fitness"][:, 0], other["fitness"][:, 0] = 0.2, 0.6
    assert usual([one, other], SHAPE) == pytest.approx(np.full(SHAPE, 0.4))
    one["fitness"][0, 1] = 0.1
    expected_LE = usual([one, other, half], SHAPE)
    assert expected_LE[0, :2] == pytest.approx([0.4, 0.1]) and expected_LE[1, 3] == pytest.approx((0.2 + 0.6) * 2 / 5 + 0.02)
    assert (usual([], SHAPE) == 0).all()
    # And what it knows counts for what it is.
    fitness_CLE = flex_moe().fitness(asked([client(0), client(1)], {0: one, 2: other}))
    assert fitness_CLE[0, 0, :2].tolist() == [0.2, 0.1] and 0.4 < fitness_CLE[1, 0, 0] < 0.401


def test_what_was_missed_counts_most_where_most_was() -> None:
    memory = seen(np.ones(SHAPE))
    memory["assigned"][0] = [0, 4, 8, 4, 4, 4]
    assert missed([memory], SHAPE)[0].tolist() == [1, 0, 0, 0, 0, 0] and not missed([memory], SHAPE)[1].any()
    # All else being equal, it comes first.
    parts = flex_moe().plan(asked([client(0, 1)], {0: memory})).parts
    assert parts[0][0].tolist() == [True, False, False, False, False, False]


def test_usage_weighs_and_what_is_not_used_weighs_nothing() -> None:
    method = flex_moe()
    update = report(np.ones(SHAPE, dtype=bool), {}, None)
    update.counts_LE[0, 0], update.counts_LE[1, 2] = 7, 0
    weight_LE = method.weights(EXPERTS, update, 0.25)
    assert weight_LE[0, 0] == 7 and weight_LE[1, 2] == 0 and weight_LE[1, 3] == 1
    assert (method.weights(ATTENTION, update, 0.25) == 0.25).all()


def test_an_evaluation_uses_what_was_trained_last() -> None:
    method, held_LE = flex_moe(), np.arange(L * E).reshape(SHAPE) % 2 == 0
    memory = {**seen(np.ones(SHAPE)), "held": held_LE.astype(float)}
    told = method.assign(client(0), RoundContext(0, {}, memory=memory)).allowed_LE
    assert told is not None and (told == held_LE).all()
    assert method.assign(client(0), RoundContext(0, {})).allowed_LE is None


def load_variation(method: FlexMoE, experts: int, rounds: int) -> float:
    """Coefficient of variation of how often experts were assigned, where all clients tend to like the same ones."""
    clients, popular_E = [client(i, 2) for i in range(10)], np.linspace(0.0, 0.3, experts)
    taste_CLE = np.random.default_rng(0).random((10, L, experts)) * 0.4 + popular_E + 0.01
    memories: dict[int, Memory] = {}
    for round_index in range(1, rounds + 1):
        parts = method.plan(asked(clients, memories, round_index)).parts
        for i, part in parts.items():
            old = memories.get(i, seen(taste_CLE[i], 0.0))
            memories[i] = {**old, "held": part.astype(float), "assigned": old["assigned"] + part}
    load_LE = sum(memory["assigned"] for memory in memories.values())
    return float((load_LE.std(1) / load_LE.mean(1)).max())


def test_loads_vary_less_than_those_of_the_greedy_choice() -> None:
    """The paper's ordering: greedy more than 0.29, the program about 0.003. Ten clients, two of eight experts each."""
    greedy = load_variation(flex_moe(8, tolerance=None, kappa=0.0), 8, 30)
    program = load_variation(flex_moe(8), 8, 30)
    assert greedy > 0.29 and program < 0.02, (greedy, program)


# Runs

QUICK: dict[str, Any] = {
    "method": {"name": "flex-moe"},
    "adapters": {"router": "train"},
    "local": {"max_steps": 2},
    "execution": {"micro_batch_size": None},
    "evaluation": {"client_sequences": 1, "max_sequences": 2, "every": 9},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flex-moe")
    write_inputs(folder)
    write_dense(folder, ("vit",))
    return folder


def kept_routers(config: Config, spoilt: int | None = None) -> tuple[Result, dict[int, list[torch.Tensor]]]:
    """A run, and the router that every client ended its rounds with; that of `spoilt` is another before anybody sees it."""
    parts, journal = build(config, *alone())
    found: dict[int, list[torch.Tensor]] = {}

    def look(view: ClientView, update: ClientUpdate) -> str | None:
        value = view.value(parts.execution.bank.specs[ROUTER])
        if update.client.index == spoilt:
            value.mul_(-3.0)
        found.setdefault(update.client.index, []).append(value.clone())
        return None

    return finish(parts, journal, look), found


def test_a_router_stays_with_its_client(root: Path) -> None:
    """Every client goes on with its own; what one of them has for a router reaches nobody else."""
    tiers = {"rounds": 1, "tiers": [{"experts": 5, "share": 1.0}], "participation": 1.0}
    result, routers = kept_routers(make_config(root, "routers", QUICK, {"federation": tiers}))
    own = own_values(result.parts)[ROUTER]
    assert every(torch.equal(own[index], values[-1]) for index, values in routers.items())
    assert len({value.numpy().tobytes() for value in own}) == len(routers) > 1
    assert not [key for key in result.adapters if key.endswith(ROUTER)]
    other, changed = kept_routers(make_config(root, "another-router", QUICK, {"federation": tiers}), spoilt=2)
    assert not torch.equal(changed[2][0], routers[2][0])
    assert every(torch.equal(changed[index][0], routers[index][0]) for index in routers if index != 2)
    assert other.adapters.keys() == result.adapters.keys()
    assert every(np.array_equal(value, result.adapters[key]) for key, value in other.adapters.items())


def test_clients_use_the_experts_that_they_are_assigned(root: Path) -> None:
    """And an expert is made of what its clients trained, weighted by the rows that they sent to it."""
    tiers = {"rounds": 2, "tiers": [{"experts": 5, "share": 1.0}, {"experts": 3, "share": 1.0}], "participation": 1.0}
    parts, journal = build(make_config(root, "assigned", QUICK, {"federation": tiers}), *alone())
    name, updates, values = "experts.down.lora_A", dict[int, ClientUpdate](), dict[int, torch.Tensor]()
    start: list[torch.Tensor] = []

    def look(view: ClientView, update: ClientUpdate) -> str | None:
        if parts.state.round == 1:
            if not start:
                start.append(parts.state.adapters.client(name, 0).clone())
            updates[update.client.index] = update
            values[update.client.index] = view.value(parts.execution.bank.specs[name]).clone()
        return None

    result = finish(parts, journal, look)
    load_LE = sum(update.plan.astype(int) for update in updates.values())
    assert len(updates) == len(parts.clients) and load_LE.min() >= 1 and load_LE.max() - load_LE.min() <= 2
    told = [event["load_variation"] for event in result.events if event["event"] == "round"]
    assert len(told) == 2 and told[-1] == pytest.approx((load_LE.std(1) / load_LE.mean(1)).mean())
    assert "load variation" in write_report(Path(parts.config.output) / parts.config.name).read_text()
    final = result.parts.state.adapters.client(name, 0)
    for index, update in updates.items():
        assert not update.counts_LE[~update.plan].any() and (update.plan.sum(1) == update.client.experts).all()
        assert (parts.state.personal.memories[index]["held"] == update.plan).all()
    for layer, expert in np.ndindex(load_LE.shape):
        weights = {index: int(update.counts_LE[layer, expert]) for index, update in updates.items()}
        if total := sum(weights.values()):
            mean = sum(values[index][layer, expert].double() * weight for index, weight in weights.items()) / total
            assert torch.allclose(final[layer, expert].double(), mean, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(final[layer, expert], start[0][layer, expert])


WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "one client at a time": ({"clients_in_flight": 1}, True),
    "recomputed": ({"activation_checkpointing": True}, True),
    "packed": ({"packing": True}, False),
    "fast": ({"reproducible": "fast"}, False),
    "micro-batches": ({"micro_batch_size": 3}, False),
}


def test_what_the_server_learns_is_the_same_in_every_way_to_compute_a_step(root: Path) -> None:
    """Fitness per assigned expert, with masks in every layer: packed, recomputed, together and alone."""
    tiers = {"rounds": 1, "tiers": [{"experts": 7, "share": 1.0}, {"experts": 3, "share": 1.0}], "participation": 1.0}
    change = {"federation": tiers, "local": {"max_steps": 1}, "evaluation": {"client_sequences": 0}}

    def learnt(name: str, execution: dict[str, Any]) -> dict[int, Memory]:
        result = run_alone(make_config(root, name.replace(" ", "-"), QUICK, change, {"execution": execution}))
        return dict(result.parts.state.personal.memories)

    expected = learnt("plain", {})
    assert every((memory["fitness"] > 0).any() and (memory["fitness"] == 0).any() for memory in expected.values())
    for way, (execution, exact) in WAYS.items():
        found = learnt(way, execution)
        assert found.keys() == expected.keys()
        for index, memory in found.items():
            apart = np.abs(memory["fitness"] - expected[index]["fitness"]).max()
            assert apart <= (0 if exact else 1e-4), (way, index, apart)
            assert every((memory[name] == expected[index][name]).all() for name in ("held", "assigned")), (way, index)


def test_all_experts_and_equal_use_are_fedavg_with_own_routers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images have as many tokens each, and every token uses all experts: rows are in proportion to data sizes."""
    tiers = {"rounds": 2, "tiers": [{"experts": 4, "share": 1.0}]}
    every_expert = {"federation": tiers, "adapters": {"moe": {"experts": 4, "top_k": 4}}}
    quick = {key: value for key, value in QUICK.items() if key in ("method", "execution")}
    epoch = {"local": {"max_steps": None, "epochs": 1, "optimizer": "sgd", "lr": 0.1}}
    ours = run_alone(dense_config(root, "vit", "all", quick, every_expert, epoch))
    assert every(
        (update["active_experts"], update["status"]) == (4, "ok") for update in ours.events if update["event"] == "client"
    )
    monkeypatch.setattr(FlexMoE, "weights", Method.weights)
    theirs = run_alone(dense_config(root, "vit", "fedavg", quick, every_expert, epoch))
    assert ours.adapters.keys() == theirs.adapters.keys() and len(ours.adapters) > 4
    assert every(np.allclose(value, theirs.adapters[key], rtol=1e-5, atol=1e-7) for key, value in ours.adapters.items())
