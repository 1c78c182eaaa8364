"""The planner's waves, all computed at once, against the same sums wave by wave and rank by rank."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planned import small

from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.local_training import Wave
from fedmoe_ds.clients.optimizer import squared_norms
from fedmoe_ds.federation.schedule import schedule
from fedmoe_ds.methods import Method
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.planner import Hardware, Job, World, load_hardware, predict_job
from fedmoe_ds.planner.client_costs import ClientCosts
from fedmoe_ds.planner.exchanges import exchanged
from fedmoe_ds.planner.network import Group, Network
from fedmoe_ds.planner.search import search
from fedmoe_ds.planner.training import WaveModel
from fedmoe_ds.planner.work import Rows, stage_seconds
from fedmoe_ds.planner.workload import Steps

__all__ = ["small"]
Table = dict[str, float]


def with_clients(job: Job, steps: list[int], caps: list[int], seed: int) -> Job:
    """The job with other clients: so many local steps of random sizes, and caps."""
    source = np.random.default_rng(seed)
    one = job.clients[0]
    clients = [replace(one, index=i, name=f"c{i}", cap=cap) for i, cap in enumerate(caps)]
    config = job.config.model_copy(update={"federation": job.config.federation.model_copy(update={"participation": 1.0})})
    job = replace(job, clients=clients, config=config)
    for client, count in zip(clients, steps, strict=True):
        samples, longest = source.integers(1, 5, count), source.integers(2, 40, count)
        rows = samples * longest
        job._steps[client.index, 1] = Steps(samples, longest, rows, rows - samples, source.integers(1, 3, count))
    return job


class OneByOne:
    """Waves of one plan, each by itself."""

    def __init__(self, job: Job, hardware: Hardware, world: World, ep_size: int, in_flight: int) -> None:
        self.job, self.network, self.ep_size = job, Network(hardware, world), ep_size
        # Dealt to ranks there and back again: so many clients at home on each.
        turns = [*range(ep_size), *reversed(range(ep_size))]
        homes = [turns[place % len(turns)] for place in range(in_flight)]
        self.at_home, self.home = [homes.count(rank) for rank in range(ep_size)], -(-in_flight // ep_size)
        self.group = Group.cluster(world, ep_size)
        self.model = WaveModel(
            job, hardware, self.network, ep_size, in_flight, ClientCosts.of(job, hardware, world.ranks_per_host, 1)
        )
        self.held = in_flight * self.model.expert + self.home * self.model.dense
        self.compute, self.cores = self.model.compute, self.model.cores
        self.spent: Table = defaultdict(float)
        cut = ep_size > 1 and job.expert_layout.num_experts // ep_size > 1
        self.parts = 1 + (cut and job.config.execution.expert_halves)
        self.rows_s = self.products_s = 0.0

    def run(self, waves: list[Wave]) -> Table:
        for wave in waves:
            self.rows_s = self.products_s = 0.0
            steps = max(len(self.job.steps(client, 1)) for home in wave for client in home)
            most = max(map(len, wave)) if not self.job.shares_passes else 1
            for slot in range(most):
                part = wave if self.job.shares_passes else [home[slot : slot + 1] for home in wave]
                blocks = 1 if self.job.shares_passes else sum(slot < count for count in self.at_home)
                for step in range(steps):
                    self._step(part, step, blocks)
            # A half's way hides behind the other's products, as far as these reach.
            self.spent["all_to_all"] -= min(self.rows_s / 2, self.products_s) * (self.parts == 2 and self.job.device == "cuda")
            self._optimizer(wave, steps)
            self._before_and_after(wave)
        return dict(self.spent)

    def _step(self, homes: Wave, step: int, blocks: int) -> None:
        model, layout = self.model, self.job.expert_layout
        busy, routed, passes = [0.0] * self.ep_size, 0.0, 0.0
        for rank, home in enumerate(homes):
            for client in home:
                own = self.job.steps(client, 1)
                if step >= len(own):
                    continue
                rows = Rows(own.samples[step], own.longest[step], own.targets[step])
                busy[rank] += model.work.seconds(model.work.home(rows), self.compute)
                routed += own.rows[step] * client.cap
                passes = max(passes, float(own.passes[step]))
        if not passes:
            return
        fixed = model.work.seconds(model.work.fixed() + model.work.gradients(self.held), self.compute)
        there = model.work.experts(routed / self.ep_size / passes, blocks, layout.num_experts // self.ep_size, self.parts)
        experts = float(model.work.seconds(there, self.compute))
        self.products_s += experts * passes
        busy = [own + (experts + fixed) * passes for own in busy]
        mean, critical = sum(busy) / len(busy), max(*busy, sum(busy) / self.cores)
        self.spent["compute"] += mean
        self.spent["waiting"] += critical - mean
        self.spent["work"] += sum(busy)
        if self.ep_size > 1:
            self.sent(routed, passes)

    def sent(self, routed: float, passes: float) -> None:
        layout = self.job.expert_layout
        calls, numbers = exchanged(self.job, True, routed / self.ep_size / passes, self.parts)
        slots = self.home if self.job.shares_passes else 1
        counts = len(layout.layers) * layout.num_experts * slots * 8 * (1 + self.model.work.recompute)
        size = numbers * self.model.work.number_bytes + counts
        seconds = self.network.all_to_all(self.group, calls * passes, size / calls)
        self.spent["all_to_all"] += seconds
        self.rows_s += seconds * (1 - len(layout.layers) / calls)

    def _busy(self, cause: str, seconds: list[float]) -> None:
        self.spent["work"] += sum(seconds)
        self.spent[cause] += max(*seconds, sum(seconds) / self.cores)

    def _optimizer(self, wave: Wave, steps: int) -> None:
        model = self.model
        at_home = [sum(len(self.job.steps(client, 1)) for client in home) for home in wave]
        every = sum(at_home)
        shared = stage_seconds(self.compute, "update", model.expert * every, model.expert_blocks * every)
        shared += stage_seconds(self.compute, "norm", self.held * steps, model.blocks * steps)
        own = [stage_seconds(self.compute, "update", model.dense * n, model.dense_blocks * n) for n in at_home]
        self._busy("optimizer", [shared + mine for mine in own])

    def _before_and_after(self, wave: Wave) -> None:
        model, clients = self.model, sum(map(len, wave))
        moved = stage_seconds(self.compute, "move", self.held * 4, model.blocks)  # values, gradients, two moments
        moved += stage_seconds(self.compute, "norm", self.held, model.blocks)
        self._busy("set-up", [moved] * self.ep_size)
        most = max(map(len, wave))
        blocks = clients * model.expert_blocks + most * model.dense_blocks
        folded = stage_seconds(self.compute, "fold", clients * model.expert + most * model.dense, blocks)
        self._busy("fold", [folded] * self.ep_size)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=9),
    st.sampled_from([(1, 1), (1, 4), (2, 2), (2, 4), (4, 4)]),
    st.integers(1, 6),
    st.integers(0, 99),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_waves_at_once(
    small: Job, drawn: list[tuple[int, int]], place: tuple[int, int], in_flight: int, seed: int, gpu: bool, halves: bool
) -> None:
    ep_size, ranks = place
    hardware, world = load_hardware("a100" if gpu else "cpu"), World(1, ranks)
    execution = small.config.execution.model_copy(update={"expert_halves": halves})
    base = replace(small, device=hardware.kind, config=small.config.model_copy(update={"execution": execution}))
    job = with_clients(base, [n for n, _ in drawn], [cap for _, cap in drawn], seed)
    costs = ClientCosts.of(job, hardware, ranks, 1)
    plan = schedule(costs.chosen, job.cost, job.config.local, ranks // ep_size, ep_size, in_flight)
    most = max(sum(map(len, wave)) for waves in plan for wave in waves)
    spent, traffic = WaveModel(job, hardware, Network(hardware, world), ep_size, most, costs).clusters(plan)
    references = [OneByOne(job, hardware, world, ep_size, most) for _ in plan]
    for own, reference, waves in zip(spent, references, plan, strict=True):
        expected = reference.run(waves)
        found = {**own.parts, "work": own.work}
        for cause in ("compute", "waiting", "all_to_all", "optimizer", "set-up", "fold", "work"):
            assert found.get(cause, 0.0) == pytest.approx(expected.get(cause, 0.0), rel=1e-9, abs=1e-15), cause
    slowest = max(range(len(plan)), key=lambda i: spent[i].total)
    booked = references[slowest].network.traffic
    if ep_size > 1:
        for name in ("calls", "bytes", "seconds"):
            ours, theirs = getattr(traffic["all_to_all"], name), getattr(booked["all_to_all"], name)
            assert ours == pytest.approx(theirs, rel=1e-9)


def test_what_a_rank_gathers_is_what_it_holds(small: Job) -> None:
    """Norms and reports of five clients in flight on four ranks: five slots of experts, two homes."""
    ep_size, in_flight, clip = 4, 5, {"clip": 1.0}
    local = small.config.local.model_copy(update=clip)
    clipped = replace(small, config=small.config.model_copy(update={"local": local}))
    job = with_clients(clipped, [3] * in_flight, [1] * in_flight, 0)
    assert type(job.method).measure is Method.measure, "nothing else is gathered"
    hardware, world = load_hardware("cpu"), World(1, ep_size)
    costs = ClientCosts.of(job, hardware, ep_size, 1)
    plan = schedule(costs.chosen, job.cost, job.config.local, 1, ep_size, in_flight)
    model = WaveModel(job, hardware, Network(hardware, world), ep_size, in_flight, costs)
    _, traffic = model.clusters(plan)
    layers, experts, homes = len(job.expert_layout.layers), job.expert_layout.num_experts, 2
    bank = Bank(job.blocks, experts // ep_size, homes, in_flight, torch.device("cpu"))
    norms = sum(squared_norms(bank, expert).nbytes for expert in (True, False))
    reports = 2 * homes * layers * experts * 8 + homes * 2 * 8 + in_flight * 8
    found = traffic["all_gather"]
    assert (found.calls, found.bytes) == (2 * 3 + 4, 3 * norms + reports)
    numbers = sum(value.numel() for value in bank.values.values())
    assert model.in_flight == numbers


def test_tables_in_parts(small: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waves that are too many for one table are computed a few at a time, to the same."""
    job = with_clients(small, [1, 2, 3, 4, 5, 6, 7], [1, 2, 4, 1, 2, 4, 1], 5)
    whole = predict_job(job, 2, 2, World(1, 4), load_hardware("cpu"))
    monkeypatch.setattr("fedmoe_ds.planner.training._CELLS", 1)
    parts = predict_job(job, 2, 2, World(1, 4), load_hardware("cpu"))
    assert parts.seconds == pytest.approx(whole.seconds) and parts.bytes == pytest.approx(whole.bytes)


def test_search_and_plan_are_one_predictor(small: Job) -> None:
    """Every choice is what a plan of that very configuration says, and what is configured is among them."""
    hardware, world = load_hardware("cpu"), World(1, 4)
    execution = small.config.execution.model_copy(update={"clients_in_flight": 3})
    job = replace(small, config=small.config.model_copy(update={"execution": execution}))
    choices, refusals = search(job, world, hardware)
    assert not refusals
    for choice in choices:
        again = predict_job(job, choice.ep_size, choice.in_flight, world, hardware)
        assert again == choice.prediction
    configured = predict_job(job, 1, 3, world, hardware)
    assert choices[0].prediction.round_seconds <= configured.round_seconds


def test_clients_of_no_cluster(small: Job) -> None:
    """A federation of one client on four ranks: three of them have nobody."""
    client = [Client(0, "c0", 2, 4, 4, 40, 2)]
    job = replace(small, clients=client, config=small.config)
    found = predict_job(job, 2, 4, World(1, 4), load_hardware("cpu"))
    assert found.homeless == 3 and found.balance == 2.0
