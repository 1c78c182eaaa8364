"""Routing on the device: no layer makes the host wait, whatever the rule of its router, or what its method wants to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fake_cuda.cases.variants import config_of
from fake_cuda.runs import passes_of, run_on_device
from fedmoe_ds.kernels.lora_products import products_for
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.batch import Batch, Rows, make_batch
from fedmoe_ds.model.dispatcher import Pool, make_plan
from fedmoe_ds.model.expert_pass import expert_pass
from fedmoe_ds.model.experts import FrozenExperts, Lora
from fedmoe_ds.model.pass_context import Execution, Pass
from fedmoe_ds.model.routed_forward import record_routing
from fedmoe_ds.model.router import Routing, route

NAMES = {
    "case_layer": ["olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "few_groups", "masked"],
    "case_method": ["flame", "losses", "hfedmoe", "fft-moe", "fft-moe-global"],
}
EXPERTS, TOP_K, WIDTH, FFN, RANK, CLIENTS = 16, 4, 32, 16, 8, 3
BFLOAT16 = torch.bfloat16


@dataclass(frozen=True)
class Rule:
    """How the routers of a family choose (a `RouterSpec`)."""

    score_func: str = "softmax"
    route_norm: bool = False
    num_expert_groups: int | None = None
    num_limited_groups: int | None = None
    group_score_func: str = "max"
    e_score_correction_bias: Tensor | None = None
    num_experts: int = EXPERTS
    top_k: int = TOP_K
    route_scale: float = 1.0


RULES = {
    "olmoe": Rule(),
    "mixtral": Rule(route_norm=True),
    "deepseek_v2": Rule(num_expert_groups=4, num_limited_groups=2),
    "deepseek_v3": Rule("sigmoid", True, 4, 2, "sum"),
    "few_groups": Rule(num_expert_groups=8, num_limited_groups=1),  # of a row's experts only two are eligible
    "masked": Rule(),
}


def batch_on(device: torch.device, masked: bool) -> Batch:
    """Sequences of unequal lengths, so that there is padding; another cap for each client; one may use two experts."""
    lengths, allowed_LE = [[7, 3], [5], [9, 2]], np.arange(EXPERTS)[None] < 2
    ids = [[np.arange(length) for length in own] for own in lengths]
    rows = [
        Rows(slot, cap, own, [np.arange(len(seq)) > 0 for seq in own], allowed_LE if masked and slot == 0 else None)
        for slot, (cap, own) in enumerate(zip((4, 2, 1), ids, strict=True))
    ]
    return make_batch(rows, device)


def layer_on(device: torch.device, rule: Rule, batch: Batch) -> tuple[Routing, Pass, list[Tensor]]:
    """One layer with adapters of every client, forward and backward. Returns what it put out and its gradients as well."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=draw) * 0.5).pin_memory().to(device, non_blocking=True)

    rows = len(batch.slot_T)
    logits_TE, x_TD, w13, w2 = (
        drawn(*s) for s in ((rows, EXPERTS), (rows, WIDTH), (EXPERTS, 2 * FFN, WIDTH), (EXPERTS, WIDTH, FFN))
    )
    shapes = [(RANK, WIDTH), (2 * FFN, RANK), (RANK, FFN), (WIDTH, RANK)]
    values = [drawn(EXPERTS, CLIENTS, *shape) for shape in shapes]
    grads = [torch.zeros_like(value) for value in values]
    pool = Pool(None, 1, EXPERTS, CLIENTS, merge=True)
    execution = Execution(Bank([], EXPERTS, CLIENTS, CLIENTS, device), pool, 2.0, balance=0.01, z=0.001, layers=[0])
    run = Pass(batch.segments, None, batch.slot_T, batch.cap_T, batch.valid_T, batch.masks, demands=batch.demands)
    execution.current = run
    x_TD, logits_TE = x_TD.to(BFLOAT16).requires_grad_(), logits_TE.requires_grad_()
    routing = route(logits_TE, rule, run.cap_T, run.valid_T, *execution.asked(0))
    record_routing(execution, 0, routing, logits_TE)
    plan = make_plan(routing, run.slot_T, run.slot, pool)
    lora = Lora(*values, grads, 2.0, products_for(RANK, BFLOAT16, device))
    layer = FrozenExperts(w13.to(BFLOAT16), w2.to(BFLOAT16), lora)
    y_TD = expert_pass(x_TD, routing, logits_TE.new_zeros((), requires_grad=True), plan, pool, layer)
    (y_TD.float().square().sum() + torch.stack(list(run.losses[0].values())).sum()).backward()
    assert x_TD.grad is not None and logits_TE.grad is not None
    return routing, run, [y_TD.detach(), x_TD.grad, logits_TE.grad, run.counts[0], *grads]


