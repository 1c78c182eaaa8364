"""Dispatch: the plan of one layer, and the expert pass against the sum it stands for. (Several ranks: test_logits, topologies.)

Legend: T token rows, N routed rows, D model width, E experts, K top-k, F expert width, R rank.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmoe_ds.kernels.lora_products import products_for
from fedmoe_ds.model import experts as ffn
from fedmoe_ds.model.dispatcher import Pool, make_plan
from fedmoe_ds.model.expert_pass import expert_pass
from fedmoe_ds.model.experts import FrozenExperts
from fedmoe_ds.model.router import Routing

EXPERTS, WIDTH, FFN, RANK, CLIENTS, TOKENS, TOP_K = 6, 8, 4, 4, 2, 10, 3


def random_routing(seed: int = 0) -> Routing:
    """Distinct experts per token; tokens 2 and 7 have no slot (padding), token 4 has one."""
    draw = torch.Generator().manual_seed(seed)
    experts_TK = torch.stack([torch.randperm(EXPERTS, generator=draw)[:TOP_K] for _ in range(TOKENS)])
    kept_TK = torch.ones(TOKENS, TOP_K, dtype=torch.bool)
    kept_TK[[2, 7]], kept_TK[4, 1:] = False, False
    weights_TK = torch.rand(TOKENS, TOP_K, generator=draw) * kept_TK
    return Routing(torch.zeros(TOKENS, EXPERTS), weights_TK, experts_TK, kept_TK)


def pool(merge: bool, shared: bool = False) -> Pool:
    return Pool(None, 1, EXPERTS, CLIENTS, merge, shared)


def segments() -> Tensor:
    """The first half of the rows belongs to home slot 0, the second to slot 1."""
    return torch.arange(TOKENS) // (TOKENS // CLIENTS)


def weights(seed: int = 1) -> tuple[Tensor, Tensor, ffn.Lora]:
    draw = torch.Generator().manual_seed(seed)
    w13 = torch.randn(EXPERTS, 2 * FFN, WIDTH, generator=draw) * 0.5
    w2 = torch.randn(EXPERTS, WIDTH, FFN, generator=draw) * 0.5
    shapes = [(RANK, WIDTH), (2 * FFN, RANK), (RANK, FFN), (WIDTH, RANK)]
    values = [torch.randn(EXPERTS, CLIENTS, *shape, generator=draw) * 0.5 for shape in shapes]
    return (
        w13,
        w2,
        ffn.Lora(
            *values, [torch.zeros_like(value) for value in values], 2.0, products_for(RANK, torch.float32, torch.device("cpu"))
        ),
    )


def plain(
    x_TD: Tensor, routing: Routing, weights_TK: Tensor, slot_T: Tensor, w13: Tensor, w2: Tensor, lora: list[Tensor]
) -> Tensor:
    """Token by token, slot by slot."""
    rows = []
    for token in range(TOKENS):
        y = torch.zeros(WIDTH)
        for k in range(TOP_K):
            if routing.kept_TK[token, k]:
                e, c = int(routing.experts_TK[token, k]), int(slot_T[token])
                a13, b13, a2, b2 = (value[e, c] for value in lora)
                x = x_TD[token]
                gate, up = (w13[e] @ x + 2.0 * b13 @ (a13 @ x)).chunk(2)
                a = F.silu(gate) * up
                y = y + weights_TK[token, k] * (w2[e] @ a + 2.0 * b2 @ (a2 @ a))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("slot", [None, 1], ids=["all clients", "one client"])
def test_the_pass_is_the_weighted_sum(slot: int | None) -> None:
    routing, (w13, w2, lora) = random_routing(), weights()
    slot_T = segments() if slot is None else torch.full((TOKENS,), slot)
    x_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
    dy_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    leaves = [t.clone().requires_grad_() for t in (x_TD, routing.weights_TK, lora.a13, lora.b13, lora.a2, lora.b2)]
    expected = plain(leaves[0], routing, leaves[1], slot_T, w13, w2, leaves[2:])
    gradients = torch.autograd.grad((expected * dy_TD).sum(), leaves)

    x, p = x_TD.clone().requires_grad_(), routing.weights_TK.clone().requires_grad_()
    own = Routing(routing.probs_TE, p, routing.experts_TK, routing.kept_TK)
    plan = make_plan(own, slot_T, slot, pool(merge=slot is None))
    y_TD = expert_pass(
        x, own, torch.zeros((), requires_grad=True), plan, pool(merge=slot is None), FrozenExperts(w13, w2, lora)
    )
    y_TD.backward(dy_TD)
    assert x.grad is not None and p.grad is not None
    for ours, theirs in zip([y_TD, x.grad, p.grad, *lora.grads], [expected, *gradients], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), (ours - theirs).abs().max()
    assert not bool(y_TD[[2, 7]].any()) and not bool(x.grad[[2, 7]].any()), "padding rows neither get nor give anything"


def test_rows_are_only_the_kept_slots() -> None:
    routing = random_routing()
    plan = make_plan(routing, segments(), None, pool(merge=True))
    (part,) = plan.parts
    assert len(plan.slots_N) == int(routing.kept_TK.sum()) == sum(part.send) == sum(part.receive)
    experts_N = routing.experts_TK.flatten()[plan.slots_N]
    key_N = experts_N * CLIENTS + segments()[plan.tokens_N]
    assert torch.equal(key_N, key_N.sort().values), "rows are sorted by (expert, client)"
    (block,) = part.blocks
    assert block.lora_ends_G.tolist() == torch.bincount(key_N, minlength=EXPERTS * CLIENTS).cumsum(0).tolist()
    assert block.expert_ends_E.tolist() == torch.bincount(experts_N, minlength=EXPERTS).cumsum(0).tolist()


def test_no_row_at_all() -> None:
    """An idle rank's stand-in row is not routed; it must come through both directions."""
    nothing = Routing(
        torch.zeros(1, EXPERTS), torch.zeros(1, TOP_K), torch.zeros(1, TOP_K, dtype=torch.int64), torch.zeros(1, TOP_K) > 0
    )
    w13, w2, lora = weights()
    x_TD = torch.ones(1, WIDTH, requires_grad=True)
    plan = make_plan(nothing, torch.zeros(1, dtype=torch.int64), 0, pool(merge=False))
    y_TD = expert_pass(
        x_TD, nothing, torch.zeros((), requires_grad=True), plan, pool(merge=False), FrozenExperts(w13, w2, lora)
    )
    y_TD.sum().backward()
    assert x_TD.grad is not None and not bool(y_TD.any()) and not bool(x_TD.grad.any())
    assert not any(bool(grad.any()) for grad in lora.grads)


