"""Mixture of Ranks, and the forms of adapter experts that it is made of: exact statements, the balance loss, costs, refusals.

Legend: B samples, S positions, T = B * S token rows, D model width, E experts, Z experts that add nothing, N shared ranks,
R ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_inputs import DIGITS, TREE, dense_config, write_dense
from every import every
from federations import Result, alone, build, make_config, run_alone
from test_fft_moe import CAPS, Hosted
from test_planner_activations import Alive
from torch import Tensor

from fedmoe_ds.errors import UserError
from fedmoe_ds.export.model_folder import write_model_folder
from fedmoe_ds.export.written import Request
from fedmoe_ds.methods.mor import _degradation_balance
from fedmoe_ds.model.adapter_moe_layer import (
    INNER,
    OUTER,
    ROUTER_SCORE,
    SHARED_INNER,
    SHARED_OUTER,
    AdapterMoELayer,
    SelectedSoftmax,
)
from fedmoe_ds.model.batch import Rows
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.moe_layer import ROUTER
from fedmoe_ds.model.pass_context import Pass
from fedmoe_ds.model.router import Routing, route
from fedmoe_ds.model.router_losses import balance_loss
from fedmoe_ds.planner.activations import kept_bytes
from fedmoe_ds.results import open_run
from fedmoe_ds.results.evaluate_command import main as evaluate

pytestmark = pytest.mark.timeout(600)

EXPERTS, SHARED, ZERO, TOP_K = 6, 3, 4, 4
FORMS: dict[str, Any] = {"linear": True, "width": 1, "experts": EXPERTS, "shared": SHARED, "zero": ZERO, "top_k": TOP_K}
SEVERITIES = ([0.1, 0.9], [0.4, 0.2, 0.8])
"""Of the samples of two clients."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mor")
    write_dense(folder, ("vit", "llama"))
    return folder


class Ranks(Hosted):
    """Two clients of 1 and 4 active ranks on a ViT, with random adapters; what one layer is given, and what it adds."""

    def __init__(self, root: Path, family: str = "vit", scored: bool = False, **forms: Any) -> None:
        super().__init__(root / family, scored, **FORMS | forms)
        draw = torch.Generator().manual_seed(5)
        for name in self.bank.specs:
            value = self.bank.values[name]
            value.copy_(torch.randn(value.shape, generator=draw) * (3.0 if name in (ROUTER, ROUTER_SCORE) else 0.3))
        self.scored = scored

    @property
    def layer(self) -> AdapterMoELayer:
        found = self.foundation.sites[0].module(self.foundation.model)
        assert isinstance(found, AdapterMoELayer)
        return found

    def rows(self, client: int) -> Rows:
        plain = super().rows(client)
        scores = torch.tensor(SEVERITIES[client]).numpy() if self.scored else None
        return Rows(**{**plain.__dict__, "scores": scores})

    def seen(self) -> tuple[Tensor, Tensor, Pass]:
        """The layer's input and what it adds to the frozen block, [B, S, D], of a pass of both clients."""
        found: list[tuple[Tensor, Tensor]] = []
        hook = self.layer.register_forward_hook(lambda layer, given, y: found.append((given[0], y - layer.frozen(given[0]))))  # type: ignore[operator]
        _, run = self.logits([self.rows(0), self.rows(1)])
        hook.remove()
        return (*found[0], run)

    def own(self, name: str, client: int) -> Tensor:
        return self.bank.value(name, 0)[:, client] if name in (INNER, OUTER) else self.bank.value(name, 0)[client]

    def stacked(self, client: int, routed: bool) -> tuple[Tensor, Tensor]:
        """A [R, D] and B [D, R] of the shared ranks, or of these and all routed ones."""
        a_RD, b_DR = self.own(SHARED_INNER, client), self.own(SHARED_OUTER, client)
        if not routed:
            return a_RD, b_DR
        inner_EHD, outer_EDH = self.own(INNER, client), self.own(OUTER, client)
        return torch.cat([a_RD, inner_EHD.flatten(0, 1)]), torch.cat([b_DR, outer_EDH.movedim(0, 1).flatten(1)], 1)


