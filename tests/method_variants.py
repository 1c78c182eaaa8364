"""Every method once or more, as changes of the small federation: what the tests of topologies and of resuming run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dense_inputs import DIGITS
from federations import make_config
from read_me_inputs import CONVERT, ON_READ_ME

from fedmoe_ds.config import Config

SMALL: dict[str, Any] = {
    "federation": {
        "participation": 0.8,
        "tiers": [{"top_k": 8, "share": 1.0}, {"top_k": 4, "share": 1.0}, {"top_k": 1, "share": 1.0}],
    },
    "local": {"max_steps": 2},
    "execution": {"micro_batch_size": None},
    "evaluation": {"max_sequences": 2, "client_sequences": 0, "every": 9},
}
EACH_CLIENT: dict[str, Any] = {"client_sequences": 1}

VARIANTS: dict[str, dict[str, Any]] = {
    "flame": {"method": {"name": "flame"}},
    "flame-layers": {"method": {"name": "flame", "rescaler_scope": "layer", "rescaler_init": "ratio"}},
    "flame-static": {"method": {"name": "flame", "rescaler": "static"}},
    "fedit": {"method": {"name": "fedit"}},
    "hfedmoe": {"method": {"name": "hfedmoe"}, "adapters": {"router": "train"}},
    "hfedmoe-full": {
        "method": {"name": "hfedmoe"},
        "adapters": {"router": "train", "expert_training": "full"},
    },
    "fed-moe": {
        "method": {"name": "fed-moe", "profile_rounds": 1, "least": 2, "patience": 1},
        "adapters": {"router": "train"},
        "federation": {"tiers": [{"experts": 9, "share": 1.0}, {"experts": 5, "share": 1.0}], "rounds": 3},
        "evaluation": EACH_CLIENT,
    },
    "flex-moe": {
        "method": {"name": "flex-moe"},
        "adapters": {"router": "train"},
        "federation": {"tiers": [{"experts": 9, "share": 1.0}, {"experts": 5, "share": 1.0}]},
        "evaluation": EACH_CLIENT,
    },
    "flux": {
        "method": {"name": "flux", "samples": 2, "exploit": 0.6},
        "federation": {"tiers": [{"experts": 9, "share": 1.0}, {"experts": 5, "share": 1.0}]},
    },
    "flux-importance": {
        "method": {"name": "flux", "score": "importance", "exploit": 1.0},
        "federation": {"tiers": [{"experts": 9, "share": 1.0}, {"experts": 5, "share": 1.0}]},
    },
    "hetlora": {"method": {"name": "hetlora"}},
    "flexlora": {"method": {"name": "flexlora"}},
    "flora": {"method": {"name": "flora"}},
    "florist": {"method": {"name": "florist"}},
    "fedex-lora": {"method": {"name": "fedex-lora"}},
    "fedrot-lora": {"method": {"name": "fedrot-lora"}},
    "fslora": {"method": {"name": "fslora"}},
    "lora-fair": {"method": {"name": "lora-fair"}},
    "ffa-lora": {"method": {"name": "ffa-lora"}},
    "fedsa-lora": {"method": {"name": "fedsa-lora"}, "evaluation": EACH_CLIENT},
    "local-only": {"method": {"name": "local-only"}, "evaluation": EACH_CLIENT},
    "centralised": {"method": {"name": "centralised"}},
    # With decay: layers that a client does not train keep what they received all the same.
    "embracing-fl": {"method": {"name": "embracing-fl"}, "local": {"weight_decay": 0.5}},
    "ota-ffl": {"method": {"name": "ota-ffl", "epsilon": 0.2, "snr_db": 20.0}, "server": {"optimizer": "fedavgm", "lr": 0.5}},
    "wireless-fl": {
        "method": {"name": "wireless-fl", "channels": 5, "epochs": 2, "deadline_s": 0.2, "energy_j": 1e-3, "trade_off": 1e-4},
    },
    "moments": {
        "method": {"name": "fedit"},
        "adapters": {"dropout": 0.1},
        "local": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05, "moments": "bfloat16", "rounds_schedule": "cosine"},
    },
    "fedprox": {"method": {"name": "fedit"}, "local": {"drift": "fedprox"}},
    "private": {"method": {"name": "fedit"}, "privacy": {"clip": 0.05, "noise_multiplier": 0.5}},
    "scaffold": {"method": {"name": "fedit"}, "local": {"optimizer": "sgd", "drift": "scaffold", "lr": 0.05}},
    "scaffold-rows": {"method": {"name": "fslora"}, "local": {"optimizer": "sgd", "drift": "scaffold", "lr": 0.05}},
    "scaffold-public": {
        "method": {"name": "fedit"},
        "adapters": {"dropout": 0.1},
        "local": {"optimizer": "sgd", "drift": "scaffold", "lr": 0.05},
        "data": {"public": 0.2},
        "server": {"optimizer": "fedavgm", "lr": 0.5, "training": {"epochs": 0.5, "lr": 0.02, "warm_up": 1.0}},
    },
    "feddyn": {"method": {"name": "fedit"}, "local": {"drift": "feddyn", "proximal": 0.5}},
    "fedvra-rows": {"method": {"name": "fslora"}, "local": {"drift": "fedvra", "dual_step": 0.5, "aggregation_step": 0.7}},
    "fedavgm": {
        "method": {"name": "flame"},
        "server": {"optimizer": "fedavgm", "lr": 0.5},
        "federation": {"sampling": "budget"},
    },
    "fedadam": {"method": {"name": "hetlora", "gamma": 0.5}, "server": {"optimizer": "fedadam", "lr": 0.01}},
    "cc-fao": {
        "method": {"name": "cc-fao", "steps": 1, "max_delay": 2},
        "server": {"optimizer": "fedams", "lr": 0.01},
        "local": {"optimizer": "sgd", "lr": 0.05},
    },
    "fedadagrad": {"method": {"name": "fedit"}, "server": {"optimizer": "fedadagrad", "lr": 0.01}},
    "fedams": {"method": {"name": "flame"}, "server": {"optimizer": "fedams", "lr": 0.01}},
    "fedyogi": {
        "method": {"name": "fslora"},
        "server": {"optimizer": "fedyogi", "lr": 0.01},
        "federation": {"budget": "both", "sampling": "size"},
    },
    "ub-smoe": {"method": {"name": "ub-smoe", "momentum": 0.5}, "adapters": {"router": "train"}},
    "ub-smoe-batch": {"method": {"name": "ub-smoe", "pseudo_gradient": "batch", "candidates": 8, "momentum": 0.0}},
    "flood": {"method": {"name": "flood", "horizon": 3, "alpha": 2.0}},
    "prism": {"method": {"name": "prism", "rho": 0.5, "horizon": 3}},
    # Dual variables: a survey's clients may be elsewhere than what belongs to them.
    "fedfm-survey": {
        "method": {"name": "fedfm", "anchors": "survey"},
        "execution": {"micro_batch_size": 2},
        "local": {"drift": "feddyn", "proximal": 0.5},
    },
    "fedfm": {"method": {"name": "fedfm", "matching": 2.0}, "federation": {"rounds": 3}},
    "head": {"method": {"name": "fedit"}, "adapters": {"head": "train"}},
    "fl-games": {
        "method": {"name": "fl-games", "buffer": 2, "box": 0.1},
        "adapters": {"head": "train"},
        "federation": {"participation": 1.0},
        "local": {"optimizer": "sgd", "lr": 1.0, "clip": None},
    },
    "ewwa-fl": {"method": {"name": "ewwa-fl"}, "adapters": {"router": "train"}},
    "fednova": {
        "method": {"name": "fednova", "effective": "steps"},
        "local": {"optimizer": "sgd", "momentum": 0.5, "lr": 0.05, "max_steps": 3},
        "server": {"optimizer": "fedavgm", "lr": 0.5},
    },
    "q-fedavg": {"method": {"name": "q-fedavg", "q": 2.0}, "local": {"optimizer": "sgd", "lr": 0.05}},
}

DEVICES: dict[str, dict[str, Any]] = {
    "devices": {"method": {"name": "fedit"}, "devices": {"mix": {"phone-mid": 1.0, "laptop": 1.0}, "availability": "always"}},
    "planned": {
        "method": {"name": "ota-ffl", "epsilon": 0.2, "snr_db": 20.0},
        "federation": {"participation": 0.5},
        "devices": {
            "mix": {"phone-entry": 1.0, "laptop": 1.0},
            "aggregation": "deadline",
            "availability": "always",
            "over_selection": 1.5,
            "dropout": 0.2,
            "spread": 0.3,
        },
    },
    "nights": {"method": {"name": "flame"}, "devices": {"mix": {"phone-mid": 1.0, "laptop": 1.0}, "spread": 0.5}},
    "deadline": {
        "method": {"name": "hetlora"},
        "federation": {"participation": 0.5, "sampling": "size"},
        "devices": {
            "mix": {"phone-entry": 1.0, "laptop": 1.0, "edge-small": 1.0},
            "aggregation": "deadline",
            "availability": "always",
            "over_selection": 1.5,
            "dropout": 0.2,
            "spread": 0.3,
        },
    },
    "thresholded": {
        "method": {"name": "florist", "tau": 0.8},
        "devices": {
            "mix": {"phone-entry": 1.0, "edge-small": 1.0},
            "aggregation": "deadline",
            "availability": "always",
            "over_selection": 1.5,
            "dropout": 0.1,
        },
    },
    "buffered": {
        "method": {"name": "flame"},
        "devices": {
            "mix": {"phone-entry": 1.0, "laptop": 1.0, "edge-small": 1.0},
            "aggregation": "buffered",
            "availability": "always",
            "buffer": 2,
            "concurrency": 4,
            "max_staleness": 3,
            "dropout": 0.1,
            "spread": 0.5,
        },
    },
    "buffered-adam": {
        "method": {"name": "hetlora"},
        "server": {"optimizer": "fedadam", "lr": 0.01},
        "devices": {
            "mix": {"phone-entry": 1.0, "edge-small": 2.0},
            "aggregation": "buffered",
            "availability": "always",
            "staleness": "constant",
            "buffer": 3,
            "concurrency": 3,
            "max_staleness": 2,
        },
    },
}
"""On simulated devices."""
RANKS: dict[str, Any] = {"tiers": [{"rank": rank, "share": 1.0} for rank in (4, 2, 1)]}
PLAIN: dict[str, dict[str, Any]] = {
    "plain-fedit": {"method": {"name": "fedit"}, "federation": {"tiers": None}},
    "plain-hetlora": {"method": {"name": "hetlora"}, "federation": RANKS},
    "plain-flora": {"method": {"name": "flora"}, "federation": RANKS},
    "plain-embracing-fl": {
        "method": {"name": "embracing-fl"},
        "federation": {"tiers": [{"layers": layers, "share": 1.0} for layers in (2, 1)]},
    },
    "plain-fl-games": {
        "method": {"name": "fl-games", "buffer": 1, "smooth": "terms", "box": 0.1},
        "adapters": {"attention": [], "feed_forward": [], "head": "train", "head_start": "zero"},
        "federation": {"participation": 1.0, "tiers": None},
        "local": {"optimizer": "sgd", "lr": 1.0, "clip": None},
    },
    "plain-scaffold": {
        "method": {"name": "fslora"},
        "local": {"optimizer": "sgd", "drift": "scaffold", "lr": 0.05},
        "federation": RANKS,
    },
    # With decay: blocks that a client does not train keep what they received all the same.
    "fedbe": {
        "method": {"name": "fedbe"},
        "foundation": {"expand": {"blocks": 2}},
        "adapters": {"attention": [], "feed_forward": []},
        "local": {"weight_decay": 0.5},
        "federation": {"tiers": [{"blocks": blocks, "share": 1.0} for blocks in (1, 1, 2)]},
    },
}
"""On the Llama beside the OLMoE, without experts: every rank is a cluster of its own."""
BASES: dict[str, Any] = {
    "adapters": {"attention": [], "moe": {"experts": 8, "width": 8, "top_k": 1}},
    "federation": {"tiers": [{"experts": count, "share": 1.0} for count in (5, 2, 1)]},
}
BESIDE: dict[str, dict[str, Any]] = {
    "split-mix": {**BASES, "method": {"name": "split-mix"}, "local": {"weight_decay": 0.5}},
    "shefl": {
        **BASES,
        "method": {"name": "shefl", "kappa": 1.0, "upload": 1.5},
        "server": {"optimizer": "fedadam", "lr": 0.01},
    },
}
"""On the Llama, with adapter experts beside it, of which every one is a model of its own."""
GROUPS: dict[str, Any] = {
    "foundation": {"convert": {"experts": 4}},
    "adapters": {"attention": [], "expert_training": "full"},
    "federation": {"tiers": [{"top_k": width, "share": 1.0} for width in (4, 3, 1)]},
}
GROUPED: dict[str, dict[str, Any]] = {
    "raffm": {**GROUPS, "method": {"name": "raffm"}, "local": {"weight_decay": 0.5}},
    "raffm-random": {**GROUPS, "method": {"name": "raffm", "widths": "random", "missing": "zero"}},
    # The second round is the router's.
    "read-me": {**ON_READ_ME, "foundation": {"convert": CONVERT}, "local": {"weight_decay": 0.5}},
}
"""On the Llama, whose feed-forward blocks are cut into groups of channels, or into what is permanent and experts."""
RANKED: dict[str, dict[str, Any]] = {
    "mor": {
        "method": {"name": "mor", "balance": "switch", "alpha": 0.1},
        "adapters": {
            "attention": [],
            "moe": {"experts": 8, "width": 1, "top_k": 8, "linear": True, "shared": 3, "zero": 4},
        },
    },
}
"""On the Llama, with ranks beside it: linear experts, shared ones, and experts that add nothing."""
IMAGES: dict[str, dict[str, Any]] = {
    "fedmox": {
        "data": {**DIGITS, "public": 0.05, "labels": "hidden", "form": {"kind": "low-resolution"}},
        "adapters": {"attention": [], "moe": {"experts": 4, "width": 8, "top_k": 1, "gate": "straight-through"}},
        "federation": {"tiers": None},
        "method": {"name": "fedmox", "threshold": 0.2},
        "server": {"lr": 0.5, "training": {"epochs": 0.5, "lr": 0.01, "warm_up": 1.0}},
    },
}
"""On the ViT and the digits that come with it."""
VIEWED: dict[str, dict[str, Any]] = {
    "bmsfed": {
        "method": {"name": "bmsfed", "threshold": 1.01},
        "adapters": {"attention": [], "moe": {"experts": 2, "width": 8, "top_k": 1}},
        "federation": {"tiers": None},
        "local": {"batch_size": 4, "weight_decay": 0.1},
        "data": DIGITS | {"max_samples": 12, "form": {"kind": "grey-and-colour"}},
    },
}
"""On a vision transformer that sees colours: images of several views, of which every one has a model of its own."""
ON_LLAMA: dict[str, Any] = {"adapters": {"feed_forward": ["gate_proj", "down_proj"]}}


def variant_config(root: Path, variant: str, tag: str, *changes: dict[str, Any]) -> Config:
    """The small federation under one variant; `tag` tells its runs apart."""
    model = "llama" if variant in PLAIN | BESIDE | GROUPED | RANKED else "vit" if variant in IMAGES else None
    model = "vit-rgb" if variant in VIEWED else model
    dense = {} if model is None else {"foundation": {"path": str(root / model)}}
    plain = ON_LLAMA if variant in PLAIN else {}
    own = (VARIANTS | PLAIN | BESIDE | GROUPED | RANKED | IMAGES | VIEWED | DEVICES)[variant]
    return make_config(root, f"{variant}-{tag}", SMALL, dense, plain, own, *changes)
