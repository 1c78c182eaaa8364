"""Two rounds of every method against its equations in plain float64 (`reference_methods.py`, `reference_products.py`).

After each round the checkpoint is read back: global adapters, personal state, and the server's own state must agree. What goes
with what (drift corrections, server optimizers, sampling, adapters) is asked in `test_methods_matrix.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from federations import alone, build, finish, make_config, write_inputs
from reference import Adapters, Reference, Settings
from reference_flex_moe import FlexMoE
from reference_flux import Flux, close
from reference_inputs import TOLERANCE, check_equal, client_rank, fresh, initial, own_batches, tasks
from reference_late import CCFAO
from reference_methods import (
    EmbracingFL,
    FedIT,
    FedProx,
    FedSALoRA,
    FedVRA,
    FFALoRA,
    FSLoRA,
    HetLoRA,
    HFedMoE,
    LocalOnly,
    Scaffold,
    pairs,
)
from reference_objectives import PRISM, FedFM, FLood
from reference_products import FedRotLoRA, FlexLoRA, FLoRA, FLoRIST, LoRAFair
from reference_server import ServerRule
from reference_sub_models import ALL, FOUND, TRIED, FedMoE
from reference_ub_smoe import UBSMoE
from reference_weights import EWWAFL, FedNova, ProximalFedNova, QFedAvg
from reference_wireless import OverTheAir, Physics, Wireless
from safetensors.torch import load_file

from fedmoe_ds.clients.batches import local_batches
from fedmoe_ds.clients.client import Client
from fedmoe_ds.federation.build import Parts

SAMPLES = (13, 9, 7, 5)
# Where a gradient is nearly zero, Adam divides rounding noise by eps: with 1e-4 no element is made of float32's noise alone.
# Seeds are such that no token is near a tie between two experts; every test checks that.
EPS = 1e-4
# A control variate, a moment of changes: a small difference of adapters over a rate; float32 keeps four or five of its digits.
CONTROL = 1e-4
RANKS = [{"top_k": k, "rank": rank, "share": 1.0} for k, rank in ((8, 4), (4, 3), (2, 2), (1, 1))]
SGD = {"optimizer": "sgd", "lr": 0.5}
ROUTER = {"router": "train"}


@dataclass(frozen=True)
class Case:
    """A configuration, and the same in the reference's words; kinds named in `vanish` are zero after every round."""

    kind: type[FedIT]
    change: dict[str, Any]
    told: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    buys: str = "top_k"
    vanish: str = "none"
    rounds: int = 2
    seed: int = 1


def method(name: str, **params: Any) -> dict[str, Any]:
    return {"method": {"name": name, **params}}


def hfedmoe(params: dict[str, Any], **change: Any) -> dict[str, Any]:
    whole_batches = {"execution": {"micro_batch_size": None}}
    return {**method("hfedmoe", tau=0.05, **params), **whole_batches, **change}


GATED = {"mix": 0.5, "beta": 0.1, "tau": 0.05, "rank_by": "information", "participation": "trained"}
AIR = {"epsilon": 0.2, "snr_db": 20.0}
RADIO = {"channels": 2, "epochs": 2, "deadline_s": 0.2, "energy_j": 2e-3, "trade_off": 5e-5, "divergence": 1.0}
# Of the parameters that the configuration leaves at their defaults.
RADIO_DEFAULTS = {
    "power_w": 0.1, "bandwidth_hz": 1e6, "radius_m": 500.0, "clock_hz": 1e9, "flops_per_cycle": 4.0, "capacitance": 1e-28
}  # fmt: skip
HET = {"gamma": 0.5, "penalty": 0.01, "pruning": True, "sparsity": True}