def near(ours: Tensor, theirs: Tensor) -> bool:
    apart, most = (ours.double() - theirs.double()).detach().abs().max(), theirs.detach().abs().max()
    return float(apart) <= 1e-5 * max(1.0, float(most))


# What ranks are


def test_shared_ranks_alone_are_lora_of_their_number(root: Path) -> None:
    """Values and gradients, where the routed ones are zero."""
    ranks = Ranks(root, router_input="sample")
    ranks.bank.values[OUTER].zero_()
    x_BSD, added_BSD, run = ranks.seen()
    for value in ranks.bank.grads.values():
        value.zero_()
    dy_BSD = torch.randn(x_BSD.shape, generator=torch.Generator().manual_seed(1))
    # The pass is still the running one.
    torch.autograd.backward(ranks.layer(x_BSD), dy_BSD)
    for segment in run.segments:
        rows = slice(segment.start, segment.stop)
        a_RD, b_DR = (half.double().clone().requires_grad_() for half in ranks.stacked(segment.slot, routed=False))
        assert a_RD.shape[0] == SHARED
        lora_BSD = x_BSD[rows].double() @ a_RD.T @ b_DR.T
        assert near(added_BSD[rows], lora_BSD)
        da_RD, db_DR = torch.autograd.grad((lora_BSD * dy_BSD[rows]).sum(), (a_RD, b_DR))
        assert near(ranks.bank.grad(SHARED_INNER, 0)[segment.slot], da_RD)
        assert near(ranks.bank.grad(SHARED_OUTER, 0)[segment.slot], db_DR)


def test_all_ranks_with_gates_of_one_are_lora_of_all_of_them(root: Path) -> None:
    """A router of zeros gives every one of E ranks a gate of 1 / E: of E times their B the gate is 1."""
    ranks = Ranks(root, zero=0, top_k=EXPERTS)
    ranks.bank.values[ROUTER].zero_()
    rows = Rows(**{**ranks.rows(1).__dict__, "cap": EXPERTS})
    added: list[tuple[Tensor, Tensor]] = []
    ranks.bank.values[OUTER].mul_(EXPERTS)
    ranks.layer.register_forward_hook(lambda layer, given, y: added.append((given[0], y - layer.frozen(given[0]))))  # type: ignore[operator]
    ranks.logits([rows])
    ranks.bank.values[OUTER].div_(EXPERTS)
    a_RD, b_DR = ranks.stacked(1, routed=True)
    assert a_RD.shape[0] == SHARED + EXPERTS
    ((x_BSD, added_BSD),) = added
    assert near(added_BSD, x_BSD.double() @ a_RD.double().T @ b_DR.double().T)


def test_the_order_of_ranks_is_no_matter(root: Path) -> None:
    ranks = Ranks(root, scored=True, router_input="sample")
    _, before_BSD, run = ranks.seen()
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(2))
    real = torch.cat([order, torch.arange(EXPERTS, EXPERTS + ZERO)])
    for name in (INNER, OUTER):
        ranks.bank.values[name].copy_(ranks.bank.values[name].index_select(1, order))
    for name in (ROUTER, ROUTER_SCORE):
        ranks.bank.values[name].copy_(ranks.bank.values[name].index_select(2, real))
    shared = torch.tensor([2, 0, 1])
    ranks.bank.values[SHARED_INNER].copy_(ranks.bank.values[SHARED_INNER].index_select(2, shared))
    ranks.bank.values[SHARED_OUTER].copy_(ranks.bank.values[SHARED_OUTER].index_select(3, shared))
    _, after_BSD, again = ranks.seen()
    assert near(after_BSD, before_BSD)
    assert torch.equal(again.counts[0], run.counts[0][:, order]) and not torch.equal(again.counts[0], run.counts[0])


# Experts that add nothing


