"""The mean of a round against exact rationals, over every weight that a configuration admits.

FLAME's weights f^t |D_i| span hundreds of binary orders, HetLoRA's norms are large; neither is normalised before it is summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe_ds.aggregation.lora_factors import FactorPair
from fedmoe_ds.aggregation.weighted_average import Statistics
from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.checkpoint.reader import Snapshot
from fedmoe_ds.checkpoint.state import State, restore
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.server import check_terms
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

BLOCK, WIDTH = BlockSpec("experts.down.lora_A", (0,), (1, 6), expert=True), 6


@dataclass(frozen=True)
class Two:
    """Another cluster's sums: what a collective over two ranks would do."""

    other: Statistics
    size: int = 2

    def sum(self, total: Tensor) -> Tensor:
        return total.add_(self.other.flat.memory)

    def largest(self, values: Tensor) -> Tensor:
        torch.maximum(values, self.other.windows.memory, out=self.other.windows.memory)
        return values.copy_(self.other.windows.memory)


@dataclass(frozen=True)
class One:
    size: int = 1

    def sum(self, total: Tensor) -> Tensor:
        return total

    def largest(self, values: Tensor) -> Tensor:
        return values


def collected(values_CW: np.ndarray, weight_C: np.ndarray, exact: bool) -> Statistics:
    statistics = Statistics([BLOCK], 1, exact)
    for value_W, weight in zip(values_CW, weight_C, strict=True):
        statistics.add(BLOCK.name, torch.from_numpy(value_W).view(1, 1, 1, WIDTH), np.full((1, 1), weight))
    return statistics


def mean_of(statistics: Statistics) -> np.ndarray:
    old = Bank([BLOCK], 1, 1)
    old.values[BLOCK.name].fill_(7.0)
    return statistics.average(old)[BLOCK.name].flatten().numpy()


def check(values_CW: np.ndarray, weight_C: np.ndarray, exact: bool = True) -> None:
    """float32's rounding of the true mean, but for 2^-47 of what the row's largest term is of it (fast mode: 2^-22)."""
    found = mean_of(collected(values_CW, weight_C, exact))
    weights, bits = [Fraction(float(w)) for w in weight_C], 47 if exact else 22
    largest = max(w * Fraction(float(abs(v).max())) for w, v in zip(weights, values_CW, strict=True))
    for i, value in enumerate(found):
        true = sum((w * Fraction(float(v[i])) for w, v in zip(weights, values_CW, strict=True)), Fraction()) / sum(weights)
        slack = len(weights) * largest / sum(weights) / 2**bits + abs(true) / 2**23 + Fraction(1, 2**149)
        assert abs(Fraction(float(value)) - true) <= slack, (i, float(value), float(true))


@st.composite
def rounds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """(values [C, W] float32, weights [C]): clients as FLAME weighs them, with adapters of any size."""
    clients, temperature = draw(st.integers(1, 5)), draw(st.floats(0, 20))
    tokens = 2.0 ** draw(st.integers(0, 32))
    frequency = np.array([draw(st.floats(1 / tokens, 1.0)) for _ in range(clients)])
    share = np.array([2.0 ** -draw(st.integers(0, 32)) for _ in range(clients)])
    scale = draw(st.lists(st.integers(-60, 18), min_size=clients, max_size=clients))
    number = st.floats(-1, 1, width=32)
    values = [[draw(number) * 2.0**s for _ in range(WIDTH)] for s in scale]
    return np.array(values, dtype=np.float32), np.power(frequency, temperature) * share


@pytest.mark.parametrize("exact", [True, False])
@settings(max_examples=60, deadline=None)
@given(drawn=rounds())
def test_mean_is_the_true_mean(exact: bool, drawn: tuple[np.ndarray, np.ndarray]) -> None:
    check(*drawn, exact)


