"""What the server makes of everybody's LoRA factors, against dense products, dense SVD and autograd.

Legend: P participants, R adapter rank, I and O input and output width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe_ds.aggregation.lora_factors import Collection, FactorPair
from fedmoe_ds.config import MethodConfig
from fedmoe_ds.methods import Method, load_method
from fedmoe_ds.methods.base import product_norms
from fedmoe_ds.methods.lora_fair import LoRAFair, Problem
from fedmoe_ds.model.adapter_bank import BlockSpec

R = 4
SEEDS = st.integers(0, 10**6)
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))
CROWDS = st.integers(1, 5)
COLLECTING = ["flexlora", "flora", "fedex-lora", "lora-fair"]


def method(name: str, **keys: Any) -> Method:
    return load_method(MethodConfig.model_validate({"name": name, **keys}))


def make_pair(seed: int, count: int, sizes: tuple[int, int], ranks: bool = False) -> FactorPair:
    """Random factors; with `ranks`, every participant holds its own number of leading rows and some weigh nothing."""
    draw = np.random.default_rng(seed)
    wide, high = sizes
    a_PRI, b_POR = torch.from_numpy(draw.normal(size=(count, R, wide))), torch.from_numpy(draw.normal(size=(count, high, R)))
    weight_P = draw.random(count) + 0.01
    if ranks:
        for p, rank in enumerate(draw.integers(1, R + 1, size=count)):
            a_PRI[p, rank:], b_POR[p, :, rank:] = 0.0, 0.0
        weight_P[draw.random(count) < 0.3] = 0.0
        weight_P[0] = 0.5
    old = torch.from_numpy(draw.normal(size=(R, wide))), torch.from_numpy(draw.normal(size=(high, R)))
    return FactorPair("layers.0.x", a_PRI, b_POR, torch.from_numpy(weight_P), *old)


def dense(pair: FactorPair) -> Tensor:
    """sum_k p_k B_k A_k, written out."""
    total = sum(float(w) for w in pair.weight_P)
    return torch.stack([float(w) / total * (b @ a) for w, b, a in zip(pair.weight_P, pair.b_POR, pair.a_PRI, strict=True)]).sum(
        0
    )


def fresh(pair: FactorPair) -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).normal(size=tuple(pair.a_RI.shape)))


def gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


@settings(max_examples=50, deadline=None)
@given(SEEDS, CROWDS, SIZES)
def test_shares_sum_to_one_and_stacks_give_the_dense_sum(seed: int, count: int, sizes: tuple[int, int]) -> None:
    pair = make_pair(seed, count, sizes, ranks=True)
    assert float(pair.share_P.sum()) == pytest.approx(1.0, abs=1e-12) and bool((pair.share_P >= 0).all())
    b_OQ, a_QI = pair.stacked()
    assert b_OQ.shape == (sizes[1], count * R) and gap(b_OQ @ a_QI, dense(pair)) <= 1e-12


@settings(max_examples=50, deadline=None)
@given(SEEDS, CROWDS, SIZES)
def test_flora_absorbs_the_dense_sum_and_starts_afresh(seed: int, count: int, sizes: tuple[int, int]) -> None:
    pair = make_pair(seed, count, sizes, ranks=True)
    combined = method("flora").combine(pair, fresh(pair))
    assert combined.absorbed is not None
    assert gap(combined.absorbed[0] @ combined.absorbed[1], dense(pair)) <= 1e-12
    assert torch.equal(combined.a_RI, fresh(pair)) and not bool(combined.b_OR.any())


@settings(max_examples=50, deadline=None)
@given(SEEDS, CROWDS, SIZES)
def test_fedex_loras_weight_and_pair_are_the_mean_of_the_products(seed: int, count: int, sizes: tuple[int, int]) -> None:
    """Exactly, with A and B as float32 keeps them; equal factors leave no residual."""
    pair = make_pair(seed, count, sizes)
    combined = method("fedex-lora").combine(pair, fresh(pair))
    assert combined.absorbed is not None
    share = pair.share_P.view(-1, 1, 1)
    assert torch.equal(combined.a_RI, (pair.a_PRI * share).sum(0).float().double()), "A is FedIT's"
    assert torch.equal(combined.b_OR, (pair.b_POR * share).sum(0).float().double()), "B is FedIT's"
    kept = combined.b_OR.float().double() @ combined.a_RI.float().double()
    assert gap(combined.absorbed[0] @ combined.absorbed[1] + kept, dense(pair)) <= 1e-12
    same = pair.a_PRI[:1].float().double().expand_as(pair.a_PRI), pair.b_POR[:1].float().double().expand_as(pair.b_POR)
    combined = method("fedex-lora").combine(replace(pair, a_PRI=same[0], b_POR=same[1]), fresh(pair))
    assert combined.absorbed is not None and torch.equal(combined.a_RI, same[0][0]) and torch.equal(combined.b_OR, same[1][0])
    assert float((combined.absorbed[0] @ combined.absorbed[1]).abs().max()) <= 1e-12


@settings(max_examples=50, deadline=None)
@given(SEEDS, SIZES)
def test_flexlora_leaves_one_clients_product_alone(seed: int, sizes: tuple[int, int]) -> None:
    pair = make_pair(seed, 1, sizes)
    combined = method("flexlora").combine(pair, fresh(pair))
    assert combined.absorbed is None and gap(combined.b_OR @ combined.a_RI, pair.b_POR[0] @ pair.a_PRI[0]) <= 1e-10


@settings(max_examples=100, deadline=None)
@given(SEEDS, CROWDS, SIZES)
def test_flexlora_gives_the_best_approximation_of_every_rank(seed: int, count: int, sizes: tuple[int, int]) -> None:
    """The leading r rows are what a client of rank r receives: no matrix of rank r is closer (Eckart and Young)."""
    pair = make_pair(seed, count, sizes, ranks=True)
    combined, whole = method("flexlora").combine(pair, fresh(pair)), dense(pair)
    s_K = torch.linalg.svdvals(whole)
    for rank in range(R + 1):
        error = float((whole - combined.b_OR[:, :rank] @ combined.a_RI[:rank]).norm())
        assert error == pytest.approx(float(s_K[rank:].norm()), abs=1e-9 * float(s_K[0]) + 1e-12)


@settings(max_examples=100, deadline=None)
@given(SEEDS, CROWDS, SIZES, st.randoms(use_true_random=False))
@pytest.mark.parametrize("name", COLLECTING)
def test_the_order_of_arrival_does_not_matter(name: str, seed: int, count: int, sizes: tuple[int, int], shuffle: Any) -> None:
    """Factors lie at their participant's canonical place, so clients may come from any wave, in any order: equal bits."""
    a = BlockSpec("experts.down.lora_A", (0,), (R, sizes[0]), expert=True)
    b = BlockSpec("experts.down.lora_B", (0,), (sizes[1], R), expert=True)
    pair, order = make_pair(seed, count, sizes, ranks=True), list(range(count))
    results = []
    for _ in range(2):
        collection = Collection([a, b], 1, count)
        for place in order:
            weight = pair.weight_P[place].view(1, 1).numpy()
            collection.add(place, a.name, pair.a_PRI[place].float().view(1, 1, R, -1), weight)
            collection.add(place, b.name, pair.b_POR[place].float().view(1, 1, -1, R), weight)
        current = {a.name: pair.a_RI.float().view(1, 1, R, -1), b.name: pair.b_OR.float().view(1, 1, -1, R)}
        ((_, _, place_in_block, collected),) = collection.adapters(current, first_expert=7)
        assert (place_in_block, collected.key) == ((0, 0), "layers.0.experts.7.down")
        results.append(method(name).combine(collected, fresh(pair)))
        shuffle.shuffle(order)
    for ours, theirs in zip(*([r.a_RI, r.b_OR, *(r.absorbed or ())] for r in results), strict=True):
        assert torch.equal(ours, theirs)