def routed(seed: int = 3) -> tuple[Tensor, Routing, Tensor]:
    """Logits of 40 rows and 10 experts, four of which add nothing; caps of 1 to 4."""
    logits_TE = torch.randn(40, EXPERTS + ZERO, generator=torch.Generator().manual_seed(seed))
    cap_T = torch.arange(40) % TOP_K + 1
    routing = route(logits_TE, SelectedSoftmax(EXPERTS + ZERO, TOP_K), cap_T, torch.ones(40, dtype=torch.bool))
    return logits_TE, routing.apart(EXPERTS), cap_T


def test_real_and_zero_experts_together_are_the_cap() -> None:
    logits_TE, routing, cap_T = routed()
    assert routing.zeros is not None and routing.kept is None
    real_T, zero_T = routing.kept_TK.sum(1), routing.zeros.chosen_TZ.sum(1)
    assert torch.equal(real_T + zero_T, cap_T) and bool((real_T == 0).any()) and bool((zero_T == 0).any())
    assert int(routing.experts_TK.max()) < EXPERTS
    for row, cap in enumerate(cap_T.tolist()):
        best = logits_TE[row].topk(cap)
        gates = best.values.softmax(0)
        wanted = {e: float(g) for e, g in zip(best.indices.tolist(), gates, strict=True) if e < EXPERTS}
        kept = routing.kept_TK[row]
        found = dict(zip(routing.experts_TK[row][kept].tolist(), routing.weights_TK[row][kept].tolist(), strict=True))
        assert found == pytest.approx(wanted, abs=1e-6), row
        assert not bool(routing.weights_TK[row][~kept].any())
        assert routing.zeros.chosen_TZ[row].nonzero().flatten().tolist() == sorted(
            e - EXPERTS for e in best.indices.tolist() if e >= EXPERTS
        )
    scores_TE, counts_E = routing.with_zeros()
    assert torch.equal(scores_TE, logits_TE.softmax(-1)) and int(counts_E.sum()) == int(cap_T.sum())


def test_a_zero_expert_adds_exactly_nothing_and_is_sent_nowhere(root: Path) -> None:
    ranks = Ranks(root, scored=True, shared=0, router_input="sample", zero=TOP_K)
    # Whatever the sample, all slots go to zero experts.
    ranks.bank.values[ROUTER].zero_()
    weight = ranks.bank.values[ROUTER_SCORE]
    weight.copy_(torch.tensor([0.0] * EXPERTS + [9.0] * TOP_K)[:, None].expand_as(weight))
    x_BSD, _, run = ranks.seen()
    assert not any(bool(counts.any()) for counts in run.counts.values())
    with torch.no_grad():
        assert torch.equal(ranks.layer(x_BSD), ranks.layer.frozen(x_BSD))
    weight.neg_()
    _, added_BSD, run = ranks.seen()
    tokens = x_BSD.shape[1] * torch.tensor([len(part) for part in SEVERITIES])
    assert run.counts[0].sum(1).tolist() == (tokens * torch.tensor(CAPS)).tolist() and bool(added_BSD.abs().amin((1, 2)).any())


# One decision per sample


def test_a_sample_s_tokens_are_routed_alike_by_their_mean_and_its_score(root: Path) -> None:
    ranks = Ranks(root, scored=True, router_input="sample")
    x_BSD, added_BSD, run = ranks.seen()
    severity_B = torch.tensor([*SEVERITIES[0], *SEVERITIES[1]])
    used_CE = torch.zeros(2, EXPERTS, dtype=torch.int64)
    for segment in run.segments:
        client, cap = segment.slot, CAPS[segment.slot]
        inner_EHD, outer_EDH = ranks.own(INNER, client).double(), ranks.own(OUTER, client).double()
        a_ND, b_DN = (half.double() for half in ranks.stacked(client, routed=False))
        for b in range(segment.start, segment.stop):
            x_SD = x_BSD[b].double()
            z_E = ranks.own(ROUTER, client).double() @ x_SD.mean(0)
            z_E = z_E + ranks.own(ROUTER_SCORE, client)[:, 0].double() * severity_B[b]
            best = z_E.topk(cap)
            wanted_SD = x_SD @ a_ND.T @ b_DN.T
            for gate, e in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
                if e < EXPERTS:
                    wanted_SD = wanted_SD + gate * (x_SD @ inner_EHD[e].T @ outer_EDH[e].T)
                    used_CE[client, e] += len(x_SD)
            assert near(added_BSD[b], wanted_SD), b
    assert torch.equal(run.counts[0], used_CE) and bool(used_CE.any())


