"""Combinations without a meaning: refused in one line that names field, value and fix, before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from federations import alone, build, make_config, write_inputs
from launching import changed, refused
from pydantic import ValidationError

from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import method_for, method_names

NOT_ONE_MEAN = {"cc-fao", "ewwa-fl", "flood", "fednova", "ota-ffl", "q-fedavg", "raffm"}
UNEQUAL = {"hetlora", "flexlora", "flora", "florist", "fslora"}
PAIRS = UNEQUAL | {"fedex-lora", "fedrot-lora", "lora-fair", "ffa-lora", "fedsa-lora"}
COLLECTING = {"flexlora", "flora", "florist", "fedex-lora", "fedrot-lora", "lora-fair"}
NO_MEAN = COLLECTING | {"local-only", "centralised"}
NO_CONTROL = COLLECTING | {"centralised"}
BASES = {"split-mix", "shefl"}
MOE: dict[str, Any] = {"adapters": {"moe": {"experts": 8, "top_k": 4}}}
VIEWS: dict[str, Any] = {
    "adapters": {"attention": [], "moe": {"experts": 2, "top_k": 1}},
    "execution": {"micro_batch_size": None},
    "data": {"source": "digits", "template": "text", "form": {"kind": "grey-and-colour"}, "partition": {"column": None}},
    "federation": {"tiers": None},
}

NEEDED: dict[str, list[dict[str, Any]]] = {
    "hfedmoe": [{"adapters": {"router": "train"}, "execution": {"micro_batch_size": None}}],
    "flex-moe": [{"adapters": {"router": "train"}}],
    "read-me": [{"adapters": {"router": "train"}}],
    "fft-moe": [MOE, {"execution": {"micro_batch_size": None}}],
    "mor": [
        MOE,
        {"adapters": {"moe": {"linear": True}}, "method": {"balance": "switch"}, "execution": {"micro_batch_size": None}},
    ],
    **{name: [{"adapters": {"attention": [], "moe": {"experts": 8, "top_k": 1}}}] for name in sorted(BASES)},
    "raffm": [{"foundation": {"convert": {"experts": 4}}}],
    "bmsfed": [VIEWS],
    "flood": [{"execution": {"micro_batch_size": None}}],
    "fedbe": [{"foundation": {"expand": {"blocks": 1}}, "adapters": {"attention": []}}],
    "fl-games": [
        {"adapters": {"head": "train"}, "local": {"optimizer": "sgd", "clip": None}, "federation": {"participation": 1.0}}
    ],
    "fednova": [{"local": {"optimizer": "sgd"}}],
    "cc-fao": [{"local": {"optimizer": "sgd"}, "method": {"amsgrad": False, "max_delay": 0}}],
    "q-fedavg": [{"local": {"optimizer": "sgd"}}],
}
"""What a method cannot do without: everything else is the small federation."""

EVERYBODY_ELSE = {name for name in method_names() if name not in UNEQUAL}
RANK = "needs equal ranks on all clients; "
REFUSED: dict[str, tuple[set[str], dict[str, Any], str]] = {
    "budget rank": (
        EVERYBODY_ELSE,
        {"federation": {"budget": "rank"}},
        "federation.budget: rank: method {} " + RANK + "use top_k",
    ),
    "budget both": (
        EVERYBODY_ELSE,
        {"federation": {"budget": "both"}},
        "federation.budget: both: method {} " + RANK + "use top_k",
    ),
    "rank of a tier": (
        EVERYBODY_ELSE,
        {"federation": {"tiers": [{"top_k": 8, "share": 1.0}, {"top_k": 4, "share": 1.0, "rank": 2}]}},
        "federation.tiers.1.rank: 2: method {} " + RANK + "drop the key",
    ),
    "no pairs": (
        PAIRS,
        {"adapters": {"expert_training": "full"}},
        "adapters.expert_training: full: method {} works on LoRA pairs; use adapters.expert_training=lora",
    ),
    "no attention beside adapter experts": (
        PAIRS,
        {"adapters": {"attention": [], "moe": {"experts": 8, "top_k": 4}}},
        "adapters.attention: []: method {} works on LoRA pairs and there would be none; name attention projections",
    ),
    "no experts": (
        {"flex-moe", "hfedmoe", "fed-moe", "flux", "ub-smoe", "read-me"},
        {"adapters": {"experts": False}},
        "adapters.experts: false: method {} works on expert adapters; use adapters.experts=true",
    ),
    "no router": (
        {"flex-moe", "hfedmoe", "read-me"},
        {"adapters": {"router": "frozen"}},
        "adapters.router: frozen: method {} needs trained routers; use adapters.router=train",
    ),
    "what is asked of a whole step": (
        {"hfedmoe", "fft-moe", "mor", "flood"},
        {"execution": {"micro_batch_size": 3}},
        "execution.micro_batch_size: 3: method {} weighs a whole step of 4 sequences at once; use null",
    ),
    "balance of a whole layer": (
        {"fed-moe"},
        {"local": {"balance_loss": 0.01}, "execution": {"micro_batch_size": None}},
        "local.balance_loss: 0.01: it would draw rows to experts that a sub-model lacks; use method.balance_loss",
    ),
    "balance of what is assigned": (
        {"flex-moe"},
        {"local": {"balance_loss": 0.01}, "execution": {"micro_batch_size": None}},
        "local.balance_loss: 0.01: it would draw rows to experts that a client is not assigned; use 0",
    ),
    "dual variables of rows": (
        {"fed-moe"},
        {"local": {"drift": "fedvra"}, "adapters": {"router": "train"}},
        "local.drift: fedvra: its server adds dual variables to one mean of adapters, and rows of trained routers are averaged",
    ),
    "experts of dense blocks": (
        {"flex-moe", "hfedmoe", "fed-moe", "flux", "ub-smoe", "read-me"},
        {"adapters": {"feed_forward": ["gate_proj"]}},
        "adapters.feed_forward: ['gate_proj']: method {} works on experts, and dense blocks have none; use a sparse model",
    ),
    "roles of adapter experts": (
        {"flux"},
        {"adapters": {"moe": {"experts": 8, "top_k": 4}}},
        "adapters.moe: method flux assigns roles to the experts of a sparse model, and adapter experts are all small; use a",
    ),
    "adapter experts beside channels": (
        {"read-me"},
        {"adapters": {"moe": {"experts": 8, "top_k": 4}}},
        "adapters.moe: method read-me trains experts that are made of the model's own channels; drop the section",
    ),
    "balance loss": (
        set(method_names()) - {"hfedmoe", "fft-moe", "mor", "flood", "fed-moe", "flex-moe", "bmsfed"},
        {"local": {"balance_loss": 0.01}, "execution": {"micro_batch_size": 3}},
        "execution.micro_batch_size: 3: local.balance_loss weighs a whole step of 4 sequences at once; use null",
    ),
    "server optimizer": (
        NO_MEAN,
        {"server": {"optimizer": "fedadam"}},
        "server.optimizer: fedadam: method {} has no mean of adapters whose change could be a gradient; use fedavg",
    ),
    "server rate": (
        NO_MEAN,
        {"server": {"lr": 0.5}},
        "server.lr: 0.5: method {} replaces the adapters, there is no step; use 1.0",
    ),
    "control variates": (
        NO_CONTROL,
        {"local": {"drift": "scaffold", "optimizer": "sgd"}},
        "local.drift: scaffold: method {} changes what the adapters' coordinates mean in every round",
    ),
    "dual variables": (
        NO_CONTROL,
        {"local": {"drift": "feddyn"}},
        "local.drift: feddyn: method {} changes what the adapters' coordinates mean in every round, so dual variables",
    ),
    "nothing to drift from": (
        {"local-only"},
        {"local": {"drift": "fedprox"}},
        "local.drift: fedprox: method local-only has no global model to drift from; use none",
    ),
    "small products": (
        {"flora", "florist", "fedex-lora"},
        {"foundation": {"dtype": "bfloat16"}},
        "foundation.dtype: bfloat16: method {} adds small products to the frozen weights in every round",
    ),
    "no adapter experts": ({"fft-moe"}, {"adapters": {"moe": None}}, "adapters.moe: null: FFT-MoE trains adapter experts"),
    "no base models": (BASES, {"adapters": {"moe": None}}, "adapters.moe: null: the base models of "),
    "base models that meet": (
        BASES,
        {"adapters": {"moe": {"experts": 8, "top_k": 2}}},
        "adapters.moe.top_k: 2: a base model of ",
    ),
    "base models that share": (
        BASES,
        {"adapters": {"feed_forward": ["up_proj"]}},
        "adapters.feed_forward: ['up_proj']: all base models of ",
    ),
    "attention that base models share": (
        BASES,
        {"adapters": {"attention": ["q_proj"]}},
        "adapters.attention: ['q_proj']: all base models of ",
    ),
    "balance of one expert": (
        BASES,
        {"local": {"balance_loss": 0.1}, "execution": {"micro_batch_size": None}},
        "local.balance_loss: 0.1: a base model of ",
    ),
    "logits of a frozen router": (BASES, {"local": {"z_loss": 0.1}}, "local.z_loss: 0.1: a base model of "),
    "control variates of what is not sent": (
        {"shefl"},
        {"local": {"drift": "scaffold", "optimizer": "sgd"}, "method": {"density": 0.5}},
        "local.drift: scaffold: its control variates are of whole changes",
    ),
    "dual variables of what is not sent": (
        {"shefl"},
        {"local": {"drift": "feddyn"}, "method": {"upload": 1.0}},
        "local.drift: feddyn: its dual variables are of whole changes",
    ),
}


def config_of(tmp_path: Path, name: str, *changes: dict[str, Any]) -> Any:
    return make_config(tmp_path, "refused", {"method": {"name": name}}, *NEEDED.get(name, []), *changes)


@pytest.mark.parametrize("name", method_names())
def test_without_the_combination_nothing_is_refused(tmp_path: Path, name: str) -> None:
    method_for(config_of(tmp_path, name))
    if name == "fl-games":  # a game has rules of its own for all of these: `test_fl_games.py`
        return
    if name not in NO_MEAN:
        method_for(config_of(tmp_path, name, {"server": {"optimizer": "fedyogi", "lr": 0.1}}))
    if name not in NO_CONTROL | {"local-only"}:
        if name != "cc-fao":  # late starts
            method_for(config_of(tmp_path, name, {"local": {"drift": "scaffold", "optimizer": "sgd"}}))
        if name not in NOT_ONE_MEAN:
            method_for(config_of(tmp_path, name, {"local": {"drift": "fedvra"}}))
    if name in UNEQUAL:
        method_for(config_of(tmp_path, name, {"federation": {"budget": "both"}}))


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path: Path, case: str) -> None:
    methods, change, message = REFUSED[case]
    assert methods and methods <= set(method_names())
    for name in sorted(methods):
        with pytest.raises(UserError, match="^" + re.escape(message.format(name))) as caught:
            method_for(config_of(tmp_path, name, change))
        text = str(caught.value)
        assert "\n" not in text and "; " in text, text


def test_control_variates_need_plain_steps(tmp_path: Path) -> None:
    for local in ({"optimizer": "adamw"}, {"optimizer": "sgd", "momentum": 0.9}):
        with pytest.raises(ValidationError, match=r"local.drift: scaffold: .*use local.optimizer=sgd and local.momentum=0"):
            make_config(tmp_path, "refused", {"local": {"drift": "scaffold", **local}})


def test_dual_variables_need_a_pull(tmp_path: Path) -> None:
    for local in ({"drift": "fedvra"}, {"drift": "feddyn", "aggregation_step": 0.0}):
        with pytest.raises(ValidationError, match=r"local.proximal: 0.0: fed\w+'s server divides its dual variables by it"):
            make_config(tmp_path, "refused", {"local": {"proximal": 0.0, **local}})
    make_config(tmp_path, "taken", {"local": {"drift": "fedvra", "proximal": 0.0, "aggregation_step": 0.0}})


def test_budgets_are_checked_against_the_adapters(tmp_path: Path) -> None:
    """This one needs the model: its experts."""
    write_inputs(tmp_path)
    tier: dict[str, Any] = {"top_k": 4, "share": 1.0}
    for name, key, most, unit in (("flora", "rank", 4, "LoRA rows"), ("hfedmoe", "experts", 16, "experts per layer")):
        config = config_of(tmp_path, name, {"federation": {"tiers": [tier | {key: most + 1}]}})
        message = f"^federation.tiers.0.{key}: {most + 1}: the model has {most} {unit}; use 1 to {most}$"
        with pytest.raises(UserError, match=message):
            build(config, *alone())


COMMAND: dict[str, tuple[dict[str, Any], str]] = {
    "budget": (
        {"method": {"name": "fedit"}, "federation": {"budget": "rank"}},
        "error: federation.budget: rank: method fedit needs equal ranks on all clients; use top_k",
    ),
    "scaffold": (
        {"local": {"drift": "scaffold", "optimizer": "adamw"}},
        "error: local.drift: scaffold: its control variates are mean gradients, so clients must take plain gradient steps; "
        "use local.optimizer=sgd",
    ),
    "frozen router": (
        {"method": {"name": "hfedmoe"}},
        "error: adapters.router: frozen: method hfedmoe needs trained routers; use adapters.router=train",
    ),
}


@pytest.mark.parametrize("case", COMMAND)
def test_the_command_says_so_before_it_loads_anything(nano: dict[str, Any], tmp_path: Path, case: str) -> None:
    """There is no such model and there are no such data, but that is not what it complains about."""
    change, message = COMMAND[case]
    nowhere: dict[str, Any] = {
        "foundation": {"path": str(tmp_path / "no-model")},
        "data": {"source": str(tmp_path / "no.jsonl")},
    }
    assert refused(changed(changed(nano, output=str(tmp_path), **nowhere), **change), tmp_path).startswith(message)


@pytest.mark.parametrize("name", sorted(NOT_ONE_MEAN))
def test_dual_variables_go_with_one_mean(tmp_path: Path, name: str) -> None:
    for drift in ("fedvra", "feddyn"):
        with pytest.raises(UserError, match=f"local.drift: {drift}: "):
            method_for(config_of(tmp_path, name, {"local": {"drift": drift}}))