def objective(fair: Method, residual: Tensor, pair: FactorPair) -> Tensor:
    """(1 - cos(W, (B + dB) A)) + lambda ||dB||, with W dense."""
    share = pair.share_P.view(-1, 1, 1)
    a_RI, b_OR = (pair.a_PRI * share).sum(0), (pair.b_POR * share).sum(0)
    whole, product = dense(pair), (b_OR + residual) @ a_RI
    cosine = (whole * product).sum() / (whole.norm() * product.norm())
    size = residual.norm() if bool(residual.detach().any()) else (residual * 0.0).sum()
    return 1.0 - cosine + fair.params.regularisation * size


@settings(max_examples=50, deadline=None)
@given(SEEDS, CROWDS, SIZES, st.booleans())
def test_lora_fairs_objective_and_slope_are_autograds(seed: int, count: int, sizes: tuple[int, int], at_zero: bool) -> None:
    fair, pair = method("lora-fair", regularisation=0.3), make_pair(seed, count, sizes)
    assert isinstance(fair, LoRAFair)
    share = pair.share_P.view(-1, 1, 1)
    start = torch.from_numpy(np.random.default_rng(seed).normal(size=(sizes[1], R))) * (0.0 if at_zero else 0.5)
    residual = start.clone().requires_grad_()
    loss = objective(fair, residual, pair)
    (expected,) = torch.autograd.grad(loss, residual)
    value, found = Problem.of(
        (pair.b_POR * share).sum(0), (pair.a_PRI * share).sum(0), *pair.stacked(), fair.params.regularisation
    ).at(start)
    assert float(value) == pytest.approx(float(loss.detach()), abs=1e-9)
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-8)