def case_layer(fake: Any, name: str) -> None:
    """No wait in a layer with auxiliary losses, and the same numbers as on the CPU, where rows are counted."""
    batch = batch_on(fake.device, name == "masked")
    assert fake.COUNT.total_waits == 0 and sum(fake.COUNT.uploads.values()) == 1
    routing, run, found = layer_on(fake.device, RULES[name], batch)
    assert fake.COUNT.total_waits == 0, fake.COUNT.waits
    assert routing.kept == int(routing.kept_TK.sum()) == int(run.counts[0].sum())
    _, _, expected = layer_on(torch.device("cpu"), RULES[name], batch_on(torch.device("cpu"), name == "masked"))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.cpu().float() - theirs.float()).norm() <= 0.03 * theirs.float().norm()


def case_a_router_that_has_blown_up(fake: Any) -> None:
    """Scores that are no numbers keep their slots: the rows of other clients stay where they are."""
    batch = batch_on(fake.device, False)
    logits_TE = torch.randn(len(batch.slot_T), EXPERTS, generator=torch.Generator().manual_seed(0)).to(fake.device)
    logits_TE[:3] = float("nan")
    routing = route(logits_TE, RULES["deepseek_v2"], batch.cap_T, batch.valid_T, None, batch.demands)
    assert routing.kept == int(routing.kept_TK.sum())
    plan = make_plan(routing, batch.slot_T, None, Pool(None, 1, EXPERTS, CLIENTS, merge=True))
    assert routing.kept_TK.flatten()[plan.slots_N].all().item()


def case_an_idle_rank(fake: Any) -> None:
    """Its stand-in row is sent like any other batch, and is not routed."""
    batch = make_batch([], fake.device)
    assert fake.COUNT.total_waits == 0 and batch.demands == []
    routing = route(
        torch.zeros(1, EXPERTS, device=fake.device), RULES["olmoe"], batch.cap_T, batch.valid_T, None, batch.demands
    )
    plan = make_plan(routing, batch.slot_T, None, Pool(None, 1, EXPERTS, CLIENTS, merge=True))
    assert routing.kept == len(plan.slots_N) == 0 and fake.COUNT.total_waits == 0
    assert not batch.valid_T.any().item()


def case_method(fake: Any, name: str) -> None:
    """In the passes of a whole round. A method that trains some of the experts waits for one number in every layer: how many
    rows go with autograd, which the scores decide; attention's masks are transformers', which looks once per pass."""
    with passes_of(fake) as passes:
        run_on_device(config_of(name, "waits"))
    assert len(passes) > 1
    for at, found in enumerate(passes):
        here = {place: times for place, times in found.waits.items() if place.startswith(("model/", "methods/", "foundation/"))}
        assert here.pop("model/forward.py", 0) <= 1
        assert here == ({"model/dispatcher.py": found.layers} if name == "hfedmoe" else {}), here
        # The batch, and what its targets weigh in the loss; in the first pass the targets of FFT-MoE's global loss as well.
        assert found.uploads <= (2 if at else 2 + CLIENTS), found.uploads
