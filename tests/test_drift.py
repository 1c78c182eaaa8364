"""Corrections of drift on the real small federation, against plain float64 loops fed with the gradients that were observed.

FedVRA's special cases to the bit, its conservation, and where it rests on quadratics that are solved exactly.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from federations import alone, build, finish, make_config, own_values, run_alone, write_inputs

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import Config, MethodConfig
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.identity import memory_settings
from fedmoe_ds.federation.server import Server
from fedmoe_ds.methods import load_method
from fedmoe_ds.methods.client_drift import CONTROL, correction
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec, control_block, shared_blocks

MU, LR, ROUNDS = 0.3, 0.05, 3
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": LR, "clip": None}
SHORT: dict[str, Any] = {"federation": {"participation": 0.5}, "evaluation": {"client_sequences": 0, "every": 9}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("method", ["flame", "flexlora"])
def test_the_proximal_term(root: Path, method: str) -> None:
    """Every step of every client: grad + mu (w - w_global) on shared blocks, nothing on personal ones and absent rows."""
    change = {"method": {"name": method}, "local": {"drift": "fedprox", "proximal": MU}, "federation": {"rounds": 2}}
    parts, journal = build(make_config(root, f"prox-{method}", SHORT, change), *alone())
    pulled, masked = 0.0, 0
    before: dict[str, torch.Tensor] = {}

    def ahead(local: ClientView) -> None:
        before.update({spec.name: local.grad(spec).clone() for spec in local.blocks()})

    def behind(local: ClientView) -> None:
        nonlocal pulled, masked
        for spec in local.blocks():
            added = local.grad(spec).double() - before[spec.name].double()
            if spec.personal:
                assert not bool(added.any())
                continue
            away = local.value(spec).double() - parts.state.adapters.client(spec.name, 0).double()
            mask = local.assignment.mask(spec, torch.device("cpu"))
            if mask is not None:
                masked += 1
                away = torch.where(mask, away, 0.0)
            assert torch.allclose(added, MU * away, rtol=0, atol=1e-6)
            pulled = max(pulled, float(added.abs().max()))

    rules = parts.trainer.hooks
    parts.trainer.hooks = replace(rules, adjust=(ahead, *rules.adjust, behind))
    finish(parts, journal)
    assert pulled > 1e-4, "the term acts"
    assert bool(masked) == (method == "flexlora")


class Observer:
    """The gradients of every step before any correction, and what every client ended with."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.slopes: dict[tuple[int, int], dict[str, list[np.ndarray]]] = {}
        self.ends: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self.rows: dict[tuple[int, int], np.ndarray | None] = {}
        rules = parts.trainer.hooks
        parts.trainer.hooks = replace(rules, adjust=(self.adjust, *rules.adjust), remember=(self.remember, *rules.remember))

    def adjust(self, local: ClientView) -> None:
        found = self.slopes.setdefault((self.parts.state.round + 1, local.client.index), {})
        for spec in local.blocks():
            found.setdefault(spec.name, []).append(numbers(local.grad(spec)))

    def remember(self, local: ClientView, rates: float) -> dict[str, torch.Tensor]:
        where = self.parts.state.round + 1, local.client.index
        self.ends[where] = {spec.name: numbers(local.value(spec)) for spec in local.blocks()}
        self.rows[where] = local.assignment.rows_R
        return {}


def numbers(value: torch.Tensor) -> np.ndarray:
    found: np.ndarray = value.double().numpy().copy()
    return found


def held(spec: BlockSpec, rows_R: np.ndarray | None) -> np.ndarray | float:
    if rows_R is None or spec.rank_axis is None:
        return 1.0
    return rows_R[:, None].astype(float) if spec.rank_axis == 0 else rows_R[None, :].astype(float)


@pytest.mark.parametrize("method", ["fedit", "fslora"])
def test_scaffold_is_the_plain_loop(root: Path, method: str) -> None:
    """Three rounds, three of six clients in each: option II of the paper; with fslora only on the rows that a client holds."""
    change = {"method": {"name": method}, "local": {**SGD, "drift": "scaffold"}, "federation": {"rounds": ROUNDS}}
    parts, journal = build(make_config(root, f"scaffold-{method}", SHORT, change), *alone())
    start = {spec.name: numbers(parts.state.adapters.client(spec.name, 0)) for spec in parts.spec.blocks}
    observer = Observer(parts)
    finish(parts, journal)
    drawn = [{client for r, client in observer.ends if r == round_index} for round_index in range(1, ROUNDS + 1)]
    assert drawn[0] & drawn[-1] and drawn[-1] - drawn[0], "newcomers, and some who come back"
    for spec in shared_blocks(parts.spec.blocks):
        check_block(parts, observer, spec, start[spec.name], equal=method == "fslora")