def test_of_tokens_every_one_has_its_own_decision(root: Path) -> None:
    """Text, without linear experts: beside the plain formula."""
    ranks = Ranks(root, "llama", linear=False, width=2)
    x_BSD, added_BSD, run = ranks.seen()
    gelu = torch.nn.functional.gelu
    for segment in run.segments:
        client, cap = segment.slot, CAPS[segment.slot]
        inner_EHD, outer_EDH = ranks.own(INNER, client).double(), ranks.own(OUTER, client).double()
        a_ND, b_DN = (half.double() for half in ranks.stacked(client, routed=False))
        for b in range(segment.start, segment.stop):
            length = len(ranks.rows(client).input_ids[b - segment.start])
            for x_D, added_D in zip(x_BSD[b, :length].double(), added_BSD[b, :length], strict=True):
                best = (ranks.own(ROUTER, client).double() @ x_D).topk(cap)
                wanted_D = b_DN @ gelu(a_ND @ x_D)
                for gate, e in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
                    if e < EXPERTS:
                        wanted_D = wanted_D + gate * (outer_EDH[e] @ gelu(inner_EHD[e] @ x_D))
                assert near(added_D, wanted_D)


# The balance


def test_the_balance_of_degraded_samples_is_switch_s() -> None:
    _, routing, _ = routed()
    ones_T = torch.ones(40)
    assert torch.equal(_degradation_balance(0.3, routing, ones_T), 0.3 * balance_loss(routing))
    scores_TE, counts_E = routing.with_zeros()
    switch = len(counts_E) * (counts_E / counts_E.sum() * scores_TE.mean(0)).sum()
    assert float(balance_loss(routing)) == pytest.approx(float(switch), rel=1e-6)


def test_zero_experts_cost_what_their_samples_are_degraded() -> None:
    """Values and gradients of sum over real experts of f p, and of the zero experts' part, row by row times the severity."""
    logits_TE, _, cap_T = routed()
    logits_TE.requires_grad_()
    routing = route(logits_TE, SelectedSoftmax(EXPERTS + ZERO, TOP_K), cap_T, torch.ones(40, dtype=torch.bool)).apart(EXPERTS)
    _, counts_E = routing.with_zeros()
    share_E, p_TE = counts_E / counts_E.sum(), logits_TE.double().softmax(-1)
    assert bool(share_E[EXPERTS:].all())
    for severity_T in (torch.zeros(40), torch.linspace(0, 1, 40)):
        ours = _degradation_balance(1.0, routing, severity_T)
        real = (share_E * p_TE.mean(0))[:EXPERTS].sum()
        zero = (share_E * (p_TE * severity_T[:, None]).mean(0))[EXPERTS:].sum()
        theirs = (EXPERTS + ZERO) * (real + zero if bool(severity_T.any()) else real)
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
        slopes = [torch.autograd.grad(loss, logits_TE, retain_graph=True)[0] for loss in (ours, theirs)]
        assert float((slopes[0] - slopes[1]).abs().max()) <= 1e-6 * float(slopes[1].abs().max())


def test_without_zero_experts_there_is_nothing_that_severity_could_change() -> None:
    logits_TE, _, cap_T = routed()
    routing = route(logits_TE, SelectedSoftmax(EXPERTS + ZERO, TOP_K), cap_T, torch.ones(40, dtype=torch.bool))
    assert torch.equal(_degradation_balance(1.0, routing, torch.zeros(40)), balance_loss(routing))


# Runs

