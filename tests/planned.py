"""Jobs for tests of the planner: fixtures that a module of tests imports by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from federations import make_config, write_inputs

from fedmoe_ds.config import load_config
from fedmoe_ds.planner import Job, resolve

REPOSITORY = Path(__file__).parents[1]
OLMOE = REPOSITORY / "configs" / "olmoe-7b.yaml"


@pytest.fixture(scope="module")
def olmoe() -> Job:
    """OLMoE of seven billion parameters, of which there is only the configuration."""
    folder = REPOSITORY / "configs" / "models" / "olmoe-1b-7b"
    assert [file.name for file in folder.iterdir()] == ["config.json"], "planning needs no weights and no tokenizer"
    return resolve(load_config(OLMOE, [f"foundation.path={folder}"]))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A tiny model on data that is there, with the planner free to choose passes."""
    root = tmp_path_factory.mktemp("planned")
    write_inputs(root)
    return resolve(make_config(root, "planned", {"execution": {"micro_batch_size": None}}))
