"""FedProx and SCAFFOLD on the real small federation, against plain float64 loops fed with the gradients that were observed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federations import alone, build, finish, make_config, own_values, write_inputs

from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.methods.client_drift import CONTROL
from fedmoe_ds.model.adapter_bank import BlockSpec, control_block, shared_blocks

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
