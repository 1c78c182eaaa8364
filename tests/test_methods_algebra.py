"""What the server makes of everybody's LoRA factors, against dense products, dense SVD and autograd.

Legend: P participants, R adapter rank, I and O input and output width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe_ds.aggregation.lora_factors import Collection, FactorPair
from fedmoe_ds.config import MethodConfig
from fedmoe_ds.methods import Method, load_method
from fedmoe_ds.methods.fedrot_lora import _rotation, _softened
from fedmoe_ds.methods.lora_fair import LoRAFair, Problem
from fedmoe_ds.methods.product_norms import product_norms
from fedmoe_ds.model.adapter_bank import BlockSpec

R = 4
SEEDS = st.integers(0, 10**6)
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))
CROWDS = st.integers(1, 5)
COLLECTING = ["flexlora", "flora", "florist", "fedex-lora", "fedrot-lora", "lora-fair"]


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
@given(SEEDS, CROWDS, SIZES, st.floats(0.05, 0.99))
def test_florist_keeps_the_fewest_directions_that_have_the_energy(
    seed: int, count: int, sizes: tuple[int, int], tau: float
) -> None:
    """What is cut is the tail of the dense product's singular values, one value less would be too few."""
    pair = make_pair(seed, count, sizes, ranks=True)
    combined, whole = method("florist", tau=tau).combine(pair, fresh(pair)), dense(pair)
    assert combined.absorbed is not None
    b_OQ, a_QI = combined.absorbed
    energy_K, kept = torch.linalg.svdvals(whole) ** 2, len(a_QI)
    share = [float(energy_K[:p].sum() / energy_K.sum()) for p in (kept - 1, kept)]
    assert share[0] < tau + 1e-9 and share[1] > tau - 1e-9 and b_OQ.shape[1] == kept
    lost = float(energy_K[kept:].sum()) + 1e-12 * float(energy_K[0])
    assert float((whole - b_OQ @ a_QI).norm()) ** 2 == pytest.approx(lost, rel=1e-6, abs=1e-10 * float(energy_K[0]))
    assert torch.equal(combined.a_RI, fresh(pair)) and not bool(combined.b_OR.any())


@settings(max_examples=50, deadline=None)
@given(SEEDS, CROWDS, SIZES)
def test_florist_without_a_threshold_is_flora(seed: int, count: int, sizes: tuple[int, int]) -> None:
    """The weighted sum of the clients' products, in no more rows than its rank; of nothing, nothing."""
    pair = make_pair(seed, count, sizes, ranks=True)
    combined = method("florist", tau=1.0).combine(pair, fresh(pair))
    assert combined.absorbed is not None and gap(combined.absorbed[0] @ combined.absorbed[1], dense(pair)) <= 1e-7
    assert len(combined.absorbed[1]) <= min(*sizes, count * R)
    nothing = method("florist").combine(replace(pair, b_POR=torch.zeros_like(pair.b_POR)), fresh(pair))
    assert nothing.absorbed is not None and [half.numel() for half in nothing.absorbed] == [0, 0]


def rotations(seed: int, count: int) -> Tensor:
    """Random ones, [P, R, R]."""
    q_PRR, _ = torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).normal(size=(count, R, R))))
    q_PRR[:, 0] *= torch.linalg.det(q_PRR).sign().unsqueeze(1)
    return q_PRR


def is_rotation(matrix_PRR: Tensor) -> bool:
    return torch.allclose(matrix_PRR.mT @ matrix_PRR, torch.eye(R).double(), atol=1e-12) and torch.allclose(
        torch.linalg.det(matrix_PRR), torch.ones(len(matrix_PRR)).double(), atol=1e-12
    )


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(0, R), st.floats(0, 1))
def test_fedrots_rotations_are_the_best_ones(seed: int, rank: int, strength: float) -> None:
    """Orthogonal, determinant 1, no other rotation has a larger <R, M>, whatever the rank of M; half of the way taken twice is
    all of it."""
    draw = np.random.default_rng(seed)
    likeness_PRR = torch.from_numpy(draw.normal(size=(3, R, rank)) @ draw.normal(size=(3, rank, R)))
    best_PRR = _rotation(likeness_PRR)
    assert is_rotation(best_PRR) and is_rotation(_softened(best_PRR, strength))
    reached_P = (best_PRR * likeness_PRR).sum((1, 2))
    for other in range(20):
        near = (
            _softened(best_PRR.mT @ rotations(seed + other, 3), 0.1) if other % 2 else best_PRR.mT @ rotations(seed + other, 3)
        )
        size_P = torch.linalg.matrix_norm(likeness_PRR)
        assert bool(((best_PRR @ near * likeness_PRR).sum((1, 2)) <= reached_P + 1e-6 * size_P).all())
    half_PRR = _softened(best_PRR, 0.5)
    apart = torch.linalg.det(torch.eye(R).double() + best_PRR) > 1e-6  # half a turn has no half
    assert torch.allclose((half_PRR @ half_PRR)[apart], best_PRR[apart], atol=1e-8)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.integers(0, R))
