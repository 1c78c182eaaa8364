"""docs/seeds.md: generated and complete; what it says runs has a configuration that exists and names that method or setting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from every import every
from pydantic import ValidationError

from fedmoe_ds.config import load_config
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import method_for, method_names
from fedmoe_ds.methods.seeds import Ordering, Seed, seeds, seeds_markdown

ROOT = Path(__file__).parents[1]
ROWS = [row for family in seeds().values() for row in family]
NAMED = """
FLAME, FFT-MoE, HFedMoE, FedIT, HetLoRA, FlexLoRA, FLoRA, FSLoRA, LoRA-FAIR, FFA-LoRA, FedSA-LoRA, FLoRIST, FedEx-LoRA,
FedRot-LoRA, FedMoE, FLEX-MoE, Flux, Read-ME, Mixture of Ranks, UB-SMoE, FedBE, RaFFM, EmbracingFL, Split-Mix, SHEFL, FedAvg,
FedProx, SCAFFOLD, FedDyn, FedVRA, FedNova, FedAvgM, FedAdam, FedYogi, FedAdagrad, Client-centric adaptive optimisation,
EWWA-FL, FLood, q-FedAvg, FedBuff, OTA-FFL, Wireless FL, FedFM, ANFR, DFL, FedMox, FL Games, BMSFed, PRISM
"""


def wrong(row: Seed) -> str | None:
    """Why what a row says is not so; None: it is."""
    if row.config is None:
        return None
    path, *overrides = row.config.split()
    if not (ROOT / path).is_file():
        return f"{path}: there is no such file"
    try:
        config = load_config(ROOT / path, overrides)
        method_for(config)
    except UserError as error:
        return str(error)
    for key, value in row.runs.items():
        found: Any = config.model_dump()
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found != value:
            return f"{row.config}: {key} is {found} there, not {value}"
    return None


def test_the_page_is_what_the_package_prints() -> None:
    page = ROOT / "docs" / "seeds.md"
    assert page.read_text() == seeds_markdown(), "run python -m fedmoe_ds.methods.seeds > docs/seeds.md"


def test_every_system_has_one_row() -> None:
    names = [row.system for row in ROWS]
    assert len(names) == len(set(names))
    assert every(any(name == row or row.startswith(f"{name} ") for row in names) for name in re.split(r",\s+", NAMED.strip()))


def test_every_method_has_a_row() -> None:
    assert {row.runs["method.name"] for row in ROWS if "method.name" in row.runs} == set(method_names())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.system)
def test_what_a_row_says_runs(row: Seed) -> None:
    assert wrong(row) is None


@pytest.mark.parametrize(
    ("runs", "config", "message"),
    [
        ({"method.name": "fedit"}, "configs/methods/gone.yaml", "configs/methods/gone.yaml: there is no such file"),
        ({"method.name": "flame"}, "configs/methods/fedit.yaml", "method.name is fedit there, not flame"),
        ({"method.name": "fedmagic"}, "configs/methods/fedit.yaml method.name=fedmagic", "there is no such method"),
        ({"local.drift": "fedprox"}, "configs/methods/scaffold.yaml", "local.drift is scaffold there, not fedprox"),
        ({"local.magic": "fedprox"}, "configs/methods/scaffold.yaml", "local.magic is None there"),
        ({"server.optimizer": "fedadam"}, "configs/methods/flora.yaml server.optimizer=fedadam", "has no mean of adapters"),
    ],
)
def test_a_row_that_is_not_so_is_found(runs: dict[str, Any], config: str, message: str) -> None:
    found = wrong(Seed(system="X", paper="none", runs=runs, config=config))
    assert found is not None and message in found


def test_what_no_row_may_say() -> None:
    for fields, message in (
        ({"runs": {"method.name": "fedit"}}, "what runs has a configuration"),
        ({"config": "configs/methods/fedit.yaml"}, "what does not has none"),
        ({"orderings": [{"here": "not tried", "claim": "a < b"}]}, "of a system that does not run"),
        ({"orders": []}, "Extra inputs"),
    ):
        with pytest.raises(ValidationError, match=message):
            Seed.model_validate({"system": "X", "paper": "none", **fields})
    for here, see in (("reproduced", None), ("not tried", "log.md")):
        with pytest.raises(ValidationError, match="name the page with the figures"):
            Ordering.model_validate({"here": here, "claim": "a < b", "see": see})
