"""Every method, one round in strict mode: everything that a kernel is given lies on its device."""

from __future__ import annotations

from typing import Any

import torch
from dense_inputs import dense_config
from every import every
from federations import run_alone
from method_variants import BESIDE, GROUPED, IMAGES, PLAIN, RANKED, VARIANTS, VIEWED, variant_config

from fake_cuda.runs import losses, root, run_on_device
from fedmoe_ds.config import Config

NAMES = {
    "case_round": [
        "flame", "flame-layers", "flame-static", "fedit", "hfedmoe", "hfedmoe-full", "hetlora", "flexlora", "flora", "fslora",
        "lora-fair", "ffa-lora", "fedsa-lora", "local-only", "centralised", "moments", "fedprox", "scaffold", "scaffold-rows",
        "fedavgm", "fedadagrad", "fedadam", "fedams", "fedyogi", "ewwa-fl", "fednova", "q-fedavg", "cc-fao",
        "plain-fedit", "plain-hetlora", "plain-flora", "plain-scaffold", "flood", "fedex-lora", "feddyn", "fedvra-rows",
        "florist", "fedrot-lora", "embracing-fl", "plain-embracing-fl", "fedbe", "ota-ffl", "wireless-fl", "fed-moe",
        "flex-moe", "flux", "flux-importance", "ub-smoe", "ub-smoe-batch", "split-mix", "shefl", "fedfm", "fedfm-survey",
        "prism", "raffm", "raffm-random", "read-me", "mor", "mor-images", "scaffold-public", "fedmox", "private", "head",
        "fl-games", "plain-fl-games", "bmsfed",
        "fft-moe", "fft-moe-global", "fft-moe-images", "losses", "router", "checkpointing", "half-moments", "attention-only",
    ],
    "case_losses_are_the_cpu_s": [
        "flame", "flex-moe", "shefl", "fft-moe", "losses", "fed-moe", "ub-smoe", "fedfm", "mor-images",
    ],
}  # fmt: skip

MORE: dict[str, dict[str, Any]] = {
    "losses": {"local": {"balance_loss": 0.01, "z_loss": 0.001}},
    "router": {"adapters": {"router": "train", "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}},
    "checkpointing": {"execution": {"activation_checkpointing": True}},
    "half-moments": {"local": {"moments": "bfloat16"}},
    "attention-only": {"method": {"name": "fedit"}, "adapters": {"experts": False}},
}
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "fft-moe": ("llama", {}),
    "fft-moe-global": ("llama", {"method": {"auxiliary": "global"}}),
    "fft-moe-images": ("vit", {}),
    "mor-images": (
        "vit",
        {
            "adapters": {
                "moe": {"experts": 8, "width": 1, "linear": True, "shared": 3, "zero": 4, "router_input": "sample"},
            },
            "method": {"name": "mor"},
            "data": {"form": {"kind": "degraded"}},
        },
    ),
}
ROUND: dict[str, Any] = {
    "execution": {"reproducible": "fast", "clients_in_flight": 3},
    "federation": {"rounds": 1, "participation": 0.5},
    "local": {"max_steps": 2},
    "evaluation": {"every": 9, "max_sequences": 2, "client_sequences": 0},
}
ALL: dict[str, Any] = {"federation": {"participation": 1.0}}
FEWER: dict[str, dict[str, Any]] = {"lora-fair": {"method": {"server_steps": 2}}, "fl-games": ALL, "plain-fl-games": ALL}
EVALUATED: dict[str, Any] = {"evaluation": {"every": 1}}
SEARCHED: dict[str, Any] = {
    "federation": {"rounds": 2, "participation": 1.0},
    "method": {"balance_loss": 0.01},
    "execution": {"micro_batch_size": None},
}
MORE_ROUNDS: dict[str, dict[str, Any]] = {"fed-moe": SEARCHED, "fedfm": {"federation": {"rounds": 2}}}
"""Methods whose first round is like any other's."""


def config_of(name: str, tag: str, *changes: dict[str, Any]) -> Config:
    if name in DENSE:
        family, change = DENSE[name]
        return dense_config(root(), family, f"{name}-{tag}", ROUND, change, *changes)
    return variant_config(
        root(), "flame" if name in MORE else name, f"{name}-{tag}", ROUND, (MORE | FEWER).get(name, {}), *changes
    )


def case_round(fake: Any, name: str) -> None:
    result = run_on_device(config_of(name, "round"))
    trained = [event for event in result.events if event["event"] == "round"]
    assert len(trained) == 1 and fake.COUNT.kernels > 1000


def case_every_method_has_a_round(fake: Any) -> None:
    every_one = VARIANTS | PLAIN | BESIDE | GROUPED | RANKED | IMAGES | VIEWED | MORE | DENSE
    assert every_one.keys() == set(NAMES["case_round"])


def case_losses_are_the_cpu_s(fake: Any, name: str) -> None:
    """What is trained and evaluated on the device, beside the CPU's kernels."""
    more = MORE_ROUNDS.get(name, {})
    found, expected = (
        losses(run(config_of(name, tag, EVALUATED, more))) for run, tag in ((run_on_device, "cuda"), (run_alone, "cpu"))
    )
    assert len(found) == len(expected)
    assert every(abs(ours - theirs) <= 1e-4 * max(1.0, theirs) for ours, theirs in zip(found, expected, strict=True))


def case_another_device(fake: Any) -> None:
    """Nothing says `cuda` where it means the rank's device."""
    torch.cuda.set_device(1)
    try:
        run_on_device(config_of("hfedmoe", "second-device", EVALUATED))
    finally:
        torch.cuda.set_device(0)


def case_bfloat16(fake: Any) -> None:
    """The type in which models lie on GPUs; a group without rows is given garbage, as sm_100 gives it."""
    fake.COUNT.empty_groups = "garbage"
    change = {"foundation": {"dtype": "bfloat16"}, "adapters": {"rank": 8}}
    assert every(loss < 100.0 for loss in losses(run_on_device(config_of("flame", "bfloat16", EVALUATED, change))))