def check_block(parts: Parts, observer: Observer, spec: BlockSpec, x: np.ndarray, equal: bool) -> None:
    count = len(parts.clients)
    c, own = np.zeros_like(x), [np.zeros_like(x) for _ in range(count)]
    for round_index in range(1, ROUNDS + 1):
        ends, weights, changes = [], [], np.zeros_like(x)
        for client in parts.participants(round_index):
            where = round_index, client.index
            here = held(spec, observer.rows[where])
            y = x * here
            slopes = observer.slopes[where][spec.name]
            for slope in slopes:
                y = y - LR * (slope + (c - own[client.index]) * here)
            assert np.allclose(observer.ends[where][spec.name], y, rtol=0, atol=2e-6), (spec.name, where)
            new = own[client.index] + here * ((x - y) / (len(slopes) * LR) - c)
            changes += (new - own[client.index]) / count
            own[client.index] = new
            ends.append(y * here + x * (1.0 - here))
            weights.append(1.0 if equal else client.samples)
        x = sum(w * y for w, y in zip(weights, ends, strict=True)) / sum(weights)
        c = c + changes
    assert np.allclose(numbers(parts.state.adapters.client(spec.name, 0)), x, rtol=0, atol=1e-5), spec.name
    assert np.allclose(numbers(parts.state.server[CONTROL].client(spec.name, 0)), c, rtol=0, atol=1e-4), spec.name
    kept = own_values(parts)[control_block(spec).name]
    for index in range(count):
        assert np.allclose(numbers(kept[index]), own[index], rtol=0, atol=1e-4), (spec.name, index)
    if spec.name.endswith("_B"):
        assert np.abs(c).max() > 1e-2, "tolerances mean something"


def test_the_servers_control_variate_is_the_mean(root: Path) -> None:
    change = {"method": {"name": "fedit"}, "local": {**SGD, "drift": "scaffold"}, "federation": {"participation": 1.0}}
    parts, journal = build(make_config(root, "scaffold-mean", SHORT, change), *alone())
    finish(parts, journal)
    for spec in shared_blocks(parts.spec.blocks):
        kept = own_values(parts)[control_block(spec).name]
        assert bool((kept.flatten(1) != 0).any(1).all()), "every client has one"
        assert torch.allclose(kept.double().mean(0).float(), parts.state.server[CONTROL].client(spec.name, 0), atol=1e-6)


def drifting(root: Path, tag: str, **local: Any) -> Config:
    change = {"method": {"name": "fedit"}, "local": local, "federation": {"rounds": 3}}
    return make_config(root, f"dual-{tag}", SHORT, change)


def test_fedvras_special_cases(root: Path) -> None:
    """(0, 0) is FedProx, gamma = 0 with it FedAvg, (1, 1) FedDyn: the same bits, AdamW and half of the clients in a round."""
    still = {"drift": "fedvra", "dual_step": 0.0, "aggregation_step": 0.0}
    prox = run_alone(drifting(root, "prox", drift="fedprox", proximal=MU)).digest
    plain, dynamic = run_alone(drifting(root, "plain")).digest, run_alone(drifting(root, "dyn", drift="feddyn")).digest
    assert run_alone(drifting(root, "zero", proximal=MU, **still)).digest == prox
    assert run_alone(drifting(root, "nothing", proximal=0.0, **still)).digest == plain
    assert run_alone(drifting(root, "one", drift="fedvra")).digest == dynamic
    assert len({plain, prox, dynamic}) == 3


@pytest.mark.parametrize("method", ["flame", "fslora"])
def test_the_servers_duals_are_the_weighted_sum(root: Path, method: str) -> None:
    """sum_i p_i l_i = L after rounds of half of the clients, p_i = shares of all data, whatever the method weighs."""
    local = {"drift": "fedvra", "proximal": MU, "dual_step": 0.7, "aggregation_step": 0.5}
    parts, journal = build(
        make_config(root, f"sum-{method}", SHORT, {"method": {"name": method}, "local": local, "federation": {"rounds": 3}}),
        *alone(),
    )
    finish(parts, journal)
    share_N = torch.tensor([client.samples for client in parts.clients], dtype=torch.float64)
    share_N /= share_N.sum()
    assert share_N.max() > 1.5 * share_N.min(), "unequal"
    for spec in shared_blocks(parts.spec.blocks):
        total = torch.tensordot(share_N, own_values(parts)[control_block(spec).name].double(), 1)
        ours = parts.state.server[CONTROL].client(spec.name, 0).double()
        assert bool(ours.any()) and float((total - ours).abs().max()) <= 1e-6 * float(ours.abs().max()), spec.name


SIZES, WIDTH = (1, 2, 5), 6


