"""A merged export: transformers alone gives the run's own logits, at every tier, for every family and kind of method."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dense_inputs import DIGITS, write_dense
from federations import make_config, run_alone, write_inputs
from test_families import original_rotary
from test_foundation import FAMILIES, save_model
from trained import own_logits, random_run, run_folder, their_logits
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from fedmoe_ds.config import Config
from fedmoe_ds.export import merged
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.results import Selection, TrainedRun, open_run

TOLERANCE = 1e-5
SPARSE = ("mixtral", "olmoe-normalised", "qwen3_moe", "deepseek_v2", "deepseek_v2-greedy", "deepseek_v3")
QUICK: dict[str, Any] = {"local": {"max_steps": 1}, "evaluation": {"max_sequences": 1, "client_sequences": 0, "every": 9}}
RANKS = {"tiers": [{"rank": rank, "share": 1.0} for rank in (4, 2, 1)]}
DEEPSEEK = {"adapters": {"attention": ["q_a_proj", "kv_b_proj"]}}
LAYERS: dict[str, Any] = {"method": {"name": "flame", "rescaler_scope": "layer"}}
PERSONAL = {"adapters": {"router": "train"}}
METHODS: dict[str, dict[str, Any]] = {
    "flame": {"method": {"name": "flame", "rescaler_init": "ratio"}, "adapters": {"attention": ["q_proj", "o_proj"]}},
    "flame-static": {"method": {"name": "flame", "rescaler": "static"}, "adapters": {"attention": []}},
    "flame-attention": {**LAYERS, "adapters": {"experts": False}},
    "fedit": {"method": {"name": "fedit"}, "adapters": {"router": "train"}},
    "flexlora": {"method": {"name": "flexlora"}, "federation": RANKS},
    "hetlora": {"method": {"name": "hetlora"}, "federation": RANKS},
    "fslora": {"method": {"name": "fslora"}, "federation": RANKS},
    "flora-merged": {"method": {"name": "flora"}},
    "full": {"method": {"name": "flame"}, "adapters": {"router": "train", "expert_training": "full"}},
    "fedsa-lora": {"method": {"name": "fedsa-lora"}, **PERSONAL},
    "local-only": {"method": {"name": "local-only"}, **PERSONAL},
}
DENSE: dict[str, Any] = {
    "method": {"name": "hetlora"},
    "federation": RANKS,
    "adapters": {"attention": ["q_proj", "v_proj"], "feed_forward": ["gate_proj", "down_proj"]},
}
IMAGES: dict[str, Any] = {
    "data": DIGITS,
    "method": {"name": "fedit"},
    "adapters": {"attention": ["q_proj", "v_proj"], "feed_forward": ["fc1", "fc2"]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders of all families with one tokenizer, and the data of one federation."""
    root = tmp_path_factory.mktemp("merged")
    write_dense(root, ("llama", "vit"), samples=(9, 7, 5, 4))
    shutil.rmtree(root / "model")
    write_inputs(root, (9, 7, 5, 4), num_experts=8, num_experts_per_tok=4)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    for family in SPARSE:
        config, options = FAMILIES[family]
        save_model(config(), root / family, **options)
        tokenizer.save_pretrained(root / family)
    return root


def configure(root: Path, name: str, *changes: dict[str, Any], family: str = "model") -> Config:
    return make_config(root, name, QUICK, {"foundation": {"path": str(root / family)}}, *changes)


def selections(run: TrainedRun) -> Iterator[Selection]:
    """Every tier; of personal models, and of personal rescalers, two clients' as well."""
    if not run.spec.method.personal_models:
        yield from map(run.select, run.tiers)
    if run.client_blocks:
        yield from (run.select(client=client.name) for client in (run.clients[0], run.clients[-1]))


def export(run: TrainedRun, selection: Selection, out: Path) -> merged.Written:
    out.mkdir(parents=True)
    return merged.write(run, selection, out)


def load(folder: Path, images: bool = False) -> Any:
    factory: Any = AutoModelForImageClassification if images else AutoModelForCausalLM
    model, facts = factory.from_pretrained(folder, output_loading_info=True)
    assert not any(facts[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), facts
    return model.eval()


def check(config: Config, parts: Parts, folder: Path) -> None:
    """Every model of a run: its logits, and that no two of them are alike."""
    run, seen = open_run(run_folder(config)), []
    for number, selection in enumerate(selections(run)):
        export(run, selection, folder / str(number))
        with original_rotary():
            theirs_NV = their_logits(load(folder / str(number), parts.foundation.images is not None), parts)
        ours_NV = own_logits(parts, selection)
        difference = float((ours_NV - theirs_NV).abs().max())
        assert difference <= TOLERANCE, (selection, difference)
        seen.append(theirs_NV)
    with original_rotary():
        seen.append(their_logits(load(run.model, parts.foundation.images is not None), parts))
    apart = [float((one - other).abs().max()) for place, one in enumerate(seen) for other in seen[:place]]
    assert len(seen) > 1 and min(apart) > 1e-3 and seen[-1].abs().max() > 0.3


@pytest.mark.parametrize("family", SPARSE)
def test_families(root: Path, family: str, tmp_path: Path) -> None:
    config = configure(root, family, LAYERS, DEEPSEEK if "deepseek" in family else {}, family=family)
    check(config, random_run(config), tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_methods(root: Path, method: str, tmp_path: Path) -> None:
    config = configure(root, method, METHODS[method])
    if method == "fslora":  # all tiers are evaluated with all coordinates
        config = configure(root, method, METHODS[method], {"federation": {"tiers": [{"rank": 2, "share": 1.0}]}})
    check(config, random_run(config), tmp_path)


@pytest.mark.parametrize(("family", "changes"), [("llama", DENSE), ("vit", IMAGES)], ids=["llama", "vit"])
def test_dense_models(root: Path, family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = configure(root, family, changes, family=family)
    check(config, random_run(config), tmp_path)


def test_flora_after_two_rounds(root: Path, tmp_path: Path) -> None:
    config = configure(root, "flora", {"method": {"name": "flora"}, "federation": {"rounds": 2}})
    check(config, run_alone(config).parts, tmp_path)