RUN: dict[str, Any] = {
    "adapters": {"moe": {**FORMS, "router_input": "sample"}},
    "method": {"name": "mor"},
    "data": {"form": {"kind": "degraded", "skew": 1.0}},
    "federation": {"rounds": 2},
    "local": {"max_steps": 2},
    "evaluation": {"max_sequences": 4, "client_sequences": 0},
}


def ranks_run(root: Path, name: str, *changes: dict[str, Any]) -> Result:
    return run_alone(dense_config(root, "vit", name, RUN, *changes))


@pytest.fixture(scope="module")
def plain(root: Path) -> Result:
    return ranks_run(root, "plain")


def test_flops_are_those_of_ranks_that_were_used(plain: Result) -> None:
    spec, positions, layers = plain.parts.spec, 17, 2
    cost, depth = spec.cost, spec.size.depth
    assert spec.expert_layout.real_share == EXPERTS / (EXPERTS + ZERO) and cost.real_share == spec.expert_layout.real_share
    width, router = 32, EXPERTS + ZERO
    # Two products of a rank; a router sees a seventeenth of the rows, and a score beside the mean.
    assert cost.expert == 2.0 * 2 * width * layers
    beside = 2.0 * layers * (2 * SHARED * width + router * (width + 1) / positions)
    assert cost.dense_weights == pytest.approx(beside)
    counted = [event for event in plain.events if event["event"] == "client"]
    assert counted and every(event["flops"] > 0 for event in counted)
    for event in counted:
        tokens, slots = event["tokens"], event["tokens"] * event["active_experts"] * layers
        most = cost.spent(tokens, slots, slots, 1)
        assert cost.spent(tokens, 0, 0, 1) <= event["flops"] < most, "some slots are zero experts'"
    assert depth == layers