CASES = {
    "fedit": Case(FedIT, {**method("fedit"), "adapters": ROUTER}),
    "hfedmoe-information": Case(HFedMoE, hfedmoe({}, adapters=ROUTER), {"micro": None}, GATED, buys="experts", seed=2),
    "hfedmoe-importance": Case(
        HFedMoE,
        hfedmoe(
            {"rank_by": "importance", "participation": "usage", "cumulative": 0.8},
            adapters=ROUTER,
            federation={"participation": 0.75},
        ),
        {"micro": None},
        {**GATED, "mix": 0.8, "rank_by": "importance", "participation": "usage"},
        buys="experts",
    ),
    "hfedmoe-full": Case(
        HFedMoE,
        hfedmoe({"beta": 0.5}, adapters={**ROUTER, "expert_training": "full"}),
        {"micro": None},
        {**GATED, "beta": 0.5},
        buys="experts",
        seed=6,
    ),
    # Slow enough for losses to stall, so that the last rounds train what similar clients suggest.
    "fed-moe": Case(
        FedMoE,
        {
            **method("fed-moe", profile_rounds=1, least=1, similar=2, patience=1),
            "federation": {"rounds": 4},
            "local": {"lr": 1e-3},
            "adapters": ROUTER,
        },
        {"lr": 1e-3},
        {"profile": 1, "share": 0.8, "least": 1, "similar": 2, "patience": 1},
        buys="experts",
        rounds=4,
    ),
    "flex-moe": Case(
        FlexMoE,
        {
            **method("flex-moe", alpha=0.3, beta=0.4),
            "adapters": ROUTER,
            # More experts than a token activates: those that serve all tokens have one and the same loss.
            "federation": {"participation": 0.75, "rounds": 3, "tiers": [{"experts": e, "share": 1.0} for e in (13, 11, 9)]},
        },
        {},
        {"alpha": 0.3, "beta": 0.4, "tolerance": 0.1, "kappa": 0.5},
        buys="experts",
        rounds=3,
    ),
    "ub-smoe": Case(
        UBSMoE,
        {**method("ub-smoe", momentum=0.2, candidates=9), "adapters": ROUTER, "federation": {"participation": 0.75}},
        {},
        {"candidates": 9, "momentum": 0.2, "eps": 1e-3, "of": "tokens"},
    ),
    "ub-smoe-batch": Case(
        UBSMoE,
        {**method("ub-smoe", momentum=0.0, epsilon=0.01, pseudo_gradient="batch"), "local": {"batch_size": 1}},
        {},
        {"candidates": 10, "momentum": 0.0, "eps": 0.01, "of": "batch"},
    ),
    "hetlora-pruning": Case(
        HetLoRA,
        # The tails shrink by weight decay: a penalty that does it alone crosses its kink at zero, where rounding decides.
        {
            **method("hetlora", gamma=0.5, penalty=0.02),
            "federation": {"tiers": RANKS, "rounds": 3},
            "local": {"weight_decay": 60.0},
        },
        {"weight_decay": 60.0},
        {**HET, "penalty": 0.02},
        buys="rank",
        rounds=3,
        seed=3,
    ),
    "hetlora-naive": Case(
        HetLoRA,
        {
            **method("hetlora", aggregation="data", pruning=False, penalty=0.0),
            "federation": {"tiers": RANKS, "participation": 0.75},
        },
        {},
        {**HET, "penalty": 0.0, "pruning": False, "sparsity": False},
        buys="rank",
    ),
    "flexlora": Case(FlexLoRA, {**method("flexlora"), "federation": {"tiers": RANKS}}, buys="rank", seed=2),
    "flora": Case(
        FLoRA, {**method("flora"), "federation": {"tiers": RANKS, "participation": 0.75}}, buys="rank", vanish="lora_B"
    ),
    "florist": Case(
        FLoRIST,
        {**method("florist", tau=0.8), "federation": {"tiers": RANKS, "participation": 0.75}},
        {},
        {"tau": 0.8},
        buys="rank",
        vanish="lora_B",
    ),
    "fedrot-lora": Case(FedRotLoRA, method("fedrot-lora", align="B", strength=0.7), {}, {"turns": "B", "strength": 0.7}),
    "fslora": Case(FSLoRA, {**method("fslora"), "federation": {"tiers": RANKS, "participation": 0.75}}, buys="rank"),
    "fslora-both": Case(FSLoRA, {**method("fslora"), "federation": {"budget": "both"}, "adapters": ROUTER}, buys="both"),
    "lora-fair": Case(
        LoRAFair, {**method("lora-fair", server_steps=20)}, {}, {"regularisation": 0.01, "steps": 20, "lr": 0.05}
    ),
    "ffa-lora": Case(FFALoRA, method("ffa-lora")),
    "embracing-fl": Case(
        EmbracingFL,
        {**method("embracing-fl"), "local": {"weight_decay": 0.5}, "adapters": ROUTER},
        {"weight_decay": 0.5},
        buys="layers",
    ),
    "fedsa-lora": Case(FedSALoRA, {**method("fedsa-lora"), "federation": {"participation": 0.75}, "adapters": ROUTER}),
    "local-only": Case(LocalOnly, {**method("local-only"), "federation": {"participation": 0.75}}),
    "centralised": Case(
        FedIT, {**method("centralised"), "federation": {"participation": 0.5}, "local": {"max_steps": 1}}, seed=4
    ),
    "ota-ffl": Case(OverTheAir, {**method("ota-ffl", **AIR), "federation": {"participation": 0.75}}, {}, AIR),
    "wireless-fl": Case(Wireless, method("wireless-fl", **RADIO), {}, RADIO | RADIO_DEFAULTS),
    "fedprox": Case(FedProx, {**method("fedit"), "local": {"drift": "fedprox", "proximal": 0.5}}, {}, {"mu": 0.5}),
    "fedvra": Case(
        FedVRA,
        {
            **method("fedit"),
            "local": {"drift": "fedvra", "proximal": 0.5, "dual_step": 0.8, "aggregation_step": 0.6},
            "federation": {"participation": 0.75},
        },
        {},
        {"mu": 0.5, "dual": 0.8, "ahead": 0.6},
    ),
    "scaffold": Case(
        Scaffold, {**method("fedit"), "local": {**SGD, "drift": "scaffold"}, "federation": {"participation": 0.75}}, SGD
    ),
    "flood": Case(
        FLood,
        {
            **method("flood", horizon=3, temperature=2.0, alpha=0.8),
            "federation": {"participation": 0.75},
            "execution": {"micro_batch_size": None},
        },
        {"micro": None},
        {"alpha": 0.8, "quantile": 0.7, "temperature": 2.0, "amplitude": 1.0, "horizon": 3},
    ),
    # Drawn roles, then two rounds of which the best experts get a larger share.
    "flux": Case(
        Flux,
        {
            **method("flux", samples=3, exploit=0.4, horizon=4),
            "federation": {"participation": 0.75, "rounds": 3, "tiers": [{"experts": e, "share": 1.0} for e in (11, 7, 4)]},
            "adapters": ROUTER,
        },
        {},
        {"samples": 3, "exploit": 0.4, "horizon": 4},
        buys="experts",
        rounds=3,
        seed=5,
    ),
    # Everything with a probe, then imitation, then reinforcement; a client of the second round may be new in the third.
    "prism": Case(
        PRISM,
        {**method("prism", rho=0.4, horizon=3), "federation": {"participation": 0.75, "rounds": 3}, "adapters": ROUTER},
        {},
        {"rho": 0.4, "horizon": 3},
        rounds=3,
    ),
    "fedfm": Case(
        FedFM,
        {**method("fedfm", matching=0.7, temperature=0.3), "federation": {"participation": 0.75, "rounds": 3}},
        {},
        {"matching": 0.7, "temperature": 0.3, "classes": 320},
        rounds=3,
    ),
    "ewwa-fl": Case(
        EWWAFL,
        {**method("ewwa-fl", alpha=2.0, eps=1e-4), "federation": {"participation": 0.75}},
        {},
        {"alpha": 2.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-4},
    ),
    "cc-fao": Case(
        CCFAO,
        {
            **method("cc-fao", steps=2, max_delay=2, delay_threshold=0),
            "local": {**SGD, "max_steps": None},
            "federation": {"rounds": 3},
            "server": {"optimizer": "fedams", "lr": 0.02, "beta1": 0.8, "beta2": 0.5, "tau": 0.01},
        },
        SGD,
        {"most": 2, "threshold": 1, "server": ServerRule("fedams", 0.02, 0.8, 0.5, 0.01)},
        rounds=3,
    ),
    "fednova-momentum": Case(
        FedNova,
        {**method("fednova", effective="steps"), "local": {**SGD, "momentum": 0.9, "max_steps": 3}, "adapters": ROUTER},
        {**SGD, "momentum": 0.9},
        {"lr": SGD["lr"], "momentum": 0.9, "effective": "steps"},
    ),
    "fednova-proximal": Case(
        ProximalFedNova,
        {**method("fednova"), "local": {**SGD, "drift": "fedprox", "proximal": 0.5, "max_steps": 3}},
        SGD,
        {"lr": SGD["lr"], "mu": 0.5, "pull": 0.5},
    ),
    "q-fedavg": Case(
        QFedAvg,
        {**method("q-fedavg", q=3.0), "local": SGD, "federation": {"participation": 0.75}},
        SGD,
        {"q": 3.0, "lipschitz": 1 / SGD["lr"]},
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    write_inputs(folder, SAMPLES)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_same_rounds(root: Path, name: str) -> None:
    case = CASES[name]
    base: dict[str, Any] = {
        "seed": case.seed,
        "local": {"eps": EPS, "max_steps": 2},
        "evaluation": {"client_sequences": 0, "max_sequences": 1, "every": case.rounds},
        "checkpoint": {"keep": case.rounds},
    }
    parts, journal = build(make_config(root, name, base, case.change), *alone())
    reference = Reference(root / "model", Settings(**{"scale": 2.0, "eps": EPS, "clip": 0.5, "micro": 3, **case.told}))
    clients = [0] if parts.spec.method.pooled else [client.index for client in parts.clients]
    options = {**case.options, "ranks": {client.index: client_rank(parts, client) for client in parts.clients}}
    options["sizes"] = {client.index: client.samples for client in parts.clients}
    options["experts"] = {client.index: client.experts for client in parts.clients}
    if case.kind in (PRISM, Flux):
        options |= probed(parts)
    if case.kind is Wireless:
        options["physics"] = {client.index: physics(parts, client) for client in parts.clients}
    expected = case.kind(reference, initial(parts), clients, **options, seed=case.seed)
    rounds, outcomes = range(1, case.rounds + 1), []
    for round_index in rounds:
        expected.round(tasks(parts, round_index, case.buys, case.kind not in (Wireless, PRISM)), fresh(parts, round_index))
        outcomes.append(outcome(expected))
    assert reference.margin > 1e-6 and expected.margin > 1e-6, "too near to a tie for a comparison"
    finish(parts, journal)
    for round_index, theirs in zip(rounds, outcomes, strict=True):
        ours = written(parts, round_index)
        assert theirs.keys() == ours.keys()
        for part, values in theirs.items():
            if part.startswith("past"):  # B is zero before the first round, and nothing is rounded here that was not before
                assert every(float((value - ours[part][key]).abs().max()) < TOLERANCE for key, value in values.items())
                continue
            ordered = factors if case.kind is FlexLoRA else both
            control = (case.kind is Scaffold and part != "adapters") or part in ("momentum", "variance", "largest")
            relative = CONTROL if control else TOLERANCE
            check_equal(*ordered(values, ours[part]), relative, case.vanish)
    if name == "hetlora-pruning":
        ranks = [values["personal"]["model.hetlora.rank"] for values in outcomes]
        assert (ranks[1] < ranks[0]).any(), "the last round trains fewer rows than the second"
    if isinstance(expected, Flux):
        known = parts.state.personal.memories
        assert known.keys() == expected.worth.keys() and every(close(known[i]["worth"], expected.worth[i]) for i in known)
    if isinstance(expected, PRISM):
        assert len(set(map(len, expected.known.values()))) == 4, "every client was probed"
    if isinstance(expected, FedMoE):
        check_sub_models(expected, parts)
    if isinstance(expected, FlexMoE):
        met = set.intersection(*({*plan} for plan in expected.plans))
        assert any((expected.plans[0][index] != expected.plans[2][index]).any() for index in met), "fitness changes the plan"
    if isinstance(expected, UBSMoE):
        assert expected.completed > 0, "some experts were not used"
    if isinstance(expected, Wireless):
        assert any(expected.queues.values()) and len(set(expected.plans)) == 2, "queues and fading change the second round"


def probed(parts: Parts) -> dict[str, Any]:
    """Samples of every client, and how steps are drawn from some of them."""
    data = {client.index: parts.data.train(client.index) for client in parts.clients}
    pairs = {index: list(zip(own.input_ids, own.loss_mask, strict=True)) for index, own in data.items()}

    def draw(index: int, round_index: int, samples: np.ndarray) -> list[np.ndarray]:
        return local_batches(parts.clients[index], parts.config.local, parts.config.seed, round_index, samples)

    return {"data": pairs, "draw": draw, "most": max(map(len, pairs.values()))}


def check_sub_models(expected: FedMoE, parts: Parts) -> None:
    """What the server knows of every client, and that there were all kinds of rounds."""
    assert expected.phases >= {ALL, FOUND, TRIED} and len({len(one.held) for one in expected.known.values()}) > 2
    for index, one in expected.known.items():
        ours = parts.state.personal.memories[index]
        assert np.allclose(ours["scores"], one.scores_LE, rtol=0, atol=TOLERANCE)
        assert [{*zip(*ours[name].nonzero(), strict=True)} for name in ("held", "before")] == [one.held, one.before]
        assert ours["progress"].tolist() == pytest.approx([one.rounds, one.phase, one.lowest, one.stale], abs=TOLERANCE)


def physics(parts: Parts, client: Client) -> Physics:
    """What a client's radio and processor have to do for an epoch."""
    numbers = sum(value.numel() for value in initial(parts).values())
    local, counts = parts.config.local, parts.data.distribution["counts"][client.index]
    return Physics(parts.spec.cost.client(client, local), len(own_batches(parts, client, 1)), 32 * numbers, counts)


def outcome(expected: FedIT) -> dict[str, Adapters]:
    """Everything that the reference knows after a round, as the package writes it."""
    personal: Adapters = {}
    for values in [expected.memory(index) for index in expected.clients]:
        for key, value in values.items():
            personal[key] = torch.cat([personal.get(key, value[None][:0]), value[None]])
    parts = {"adapters": dict(expected.adapters), "personal": personal, **expected.extras()}
    return {name: dict(values) for name, values in parts.items() if values}


def written(parts: Parts, round_index: int) -> dict[str, Adapters]:
    """The tensors in the checkpoint of a round, by kind."""
    folder = parts.checkpoints / f"round-{round_index:05d}"
    whole = [path for path in folder.glob("*.safetensors") if not path.name.startswith("personal-")]
    found = {path.name.removeprefix("server.").removesuffix("-00000-of-00001.safetensors"): load_file(path) for path in whole}
    found["personal"] = of_clients(folder, parts)
    found.pop("memories", None)  # what the server makes of them shows in the next round
    return {name: values for name, values in found.items() if values}


def of_clients(folder: Path, parts: Parts) -> Adapters:
    """Every client's own tensors, client by client, of files whose later levels count."""
    rows: dict[str, list[torch.Tensor]] = {}
    personal, clients = parts.state.personal, range(len(parts.clients))
    for path in sorted(folder.glob("personal-*.safetensors")):
        tensors = load_file(path)
        whose = tensors.pop("clients").tolist()
        for key, values in tensors.items():
            for client, value in zip(whose, values, strict=True):
                # What everybody begins with is first, and has no client; numbers of their own are in no file until they train.
                if client < 0:
                    spec = next((spec for name, spec in personal.specs.items() if key.endswith(name)), None)
                    own = [None if spec is None else personal.initial(spec, index) for index in clients]
                    rows[key] = [value if number is None else torch.full_like(value, number) for number in own]
                else:
                    rows[key][client] = value
    return {key: torch.stack(values) for key, values in rows.items()}


def both(theirs: Adapters, ours: Adapters) -> tuple[Adapters, Adapters]:
    return theirs, ours


def factors(theirs: Adapters, ours: Adapters) -> tuple[Adapters, Adapters]:
    """Products and factors; without the rows of A that belong to singular values which float32 cannot tell from zero.

    The length of a column of B is the singular value.
    """
    ours = {key: value.double() for key, value in ours.items()}
    for stem, _, b in pairs(theirs):
        length = b.norm(dim=0)
        known = (length > 1e-3 * length.max()).unsqueeze(1)
        for values in (theirs, ours):
            values[f"{stem}.product"] = values[f"{stem}.lora_B"] @ values[f"{stem}.lora_A"]
            values[f"{stem}.lora_A"] = values[f"{stem}.lora_A"] * known
    return theirs, ours
