"""Exports of a trained head: transformers and PEFT compute what the run does; where there is no place for it, it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_inputs import DIGITS, write_dense
from federations import make_config
from peft import PeftModel
from trained import own_logits, random_run, run_folder, their_logits
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.export.command import export
from fedmoe_ds.export.written import Request
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.results import open_run

HEAD: dict[str, Any] = {
    "adapters": {"attention": ["q_proj"], "head": "train"},
    "method": {"name": "fedit"},
    "federation": {"tiers": None},
}
ALONE: dict[str, Any] = {"adapters": {"attention": []}}
BESIDE: dict[str, Any] = {"adapters": {"moe": {"experts": 4, "width": 8, "top_k": 2}}, "execution": {"micro_batch_size": None}}
MODELS: dict[str, Any] = {"vit": AutoModelForImageClassification, "llama": AutoModelForCausalLM}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export-head")
    write_dense(folder, ("llama", "vit"), samples=(9, 7, 5, 4))
    return folder


def run_of(root: Path, family: str, name: str, *changes: dict[str, Any]) -> tuple[Config, Parts]:
    data = {"data": DIGITS} if family == "vit" else {}
    config = make_config(root, name, HEAD, {"foundation": {"path": str(root / family)}}, data, *changes)
    return config, random_run(config)


def exported(config: Config, fmt: str, out: Path) -> Path:
    run = open_run(run_folder(config))
    export(fmt, Request(run, run.select(), out, "base"))
    return out


def own(config: Config, parts: Parts) -> torch.Tensor:
    return own_logits(parts, open_run(run_folder(config)).select())


@pytest.mark.parametrize(
    ("family", "changes"), [("vit", ALONE), ("llama", {}), ("vit", BESIDE)], ids=["vit", "llama", "beside"]
)
def test_a_whole_model_has_the_trained_head(root: Path, tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    config, parts = run_of(root, family, f"merged-{tmp_path.name}", changes)
    folder = exported(config, "merged", tmp_path / "out")
    model = MODELS[family].from_pretrained(folder, trust_remote_code="moe" in changes.get("adapters", {})).eval()
    theirs = their_logits(model, parts)
    assert float((own(config, parts) - theirs).abs().max()) < 1e-5
    plain = MODELS[family].from_pretrained(root / family).eval()
    assert float((their_logits(plain, parts) - theirs).abs().max()) > 1e-2


def test_peft_keeps_a_classifier_whole(root: Path, tmp_path: Path) -> None:
    config, parts = run_of(root, "vit", "peft")
    folder = exported(config, "peft", tmp_path / "out")
    model: Any = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(root / "vit"), str(folder)).eval()
    assert float((own(config, parts) - their_logits(model, parts)).abs().max()) < 1e-5


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("vit", ALONE)], ids=["text", "no LoRA"])
def test_peft_has_no_place_for_it(root: Path, tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    config, _ = run_of(root, family, f"refused-{family}", changes)
    with pytest.raises(
        UserError, match=r"--format: peft: a LoRA file has no place for it: a trained head.*; use --format merged"
    ):
        exported(config, "peft", tmp_path / "out")