def test_what_a_pass_keeps_is_planned(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ranks, shared ones, scores of zero experts and one decision per sample; slots of zero experts keep nothing."""
    found: list[tuple[int, int, float]] = []
    real = AdaptedModel.loss

    def counted(model: AdaptedModel, batch: Any, *more: Any, **rest: Any) -> Any:
        with Alive() as alive:
            loss = real(model, batch, *more, **rest)
            rows = len(batch.slot_T)
            used = sum(int(counts.sum()) for counts in loss.run.counts.values())
            found.append((alive.bytes, rows, used / rows / len(loss.run.counts)))
        return loss

    monkeypatch.setattr(AdaptedModel, "loss", counted)
    large = {"data": {"max_samples": 200, "partition": {"clients": 2}}, "local": {"batch_size": 16}}
    # The balance itself is left out, as other methods' are.
    planned = ranks_run(root, "kept", large, {"method": {"balance": "none"}, "federation": {"rounds": 1}}).parts.spec
    size, rows, active = max(found, key=lambda one: one[1])
    assert 0 < active < TOP_K
    assert rows * kept_bytes(planned, 17, active) == pytest.approx(size, rel=0.06)


def test_scores_and_their_balance_are_seen_in_the_result(root: Path, plain: Result) -> None:
    """Each of the forms, the balance and the scores change something; the plan of passes changes nothing."""
    found = {
        name: ranks_run(root, name, change).digest
        for name, change in {
            "switch": {"method": {"balance": "switch"}},
            "none": {"method": {"balance": "none"}},
            "token": {"adapters": {"moe": {"router_input": "token"}}},
            "louder": {"method": {"alpha": 0.5}},
        }.items()
    }
    assert len({plain.digest, *found.values()}) == len(found) + 1
    assert ranks_run(root, "waves", {"execution": {"clients_in_flight": 1}}).digest == plain.digest
    fast = ranks_run(root, "fast", {"execution": {"reproducible": "fast"}})
    for ours, theirs in zip(fast.scores(), plain.scores(), strict=True):
        assert ours[:4] == theirs[:4] and ours[4] == pytest.approx(theirs[4], rel=1e-4)
    recomputed = ranks_run(root, "recomputed", {"execution": {"activation_checkpointing": True}})
    assert recomputed.digest == plain.digest


def test_the_modelling_file_of_an_export_has_no_ranks(plain: Result, tmp_path: Path) -> None:
    run = open_run(Path(plain.parts.config.output) / plain.parts.config.name)
    with pytest.raises(
        UserError, match=r"^--format: merged: the run has adapters\.moe\.linear=true, which the modelling file"
    ) as no:
        write_model_folder(Request(run, run.select("4"), tmp_path, "vit"))
    assert "\n" not in str(no.value) and not list(tmp_path.iterdir())


def test_scores_are_there_when_a_run_is_opened_again(plain: Result, tmp_path: Path) -> None:
    folder, file = Path(plain.parts.config.output) / plain.parts.config.name, tmp_path / "figures.json"
    assert evaluate([str(folder), "--json", str(file)]) == 0
    found = {row["tier_label"]: row["loss"] for row in json.loads(file.read_text())["rows"] if row["round"] == 2}
    last = {event["tier_label"]: event["loss"] for event in plain.events if event["event"] == "eval" and event["round"] == 2}
    assert found == last and len(last) == 3


# Refusals

PLAIN: dict[str, Any] = {"data": {"form": {"kind": "plain", "skew": 0.5}}}
REFUSALS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no section": ([{"adapters": {"moe": None}}], r"adapters\.moe: null: ranks of MoR are adapter experts .*; add the section"),
    "curved": ([{"adapters": {"moe": {"linear": False}}}], r"adapters\.moe\.linear: false: ranks of MoR are LoRA matrices"),
    "no scores": ([PLAIN], r"data\.form\.kind: plain: method mor asks for a score of every sample, and these have none; use"),
    "micro-batches": (
        [{"execution": {"micro_batch_size": 1}}],
        r"execution\.micro_batch_size: 1: method mor weighs a whole step of 4 sequences at once",
    ),
    "idle": ([{"method": {"balance": "none", "alpha": 0.5}}], r"method\.alpha: 0\.5: has no effect with method\.balance=none"),
    "global target": (
        [{"method": {"name": "fft-moe", "auxiliary": "global"}}],
        r"adapters\.moe\.zero: 4: method\.auxiliary=global has a target for experts that are used",
    ),
    "bias": ([{"method": {"name": "ub-smoe"}}], r"adapters\.moe\.zero: 4: phi moves routers by how much experts are used"),
    "base models": (
        [{"method": {"name": "split-mix"}, "adapters": {"moe": {"top_k": 1}}}],
        r"adapters\.moe\.zero: 4: a base model of Split-Mix uses its own expert alone",
    ),
    "base models by sample": (
        [{"method": {"name": "split-mix"}, "adapters": {"moe": {"top_k": 1, "zero": 0}}}],
        r"adapters\.moe\.router_input: sample: a base model of Split-Mix uses its own expert alone",
    ),
    "common ranks": (
        [{"method": {"name": "split-mix"}, "adapters": {"moe": {"top_k": 1, "zero": 0, "router_input": "token"}}}],
        r"adapters\.moe\.shared: 3: all base models of Split-Mix would train them together .*; use 0",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(root: Path, tmp_path: Path, case: str) -> None:
    changes, expected = REFUSALS[case]
    tree = json.loads(json.dumps({**TREE, "data": DIGITS}))
    vit = {"foundation": {"path": None, "preset": "tiny-vit", "cache": str(tmp_path)}, "output": str(tmp_path / "runs")}
    config = make_config(root, "refused", tree, vit, RUN, *json.loads(json.dumps(changes)))
    with pytest.raises(UserError, match=f"^{expected}") as refused:
        build(config, *alone())
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "foundations").exists(), "refused before any pre-training"


def test_a_text_has_no_decision_of_its_own(root: Path, tmp_path: Path) -> None:
    config = dense_config(root, "llama", "whole-texts", {"adapters": {"moe": {"router_input": "sample"}}})
    with pytest.raises(UserError, match=r"^adapters\.moe\.router_input: sample: a language model predicts a sample's tokens"):
        build(config, *alone())
