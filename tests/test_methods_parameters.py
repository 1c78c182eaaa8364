"""Every parameter of every method has an effect wherever it is accepted, and keys that do nothing are refused or named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import make_config
from pydantic import ValidationError
from test_methods_matrix import ADAPTERS, ENSEMBLES, GROUPED, METHODS, Case, config_of, trained, write_models

from fedmoe_ds.config import Config, idle_keys
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import load_method, method_for
from fedmoe_ds.methods.base import MethodParams

AGED: dict[str, Any] = {"amsgrad": False, "steps": 1, "max_delay": 2}
SEARCHED: dict[str, Any] = {"profile_rounds": 1}
STALLED: dict[str, Any] = {"profile_rounds": 1, "least": 1, "patience": 1}
# (method, what both runs are told, what one of them is told in addition)
CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("flame", {}, {"temperature": 0.5}),
    ("flame", {}, {"rescaler": "none"}),
    ("flame", {}, {"rescaler": "static"}),
    ("flame", {}, {"rescaler_init": "ratio"}),
    ("flame", {}, {"rescaler_scope": "layer"}),
    ("flame", {"rescaler": "none"}, {"rescaler_init": "ratio"}),
    ("flame", {"rescaler": "static"}, {"rescaler_scope": "layer"}),
    ("hfedmoe", {}, {"cumulative": 0.9}),
    ("hfedmoe", {}, {"beta": 5.0}),
    ("hfedmoe", {"rank_by": "importance"}, {"beta": 5.0}),
    ("hfedmoe", {}, {"tau": 0.15}),
    ("hfedmoe", {}, {"tau_share": 1.1}),
    ("hfedmoe", {"tau": 0.1}, {"tau_share": 1.1}),
    ("hfedmoe", {"beta": 5.0}, {"rank_by": "importance", "beta": 0.1}),
    ("hfedmoe", {}, {"participation": "usage"}),
    ("hfedmoe", {}, {"gate": "data"}),
    ("flex-moe", {"kappa": 0.02}, {"alpha": 5.0}),
    ("flex-moe", {"alpha": 0.2, "kappa": 0.0}, {"beta": 0.9}),
    ("flex-moe", {"alpha": 0.2}, {"tolerance": None}),
    ("flex-moe", {"alpha": 0.2}, {"kappa": 0.0}),
    ("flex-moe", {}, {"score": "random"}),
    ("flex-moe", {"score": "random"}, {"alpha": 9.0}),
    ("hetlora", {"penalty": 0.5}, {"gamma": 0.5}),
    ("hetlora", {"gamma": 0.5}, {"penalty": 0.5}),
    ("hetlora", {"gamma": 0.5, "penalty": 2.0}, {"pruning": False}),
    ("hetlora", {"gamma": 0.5, "penalty": 2.0}, {"min_rank": 4}),
    ("hetlora", {"pruning": False}, {"min_rank": 2}),
    ("hetlora", {"pruning": False, "penalty": 0.0}, {"gamma": 0.5}),
    ("hetlora", {}, {"aggregation": "data"}),
    ("lora-fair", {}, {"server_steps": 3}),
    ("lora-fair", {"server_steps": 3}, {"server_lr": 0.3}),
    ("lora-fair", {"server_steps": 3}, {"regularisation": 0.5}),
    ("lora-fair", {"server_steps": 0}, {"server_lr": 0.3}),
    ("fft-moe", {}, {"auxiliary": "none"}),
    ("fft-moe", {}, {"auxiliary": "switch"}),
    ("fft-moe", {}, {"auxiliary": "global"}),
    ("fft-moe", {}, {"coefficient": 0.5}),
    ("fft-moe", {"coefficient": 0.5}, {"gamma": 3.0}),
    ("fft-moe", {"coefficient": 0.5, "auxiliary": "global"}, {"epsilon": 1.0}),
    ("fft-moe", {"auxiliary": "switch"}, {"gamma": 3.0}),
    ("fft-moe", {"auxiliary": "none"}, {"coefficient": 0.5}),
    ("fft-moe", {"coefficient": 0.0}, {"epsilon": 1.0}),
    ("flood", {"horizon": 4}, {"alpha": 0.0}),
    ("flood", {"horizon": 4}, {"quantile": 0.2}),
    ("flood", {"alpha": 9.0}, {"temperature": 30.0}),
    ("flood", {"horizon": 4}, {"schedule": "constant", "horizon": None}),
    ("flood", {}, {"amplitude": 3.0, "horizon": 4}),
    ("flood", {"schedule": "constant"}, {"horizon": 4}),
    ("flood", {"quantile": 0.0, "alpha": 0.0}, {"temperature": 3.0}),
    ("fedfm", {}, {"matching": 0.1}),
    ("fedfm", {}, {"matching": 0.0}),
    ("fedfm", {}, {"loss": "squared"}),
    ("fedfm", {}, {"temperature": 2.0}),
    ("fedfm", {"loss": "squared"}, {"temperature": 2.0}),
    ("fedfm", {}, {"anchors": "survey"}),
    ("fedfm", {}, {"first_round": 3}),
    ("ewwa-fl", {}, {"alpha": 2.0}),
    ("ewwa-fl", {}, {"beta1": 0.5}),
    ("ewwa-fl", {}, {"beta2": 0.9}),
    ("ewwa-fl", {}, {"eps": 1.0}),
    ("ewwa-fl", {"alpha": 0.0}, {"beta1": 0.5}),
    ("cc-fao", AGED, {"steps": 3}),
    ("cc-fao", AGED, {"pace": "equal"}),
    ("cc-fao", AGED, {"max_delay": 0}),
    ("cc-fao", AGED, {"normalise": False}),
    ("cc-fao", {**AGED, "max_delay": 1}, {"scaled_rate": False}),
    ("cc-fao", {**AGED, "max_delay": 1}, {"delay_threshold": 3}),
    ("cc-fao", AGED, {"amsgrad": True}),
    ("flux", {"exploit": 1.0}, {"score": "frequency"}),
    ("flux", {"exploit": 1.0}, {"samples": 1}),
    ("flux", {}, {"exploit": 1.0}),
    ("flux", {}, {"horizon": 2}),
    ("flux", {"score": "frequency"}, {"samples": 2}),
    ("flux", {"score": "random"}, {"exploit": 0.9}),
    ("flux", {"exploit": 1.0}, {"horizon": 2}),
    ("prism", {"horizon": 2}, {"rho": 0.8}),
    ("prism", {"horizon": 2}, {"route": "random"}),
    ("prism", {"horizon": 2}, {"route": "reversed"}),
    ("prism", {"horizon": 2}, {"horizon": 20}),
    ("prism", {"rho": 0.0}, {"rollouts": 2}),
    ("prism", {"rho": 0.0}, {"route": "random", "horizon": 2}),
    ("fednova", {}, {"effective": "steps"}),
    ("q-fedavg", {}, {"q": 2.0}),
    ("q-fedavg", {}, {"lipschitz": 10.0}),
    ("q-fedavg", {}, {"loss": "first"}),
    ("q-fedavg", {"q": 0.0}, {"loss": "first"}),
    ("fed-moe", {}, {"profile_rounds": 1}),
    ("fed-moe", SEARCHED, {"memory_share": 0.5}),
    ("fed-moe", SEARCHED, {"least": 1}),
    ("fed-moe", SEARCHED, {"search": "random"}),
    ("fed-moe", SEARCHED, {"balance_loss": 0.5}),
    ("fed-moe", STALLED, {"refine": False, "patience": 2}),
    ("fed-moe", STALLED, {"similar": 1}),
    ("fed-moe", STALLED, {"patience": 2}),
    ("fed-moe", {"refine": False}, {"similar": 1}),
    ("ota-ffl", {}, {"epsilon": 0.5}),
    ("ota-ffl", {}, {"snr_db": None}),
    ("wireless-fl", {"channels": 2}, {"schedule": "random"}),
    ("wireless-fl", {}, {"channels": 1}),
    ("wireless-fl", {}, {"epochs": 1}),
    ("wireless-fl", {"epochs": 2}, {"least_epochs": 3}),
    # From here on nobody can send, or is worth it, in the second round or from the beginning.
    ("wireless-fl", {"energy_j": 1e-30}, {"trade_off": 1e-30}),
    ("wireless-fl", {"trade_off": 1e-30}, {"energy_j": 1e-30}),
    ("wireless-fl", {"energy_j": 10.0}, {"capacitance": 1e-12}),
    ("wireless-fl", {}, {"deadline_s": 1e-9}),
    ("wireless-fl", {}, {"power_w": 1e-30}),
    ("wireless-fl", {}, {"bandwidth_hz": 1.0}),
    ("wireless-fl", {}, {"noise_dbm_hz": 200.0}),
    ("wireless-fl", {}, {"radius_m": 1e12}),
    ("wireless-fl", {}, {"clock_hz": 1.0}),
    ("wireless-fl", {}, {"flops_per_cycle": 1e-9}),
    ("wireless-fl", {"schedule": "random"}, {"divergence": 2.0}),
    ("florist", {}, {"tau": 0.5}),
    ("fedrot-lora", {}, {"strength": 1.0}),
    ("fedrot-lora", {}, {"align": "B"}),
    ("fedrot-lora", {"strength": 0.0}, {"align": "B"}),
    ("ub-smoe", {}, {"routing": "plain"}),
    ("ub-smoe", {"momentum": 0.0}, {"candidates": 4}),
    ("ub-smoe", {}, {"momentum": 0.5}),
    ("ub-smoe", {}, {"epsilon": 0.5}),
    ("ub-smoe", {}, {"bound": 0.01}),
    ("ub-smoe", {}, {"pseudo_gradient": "batch"}),
    ("ub-smoe", {}, {"pseudo_gradient": "none"}),
    ("ub-smoe", {"routing": "plain"}, {"momentum": 0.5}),
    ("read-me", {}, {"router_every": 1}),
    ("split-mix", {}, {"deal": "first"}),
    ("shefl", {}, {"deal": "first"}),
    ("shefl", {}, {"kappa": 2.0}),
    ("shefl", {}, {"density": 0.5}),
    ("shefl", {}, {"upload": 1.0}),
    ("prism", {"rho": 1.0}, {"route": "reversed"}),
    ("raffm", {}, {"widths": "random"}),
    ("raffm", {}, {"missing": "zero"}),
    ("mor", {"balance": "switch"}, {"balance": "none"}),
    ("mor", {"balance": "switch"}, {"alpha": 0.5}),
    ("mor", {"balance": "none"}, {"alpha": 0.5}),
    ("fedmox", {}, {"threshold": 0.5}),
    ("fedmox", {}, {"weight": 1.0}),
    ("bmsfed", {}, {"alpha": 3.0}),
    ("bmsfed", {"threshold": 1.0}, {"threshold": math.inf}),
    ("bmsfed", {}, {"selection": "random"}),
    ("fl-games", {}, {"play": "sequential"}),
    ("fl-games", {}, {"buffer": 2}),
    ("fl-games", {"buffer": 2}, {"smooth": "terms"}),
    ("fl-games", {}, {"box": 0.05}),
]
PLACES = [(i, list(ADAPTERS)[(2 * i) % 5]) for i in range(len(CHANGES))]
EVERYWHERE = [(i, adapters) for i in range(len(CHANGES)) for adapters in ADAPTERS]
LONGER: dict[str, tuple[int, dict[str, Any]]] = {
    "flux": (3, {"federation": {"tiers": [{"experts": 3, "share": 1.0}, {"experts": 2, "share": 1.0}]}}),
    "fed-moe": (4, {"local": {"lr": 1e-4}}),
    "bmsfed": (8, {"federation": {"participation": 0.5}}),
    "flex-moe": (4, {"federation": {"tiers": [{"experts": 6, "share": 1.0}, {"experts": 5, "share": 1.0}]}}),
}
"""Methods that need more than two rounds: so slow that losses stall in them, or with other tiers."""
WIDE: dict[str, Any] = {"adapters": {"rank": 8}, "federation": {"participation": 1.0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("parameters"))


def test_every_parameter_is_asked() -> None:
    for name in METHODS:
        keys = type(load_method(make_config(Path("x"), "x", {"method": {"name": name}}).method).params).model_fields
        assert set(keys) == {key for method, _, change in CHANGES if method == name for key in change}


@pytest.mark.parametrize(("i", "adapters"), PLACES)
def test_a_parameter_has_an_effect_or_is_refused(root: Path, i: int, adapters: str) -> None:
    has_effect_or_is_refused(root, i, adapters)


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_every_parameter_has_an_effect_with_these_adapters(root: Path, adapters: str) -> None:
    asked = [
        has_effect_or_is_refused(root, i, place) for i, place in EVERYWHERE if place == adapters and (i, place) not in PLACES
    ]
    assert asked.count(True) >= 5


def has_effect_or_is_refused(root: Path, i: int, adapters: str) -> bool:
    """True where it had an effect on what the rounds leave behind."""
    name, given, change = CHANGES[i]
    case = Case(name, "none", "fedavg", "uniform", adapters)
    if case.refused():
        adapters = "beside" if name in {"fft-moe", "mor"} | ENSEMBLES else "full" if name in GROUPED else "router"
        case = case._replace(adapters=adapters)
    results = []
    rounds, slow = LONGER.get(name, (2, {}))
    for tag, params in (("without", given), ("with", given | change)):
        config = config_of(root, case, f"{tag}-{i}", WIDE, slow)
        config = config.model_copy(update={"method": type(config.method)(name=name, **params)})
        try:
            results.append(trained(config, rounds))
        except UserError as refusal:
            asked = change if tag == "with" else given  # what both are told may itself be refused with these adapters
            assert str(refusal).startswith(tuple(f"method.{key}: " for key in asked)), refusal
            assert "\n" not in str(refusal) and "; " in str(refusal)
            return False
    first, second = results
    assert first.keys() != second.keys() or any(not torch.equal(value, second[key]) for key, value in first.items())
    return True


def test_what_does_nothing_is_refused_by_name(root: Path) -> None:
    """Where nothing depends on the adapters: the words."""
    config = make_config(root, "idle", {"method": {"name": "flame", "rescaler": "none", "rescaler_scope": "layer"}})
    expected = "^method.rescaler_scope: layer: has no effect with method.rescaler=none: none is learnt; drop the key$"
    with pytest.raises(UserError, match=expected):
        method_for(config)
    assert MethodParams().idle(config) == {}


TIERS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "flame",
        {"experts": 4},
        {},
        "federation.tiers.1.experts: 4: here a budget buys top_k, not experts; drop the key",
    ),
    (
        "flora",
        {"experts": 4},
        {},
        "federation.tiers.1.experts: 4: here a budget buys rank, not experts; drop the key",
    ),
    (
        "flora",
        {"rank": 2},
        {"budget": "top_k"},
        "federation.tiers.1.rank: 2: here a budget buys top_k, not LoRA rows; drop the key",
    ),
    ("flame", {"rank": 2}, {}, "federation.tiers.1.rank: 2: method flame needs equal ranks on all clients; drop the key"),
]


@pytest.mark.parametrize(("name", "tier", "federation", "message"), TIERS)
def test_tiers_name_no_budget_that_nobody_spends(
    tmp_path: Path, name: str, tier: dict[str, Any], federation: dict[str, Any], message: str
) -> None:
    tiers = [{"top_k": 8, "share": 1.0}, {"top_k": 4, "share": 1.0, **tier}]
    with pytest.raises(UserError) as refused:
        method_for(make_config(tmp_path, "tiers", {"method": {"name": name}, "federation": {"tiers": tiers, **federation}}))
    assert str(refused.value).startswith(message)


def test_adapter_experts_take_the_place_of_lora() -> None:
    assert Config.model_validate({"adapters": {"moe": {}}}).adapters.attention == []
    assert Config().adapters.attention == ["q_proj", "v_proj"]
    asked = Config.model_validate({"adapters": {"moe": {}, "attention": ["q_proj"]}})
    assert asked.adapters.attention == ["q_proj"]
    assert Config.model_validate(asked.model_dump()) == asked
    for adapters in ({"moe": {}, "experts": False}, {"moe": {}, "expert_training": "full"},
                     {"experts": False, "expert_training": "full"}):  # fmt: skip
        with pytest.raises(ValidationError, match=r"adapters\.expert(s|_training): (false|full): .*; "):
            Config.model_validate({"adapters": adapters})


IDLE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"adapters": {"attention": [], "moe": {}, "rank": 4}}, {"adapters": {"attention": ["q_proj"]}}),
    ({"adapters": {"attention": [], "expert_training": "full", "alpha": 4.0}}, {"adapters": {"attention": ["q_proj"]}}),
    ({"federation": {"sampling": "size"}}, {"federation": {"participation": 0.5}}),
    ({"local": {"steps": 3, "epochs": 2.0}}, {"local": {"steps": None}}),
    ({"local": {"steps": 3, "max_steps": 2}}, {"local": {"steps": None}}),
    ({"local": {"momentum": 0.9}}, {"local": {"optimizer": "sgd"}}),
    ({"local": {"optimizer": "sgd", "betas": [0.8, 0.9]}}, {"local": {"optimizer": "adamw"}}),
    ({"local": {"optimizer": "sgd", "eps": 1e-4}}, {"local": {"optimizer": "adamw"}}),
    ({"local": {"proximal": 0.5}}, {"local": {"drift": "fedprox"}}),
    ({"local": {"drift": "feddyn", "dual_step": 0.5}}, {"local": {"drift": "fedvra"}}),
    ({"local": {"drift": "fedvra", "dual_step": 0.0, "aggregation_step": 0.5}}, {"local": {"dual_step": 0.5}}),
    ({"server": {"beta1": 0.5}}, {"server": {"optimizer": "fedavgm"}}),
    ({"server": {"beta2": 0.5}}, {"server": {"optimizer": "fedadam"}}),
    ({"server": {"tau": 0.5}}, {"server": {"optimizer": "fedyogi"}}),
    ({"server": {"optimizer": "fedadagrad", "beta2": 0.5}}, {"server": {"optimizer": "fedams"}}),
    ({"server": {"optimizer": "fedavgm", "tau": 0.5}}, {"server": {"optimizer": "fedyogi"}}),
    ({"data": {"validation": "v.jsonl", "global_holdout": 0.1}}, {"data": {"validation": None}}),
    ({"execution": {"expert_halves": True}}, {"topology": {"ep_size": 2}}),
    ({"execution": {"owned_gib": 1.0}}, {"foundation": {"expand": {"blocks": 1}}}),
    ({"privacy": {"clip": 1.0, "noise_multiplier": 0.0, "delta": 1e-6}}, {"privacy": {"noise_multiplier": 1.0}}),
]


@pytest.mark.parametrize(("given", "use"), IDLE)
def test_keys_without_effect_are_named(given: dict[str, Any], use: dict[str, Any]) -> None:
    ((section, keys),) = ((s, k) for s, k in given.items())
    key = list(keys)[-1]
    assert [text.split("=")[0] for text in idle_keys(Config.model_validate(given))] == [f"{section}.{key}"]
    used = {**use, section: {**keys, **use.get(section, {})}}
    assert idle_keys(Config.model_validate(used)) == [], "with what it belongs to, it has an effect"


def test_nothing_is_named_by_default() -> None:
    assert idle_keys(Config()) == []