@pytest.mark.parametrize("exact", [True, False])
@settings(max_examples=60, deadline=None)
@given(temperature=st.floats(0, 20), tokens=st.integers(1, 2**32), clients=st.integers(1, 2**16), seed=st.integers(0, 999))
def test_mean_of_one_client_is_its_value(exact: bool, temperature: float, tokens: int, clients: int, seed: int) -> None:
    """An expert that one row of one client used: its value to the last bit, for every t, f and N."""
    value_W = np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)
    weight = np.power(1 / tokens, temperature) / clients
    found = mean_of(collected(value_W[None], np.array([weight]), exact))
    if exact:
        assert np.array_equal(found, value_W)
    else:
        np.testing.assert_allclose(found, value_W, rtol=3e-7)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("weights", "size"),
    [
        ([1e-20 / 1024], 0.02),  # FLAME with t = 4: 1e-5 of the rows, 1024 clients
        ([3e6, 5e7, 2e5], 1000.0),  # HetLoRA: norms of BA are no shares
        ([2.0**120, 2.0**-120], 2.0**18),
        ([2.0**-700, 2.0**-690], 1e-30),
        ([1e-160, 1e-170, 0.0], 0.5),
    ],
    ids=["flame", "hetlora", "far apart", "smallest", "zero beside small"],
)
def test_means_of_extreme_weights(exact: bool, weights: list[float], size: float) -> None:
    values = np.random.default_rng(0).normal(size=(len(weights), WIDTH)).astype(np.float32) * np.float32(size)
    check(values, np.array(weights), exact)


@pytest.mark.parametrize("exact", [True, False])
@settings(max_examples=30, deadline=None)
@given(drawn=rounds(), cut=st.integers(0, 5))
def test_clusters_merge(exact: bool, drawn: tuple[np.ndarray, np.ndarray], cut: int) -> None:
    """Two clusters' sums after the collectives are those of one that trained everybody; bit by bit where bits are promised."""
    values, weights = drawn
    left, right = collected(values[:cut], weights[:cut], exact), collected(values[cut:], weights[cut:], exact)
    alone = collected(values[::-1], weights[::-1], exact)
    # The other rank aligns its sums in the same collective: here it is told the windows before.
    agreed = torch.maximum(left.windows.memory, right.windows.memory)
    for sums, window in ((right.values, agreed[:1]), (right.weights, agreed[1:])):
        sums[BLOCK.name].raise_to(window.view(1, 1))
    left.reduce(One(), Two(right))
    assert torch.equal(left.windows.memory, alone.windows.memory)
    if exact:
        assert torch.equal(left.flat.memory, alone.flat.memory)
    else:
        assert torch.allclose(left.flat.memory, alone.flat.memory, rtol=1e-5, atol=float(alone.flat.memory.abs().max()) * 1e-6)


@settings(max_examples=50, deadline=None)
@given(drawn=rounds())
def test_collected_shares_are_those_of_the_weights(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    """FLoRA, FlexLoRA and LoRA-FAIR weigh factors by shares that sum to one, however small the weights."""
    weight_P = torch.from_numpy(drawn[1])
    nothing = torch.zeros(len(weight_P), 1, 1)
    share_P = FactorPair("", nothing, nothing, weight_P, nothing[0], nothing[0]).share_P
    weights = [Fraction(float(w)) for w in drawn[1]]
    assert share_P.tolist() == pytest.approx([float(w / sum(weights)) for w in weights], rel=1e-14, abs=0)


def test_a_round_has_room_for_its_clients() -> None:
    def spec(share: float, bitwise: bool = True, pooled: bool = False) -> Any:
        config = Config.model_validate({"federation": {"participation": share}})
        return SimpleNamespace(config=config, bitwise=bitwise, method=SimpleNamespace(pooled=pooled))

    check_terms(spec(0.5), 2 * 65535)
    with pytest.raises(
        UserError, match=r"^federation.participation: 0.5: 65536 clients in a round, .* sums hold 65535; use 0.49"
    ):
        check_terms(spec(0.5), 2 * 65536)
    check_terms(spec(0.4999), 2 * 65536)
    check_terms(spec(0.5, bitwise=False), 2 * 65536)
    check_terms(spec(1.0, pooled=True), 10**6)  # one client has the data of all


def test_sums_of_another_version_are_not_misread(tmp_path: Path) -> None:
    partial = {"done": {}, "activation": {}, "seconds": 0.0}  # what versions before wrote
    snapshot, nothing = Snapshot(3, {}, 0, partial), State(0, Bank([], 1, 1), Personal([], 1, 1))
    with pytest.raises(UserError, match=r"round 4 is unfinished and was added up by another version; remove"):
        restore(tmp_path, snapshot, nothing, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [2.0**-701, 2.0**701, math.inf, math.nan, -1.0])
def test_weights_beyond_the_range_are_refused(weight: float) -> None:
    with pytest.raises(UserError, match=r"^aggregation: experts.down.lora_A: a client weighs .*; sums hold 0 and 2\^-700"):
        collected(np.ones((1, WIDTH), dtype=np.float32), np.array([weight]), exact=True)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match=r"^aggregation: experts.down.lora_A: a weighted value is not finite; lower local.lr"):
        collected(np.full((1, WIDTH), math.inf, dtype=np.float32), np.ones(1), exact=True)