def test_rows_keep_their_bits_in_other_company() -> None:
    """Bitwise mode: what comes back for a client's rows does not change with the padding rows around them."""
    routing, (w13, w2, lora) = random_routing(), weights()
    x_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
    kept = routing.kept_TK.any(1)
    shorter = Routing(routing.probs_TE[kept], routing.weights_TK[kept], routing.experts_TK[kept], routing.kept_TK[kept])
    results = []
    for own, rows in ((routing, x_TD), (shorter, x_TD[kept])):
        slot_T = torch.zeros(len(rows), dtype=torch.int64)
        plan = make_plan(own, slot_T, 0, pool(merge=False))
        results.append(expert_pass(rows, own, torch.zeros(()), plan, pool(merge=False), FrozenExperts(w13, w2, lora)))
    assert torch.equal(results[0][kept], results[1])


def test_slots_of_a_wave() -> None:
    two = Pool(None, 2, EXPERTS, 6, merge=False)
    assert [two.wave_slot(peer, slot) for peer in range(2) for slot in range(3)] == list(range(6)) and two.home_clients == 3
    # There, back, and there again: the fifth client is rank 0's third.
    odd = Pool(None, 2, EXPERTS, 5, merge=False)
    assert [odd.wave_slot(*place) for place in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))] == list(range(5))
    assert odd.home_clients == 3
    shared = Pool(None, 2, EXPERTS, 2, merge=False, shared=True)
    assert shared.wave_slot(1, 0) == 0, "in evaluation all peers read the one global copy"
