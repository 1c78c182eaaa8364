"""A Llama made into Read-ME's sparse model for tests: `write_read_me` lays it down beside the Llama of `dense_inputs`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dense_inputs import TEXT

from fedmoe_ds.config.foundation_section import ConvertConfig
from fedmoe_ds.foundation.domain_channels import width
from fedmoe_ds.foundation.read_me import convert_read_me

CONVERT: dict[str, Any] = {
    "kind": "read-me",
    "experts": 8,
    "permanent": 0.25,
    "kept": 0.5,
    "batches": 1,
    "router_width": 8,
    "router_steps": 3,
}
CHANNELS = TEXT["intermediate_size"]
PERMANENT = width(CONVERT["permanent"], CHANNELS)
OWN = width(CONVERT["kept"], CHANNELS) - PERMANENT
ON_READ_ME: dict[str, Any] = {
    "method": {"name": "read-me"},
    "adapters": {"attention": [], "router": "train", "expert_training": "full"},
    "federation": {"tiers": None},
}


def write_read_me(root: Path, **changes: Any) -> Path:
    """`root/read-me`, from `root/llama`, in two seconds."""
    made = convert_read_me(root / "llama", ConvertConfig(**{**CONVERT, **changes}), 0, root, lambda line: None)
    return Path(shutil.copytree(made, root / "read-me"))