class Quadratics:
    """Clients with f_i(w) = sum_j h_ij (w_j - c_ij)^2 / 2, of unequal data, and the package's server and correction.

    A Newton step on the corrected gradient solves a client's problem exactly.
    """

    def __init__(self, **local: Any) -> None:
        draw = np.random.default_rng(4)
        self.h_NW, self.c_NW = (torch.from_numpy(draw.uniform(*ends, (3, WIDTH))).float() for ends in ((0.5, 4.0), (-2.0, 2.0)))
        self.spec = BlockSpec("x", (-1,), (WIDTH,))
        self.config = Config.model_validate({"local": local, "method": {"name": "fedit"}})
        self.clients = [Client(i, str(i), size, size, size, 1) for i, size in enumerate(SIZES)]
        method = load_method(MethodConfig(name="fedit"))
        layout = SimpleNamespace(held=range(0))
        spec: Any = SimpleNamespace(config=self.config, method=method, blocks=[self.spec], bitwise=True, expert_layout=layout)
        self.server = Server(spec, None, self.clients)  # type: ignore[arg-type]
        self.x = Bank([self.spec], 0, clients=1, with_grad=False)
        self.own = self.server.initial_state(torch.device("cpu"))
        self.kept = [{control_block(self.spec).name: torch.zeros(1, WIDTH)} for _ in SIZES]
        self.rule = correction(self.config.local, self.own)

    def round(self, index: int) -> None:
        sums = self.server.new_sums(len(SIZES), torch.device("cpu"))
        for i, client in enumerate(self.clients):
            bank = Bank([self.spec], 0, clients=1)
            bank.client("x", 0).copy_(self.x.client("x", 0))
            view = ClientView(client, Assignment(1), bank, self.x, {False: 0}, self.kept[i])
            view.grad(self.spec).copy_(self.h_NW[i] * (view.value(self.spec) - self.c_NW[i]))
            stiff = self.h_NW[i] + (self.config.local.proximal if self.rule is not None else 0.0)
            if self.rule is not None:
                self.rule.adjust(view)
            view.value(self.spec).sub_(view.grad(self.spec) / stiff)
            update = ClientUpdate(client, 0, 0, 1, 1, np.zeros((0, 0)), finite=True)
            if (remember := getattr(self.rule, "remember", None)) is not None:
                update.remembered = remember(view, 1.0)
            self.server.fold(sums, i, view, update)
            self.kept[i] = update.remembered
        self.server.step(sums, self.x, self.own, index)

    def away(self) -> float:
        """From the minimiser of sum_i p_i f_i."""
        share_N1 = torch.tensor(SIZES).view(-1, 1) / sum(SIZES)
        best_W = (share_N1 * self.h_NW * self.c_NW).sum(0) / (share_N1 * self.h_NW).sum(0)
        return float((self.x.client("x", 0)[0] - best_W).abs().max())


@pytest.mark.parametrize("steps", [(1.0, 1.0), (0.5, 0.5)], ids=str)
def test_fedvra_finds_the_minimiser_of_all(steps: tuple[float, float]) -> None:
    """Exact local solves, everybody in the round, unequal data: x and the duals converge; FedAvg and FedProx stay away."""
    a, d = steps
    ours = Quadratics(drift="fedvra", proximal=1.5, dual_step=a, aggregation_step=d)
    others = [Quadratics(), Quadratics(drift="fedprox", proximal=1.5)]
    for index in range(1, 201):
        for run in (ours, *others):
            run.round(index)
    assert ours.away() < 1e-5 and float(ours.own[CONTROL].client("x", 0).abs().max()) < 1e-4
    for i, kept in enumerate(ours.kept):
        slope = ours.h_NW[i] * (ours.x.client("x", 0)[0] - ours.c_NW[i])
        assert torch.allclose(kept[control_block(ours.spec).name][0], -slope, atol=1e-4), "a dual is minus its client's slope"
    assert min(run.away() for run in others) > 0.05


def test_duals_without_the_servers_step_pull_back_to_the_start() -> None:
    """d = 0, a > 0: L = a gamma (x - x_0) in every round, so x rests elsewhere; the step along L is what removes the bias."""
    run = Quadratics(drift="fedvra", proximal=1.5, aggregation_step=0.0)
    for index in range(1, 201):
        run.round(index)
        assert torch.allclose(run.own[CONTROL].client("x", 0), 1.5 * run.x.client("x", 0), atol=1e-4)
    assert run.away() > 0.05


def test_absences_of_earlier_versions_count() -> None:
    """They were written down under settings that did not have FedVRA's keys."""
    others = ("foundation", "data", "seed", "adapters", "method", "server", "federation")
    kept = []
    for local in ({}, {"drift": "fedvra", "dual_step": 0.5}):
        config = Config.model_validate({"local": local})
        settings = memory_settings(config, {name: {} for name in others} | {"local": config.local.model_dump()})
        kept.append({"dual_step", "aggregation_step"} & settings["local"].keys())
        assert settings["local"].keys() >= {"lr", "drift", "proximal"}
    assert kept == [set(), {"dual_step"}]