def test_fedrot_leaves_alone_who_has_not_moved(seed: int, rank: int) -> None:
    """B_k = B' of any rank, zero included: M = B'^T B' says nothing of its empty directions."""
    draw = np.random.default_rng(seed)
    b_OR = torch.from_numpy(draw.normal(size=(9, rank)) @ draw.normal(size=(rank, R)))
    assert torch.allclose(_rotation((b_OR.T @ b_OR).unsqueeze(0)), torch.eye(R).double(), atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(SEEDS, CROWDS, st.floats(0, 1), st.sampled_from([1, 2, 3]))
def test_fedrot_changes_no_clients_product(seed: int, count: int, strength: float, round_index: int) -> None:
    """Of one client the mean is its own, rotated; in the first round, and with lambda = 0, it is FedIT's to the bit."""
    pair = replace(make_pair(seed, count, (9, 11)), round_index=round_index)
    alone_pair = replace(pair, a_PRI=pair.a_PRI[:1], b_POR=pair.b_POR[:1], weight_P=pair.weight_P[:1])
    combined = method("fedrot-lora", strength=strength).combine(alone_pair, fresh(pair))
    assert combined.absorbed is None and gap(combined.b_OR @ combined.a_RI, pair.b_POR[0] @ pair.a_PRI[0]) <= 1e-12
    share = pair.share_P.view(-1, 1, 1)
    combined = method("fedrot-lora", strength=0.0 if round_index > 1 else strength).combine(pair, fresh(pair))
    assert torch.equal(combined.a_RI, (pair.a_PRI * share).sum(0)) and torch.equal(combined.b_OR, (pair.b_POR * share).sum(0))


@settings(max_examples=50, deadline=None)
@given(SEEDS, CROWDS, st.sampled_from([2, 3]))
def test_fedrot_brings_rotated_clients_together(seed: int, count: int, round_index: int) -> None:
    """Clients whose factors are rotations of each other: the product of the means is their product. FedIT's is not."""
    pair, turned_PRR = make_pair(seed, count, (16, 16)), rotations(seed, count)
    a_RI, b_OR = pair.a_RI + 0.1 * pair.a_PRI[0], pair.b_OR + 0.1 * pair.b_POR[0]
    pair = replace(pair, a_PRI=turned_PRR.mT @ a_RI, b_POR=b_OR @ turned_PRR, round_index=round_index)
    combined = method("fedrot-lora", strength=1.0).combine(pair, fresh(pair))
    assert gap(combined.b_OR @ combined.a_RI, b_OR @ a_RI) <= 1e-5
    share = pair.share_P.view(-1, 1, 1)
    if count > 1:
        assert gap((pair.b_POR * share).sum(0) @ (pair.a_PRI * share).sum(0), b_OR @ a_RI) > 1e-3


def test_fedrots_turns() -> None:
    """A in even rounds, B in odd ones; each is brought nearer to the global one in its turn."""
    pair, other = make_pair(4, 5, (9, 11)), make_pair(5, 1, (9, 11))
    pair = replace(pair, a_RI=other.a_RI, b_OR=other.b_OR)
    for round_index, turn in ((2, "A"), (3, "B"), (4, "A")):
        found = method("fedrot-lora").combine(replace(pair, round_index=round_index), fresh(pair))
        alike = method("fedrot-lora", align=turn).combine(replace(pair, round_index=2), fresh(pair))
        unlike = method("fedrot-lora", align="BA"["AB".index(turn)]).combine(replace(pair, round_index=2), fresh(pair))
        assert torch.equal(found.a_RI, alike.a_RI) and torch.equal(found.b_OR, alike.b_OR)
        assert not torch.equal(found.a_RI, unlike.a_RI)


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
        ((_, _, place_in_block, collected),) = collection.adapters(current, first_expert=7, round_index=2)
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


@example(11, 1, (1, 1), True)  # B A is 1e-4 of what its terms are
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
    a_RI, b_OR = (pair.a_PRI * share).sum(0), (pair.b_POR * share).sum(0)
    value, found = Problem.of(b_OR, a_RI, *pair.stacked(), fair.params.regularisation).at(start)
    # Norms come out of R x R sums: where a product is small because its terms cancel, their rounding counts squared.
    length = ((b_OR + start) @ a_RI).norm()
    pieces = (pair.share_P * torch.stack([b.norm() * a.norm() for b, a in zip(pair.b_POR, pair.a_PRI, strict=True)])).sum()
    lost = max((b_OR + start).norm() * a_RI.norm() / length, pieces / dense(pair).norm()) ** 2
    assert abs(float(value) - float(loss.detach())) <= 1e-13 * lost
    assert torch.allclose(found, expected, rtol=0.0, atol=float(1e-13 * lost * a_RI.norm() / length))


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