@settings(max_examples=100, deadline=None)
@given(SEEDS, CROWDS, SIZES, st.sampled_from([0.0, 0.01, 0.1, 1.0, 10.0]))
def test_lora_fair_is_never_worse_than_the_mean(seed: int, count: int, sizes: tuple[int, int], strength: float) -> None:
    fair, pair = method("lora-fair", regularisation=strength), make_pair(seed, count, sizes)
    combined, share = fair.combine(pair, fresh(pair)), pair.share_P.view(-1, 1, 1)
    mean_a, mean_b = (pair.a_PRI * share).sum(0), (pair.b_POR * share).sum(0)
    assert torch.equal(combined.a_RI, mean_a), "A is FedIT's"
    before = objective(fair, torch.zeros_like(mean_b), pair)
    assert float(objective(fair, combined.b_OR - mean_b, pair)) <= float(before) + 1e-9


def test_lora_fair_improves_on_the_mean() -> None:
    fair, pair = method("lora-fair"), make_pair(3, 4, (10, 12))
    share = pair.share_P.view(-1, 1, 1)
    mean_b = (pair.b_POR * share).sum(0)
    before = float(objective(fair, torch.zeros_like(mean_b), pair))
    assert float(objective(fair, fair.combine(pair, fresh(pair)).b_OR - mean_b, pair)) < 0.9 * before


def test_lora_fair_with_nothing_to_correct() -> None:
    """All B are zero before anything was trained: no direction, no step, no division by zero."""
    pair = make_pair(0, 3, (5, 6))
    pair.b_POR.zero_()
    combined = method("lora-fair").combine(pair, fresh(pair))
    assert not bool(combined.b_OR.any()) and bool(torch.isfinite(combined.a_RI).all())


@settings(max_examples=50, deadline=None)
@given(SEEDS, CROWDS, SIZES)
def test_norms_of_products(seed: int, count: int, sizes: tuple[int, int]) -> None:
    pair = make_pair(seed, count, sizes, ranks=True)
    expected = torch.linalg.matrix_norm(pair.b_POR @ pair.a_PRI)
    found = product_norms(pair.a_PRI, pair.b_POR)
    assert found.shape == (count,) and torch.allclose(found, expected, rtol=1e-9, atol=1e-6)
