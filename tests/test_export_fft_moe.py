"""FFT-MoE as a model folder with code of its own: the run's logits at every tier, loaded by transformers alone."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import IMAGES, TEXT, dense_config
from every import every
from federations import write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from trained import IDS, own_logits, random_run, run_folder, their_logits
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    ViTConfig,
)

from fedmoe_ds.checkpoint.writer import CheckpointWriter
from fedmoe_ds.export import command, shards
from fedmoe_ds.export.model_folder import CODE, write_model_folder
from fedmoe_ds.export.modeling_fft_moe import BASES, AdapterExperts, AdapterSettings
from fedmoe_ds.export.written import Request
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.foundation.dense import DENSE
from fedmoe_ds.foundation.own_code import use_private_modules
from fedmoe_ds.results import Selection, TrainedRun, open_run

TOLERANCE = 1e-5
FACTORIES: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "image_classification": AutoModelForImageClassification,
}

# Every base stands for one more thing: several files, a tokenizer whose class follows from the model's type, tied embeddings
# with heads wider than D / heads, a window, images.
BASE_MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig(**TEXT), {"max_shard_size": "30KB"}),
    "qwen2": (Qwen2Config(**TEXT), {}),
    "qwen3": (Qwen3Config(**TEXT, tie_word_embeddings=True, head_dim=24), {}),
    "mistral": (MistralConfig(**TEXT, sliding_window=8), {}),
    "vit": (ViTConfig(**IMAGES), {}),
}
# 64 experts of which a row takes three: most of them are chosen by nobody.
MANY = {"experts": 64, "width": 8, "top_k": 3}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qwen3", {}),
    "attention": ("llama", {"adapters": {"attention": ["q_proj", "v_proj"], "rank": 4, "moe": MANY}}),
    "rescaled": ("qwen2", {"method": {"name": "flame", "rescaler_scope": "layer"}}),
    "images": ("vit", {}),
    "personal": ("mistral", {"method": {"name": "local-only"}}),
    "bfloat16": ("qwen3", {"foundation": {"dtype": "bfloat16"}}),
}


@dataclass(frozen=True)
class Exported:
    """A run, and the folders of its tiers' models (or of two clients' own) with what the run itself puts out there."""

    name: str
    parts: Parts
    run: TrainedRun
    selections: dict[str, Selection]
    folders: dict[str, Path]
    logits: dict[str, Tensor]

    @property
    def task(self) -> str:
        return self.run.outline.task

    def load(self, label: str, **options: Any) -> Any:
        return FACTORIES[self.task].from_pretrained(self.folders[label], trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model-folders")
    write_inputs(root)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    for name, (config, options) in BASE_MODELS.items():
        torch.manual_seed(0)
        task = "image_classification" if name == "vit" else "causal_lm"
        FACTORIES[task].from_config(config).save_pretrained(root / name, **options)
        if name != "vit":
            tokenizer.save_pretrained(root / name)
    use_private_modules()
    return root


@pytest.fixture(scope="module")
def exports(root: Path) -> Callable[[str], Exported]:
    """Makes one of `RUNS` and exports it, once."""
    return cache(partial(export, root))


@pytest.fixture(scope="module", params=RUNS)
def exported(request: pytest.FixtureRequest, exports: Callable[[str], Exported]) -> Exported:
    return exports(request.param)


def export(root: Path, name: str) -> Exported:
    base, changes = RUNS[name]
    config = dense_config(root, base, name, changes)
    # Far from zero, so that experts matter and tiers differ.
    parts, run = random_run(config, spread=0.2), open_run(run_folder(config))
    chosen = {label.replace(" ", "-"): run.select(label) for label in run.tiers}
    if run.spec.method.personal_models:
        chosen = {f"client-{i}": run.select(client=run.clients[i].name) for i in (0, 4)}
    folders = {label: root / "folders" / f"{name}-{label}" for label in chosen}
    for label, selection in chosen.items():
        folders[label].mkdir(parents=True)
        write_model_folder(Request(run, selection, folders[label], base))
    return Exported(name, parts, run, chosen, folders, {label: own_logits(parts, one) for label, one in chosen.items()})


def near(name: str, found: Tensor, expected: Tensor) -> bool:
    """Whether logits are a run's. With 8 bits of mantissa, near-equal experts may change places: there on average."""
    if name == "bfloat16":
        return float((found - expected).abs().mean()) <= 0.02
    return apart(found, expected) <= TOLERANCE


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


def test_logits_are_the_runs_at_every_tier(exported: Exported) -> None:
    for label, expected in exported.logits.items():
        model = exported.load(label)
        assert next(model.parameters()).dtype == getattr(torch, exported.run.config.foundation.dtype)
        assert not model.training and model.config.model_type == "fft_moe"
        assert near(exported.name, their_logits(model, exported.parts), expected)
    # What tells tiers and clients apart is in the folders.
    first, *rest = exported.logits.values()
    assert rest and every(float((one - first).abs().mean()) > 0.1 for one in rest)


def test_what_is_in_a_folder(exported: Exported) -> None:
    base, run, auto = tensors_of(exported.run.model), exported.run, FACTORIES[exported.task].__name__
    for label, folder in exported.folders.items():
        tensors = tensors_of(folder)
        added = {name for name in tensors if ".mlp.adapter_experts." in name}
        assert sorted(name.rpartition(".")[2] for name in added) == ["inner"] * 2 + ["outer"] * 2 + ["router"] * 2
        if exported.task == "causal_lm":
            # Files of ViT have the names from before transformers 5.
            assert tensors.keys() - added == base.keys()
            changed = {name for name in base if not torch.equal(tensors[name], base[name])}
            assert changed == {name for name in base if name.split(".")[-2] in run.config.adapters.attention}
        config = json.loads((folder / "config.json").read_text())
        assert config["adapter_moe"]["top_k"] == exported.selections[label].assignment.cap
        assert config["auto_map"][auto] == f"modeling_fft_moe.{config['architectures'][0]}"
        assert (folder / "modeling_fft_moe.py").read_bytes() == CODE.read_bytes()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_the_tokenizer_is_the_runs(exported: Exported) -> None:
    ours, text = exported.parts.foundation.tokenizer, "w0  w11\n### Response:\n é"
    for folder in exported.folders.values() if ours is not None else ():
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert type(theirs) is type(ours) and theirs(text)["input_ids"] == ours(text)["input_ids"]


def test_it_generates_saves_and_converts(exported: Exported, tmp_path: Path) -> None:
    label = next(iter(exported.folders))
    model, factory = exported.load(label), FACTORIES[exported.task]
    expected = their_logits(model, exported.parts)
    model.save_pretrained(tmp_path / "saved")
    again = factory.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    weights = model.state_dict()
    assert again.state_dict().keys() == weights.keys()
    assert every(torch.equal(value, weights[key]) for key, value in again.state_dict().items())
    # Not to the bit: products of weights that lie elsewhere in memory may add up in another order.
    assert torch.allclose(their_logits(again, exported.parts), expected, atol=1e-6)
    half = exported.load(label, dtype=torch.bfloat16)
    assert every(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    assert torch.isfinite(their_logits(half, exported.parts)).all()
    if exported.task == "causal_lm":
        ids = torch.from_numpy(IDS)[:1, :5]
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        for one in (model, half):
            assert one.generate(ids, **asked).shape == (1, 13)
        cached, whole = (model.generate(ids, use_cache=use_cache, **asked) for use_cache in (True, False))
        assert torch.equal(cached, whole)


def test_the_topology_leaves_no_trace(exports: Callable[[str], Exported], tmp_path: Path) -> None:
    """A checkpoint of four expert-parallel ranks, each of which wrote its two experts, and the first one the router."""
    made = exports("plain")
    whole = {key: value for key, _, value in made.parts.state.adapters.items(0)}
    files: dict[str, dict[str, Tensor]] = {f"adapters-{shard:05d}-of-00004.safetensors": {} for shard in range(4)}
    for key, value in whole.items():
        found = re.search(r"\.experts\.(\d)\.", key)
        files[f"adapters-{int(found[1]) // 2 if found else 0:05d}-of-00004.safetensors"][key] = value.contiguous()
    folder = tmp_path / "run"
    writer = CheckpointWriter(folder / "checkpoints", made.parts.runtime, 1, background=False)
    writer.begin(made.run.snapshot, files, {"config.yaml": made.parts.config_text})
    writer.finish()
    shutil.copy(made.run.folder / "metrics.jsonl", folder)
    run, out = open_run(folder), tmp_path / "out"
    out.mkdir()
    write_model_folder(Request(run, run.select("2"), out, "qwen3"))
    assert every((out / path.name).read_bytes() == path.read_bytes() for path in made.folders["2"].iterdir())


def test_it_trains_on(exports: Callable[[str], Exported]) -> None:
    made = exports("attention")
    model = copy.deepcopy(made.load("3")).train()
    model.gradient_checkpointing_enable()
    ids = torch.from_numpy(IDS)
    before = model(input_ids=ids, labels=ids).loss
    before.backward()
    experts = model.model.layers[0].mlp.adapter_experts
    for name in ("router", "inner", "outer"):
        got = getattr(experts, name).grad.flatten(1).any(1)
        assert bool(got.any()) and (name == "router" or not bool(got.all())), "of 64 experts some were chosen by nobody"
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter -= 0.01 * parameter.grad
        assert float(model(input_ids=ids, labels=ids).loss) < float(before.detach())


def test_several_files(exports: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, label = exports("images"), "4"
    monkeypatch.setattr(shards, "LARGEST", 20_000)
    write_model_folder(Request(made.run, made.selections[label], tmp_path, "vit"))
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) > 3 and places.keys() == tensors_of(made.folders[label]).keys()
    model = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)
    assert near("images", their_logits(model, made.parts), made.logits[label])


def test_a_new_model_adds_nothing(root: Path, tmp_path: Path) -> None:
    """Without weights the experts begin as in a run: V is zero. So they do where files lack them, and transformers says so."""
    moe = {"base": "llama", "experts": 4, "width": 8, "top_k": 2}
    classes = {"AutoConfig": "FFTMoEConfig", "AutoModelForCausalLM": "FFTMoEForCausalLM"}
    tree = json.loads((root / "llama" / "config.json").read_text())
    tree |= {
        "model_type": "fft_moe",
        "adapter_moe": moe,
        "auto_map": {key: f"modeling_fft_moe.{value}" for key, value in classes.items()},
    }
    folder = tmp_path / "new"
    shutil.copytree(root / "llama", folder)
    (folder / "config.json").write_text(json.dumps(tree))
    shutil.copyfile(CODE, folder / CODE.name)
    ids, plain = torch.arange(2, 14)[None], AutoModelForCausalLM.from_pretrained(root / "llama")
    model, told = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert len(told["missing_keys"]) == 6 and not told["unexpected_keys"]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    for one in (model, fresh):
        experts = one.model.layers[1].mlp.adapter_experts
        assert bool(experts.router.any()) and bool(experts.inner.any()) and not bool(experts.outer.any())
        assert float(experts.inner.detach().abs().max()) <= 32**-0.5


WRONG = {
    "adapter_moe: None: expected a section with base, experts, width, top_k": None,
    "expected a section with": {"base": "llama", "experts": 4, "width": 8},
    "base: 'gpt2': expected one of llama": {"base": "gpt2", "experts": 4, "width": 8, "top_k": 2},
    "width: 0: expected a whole number above 0": {"base": "llama", "experts": 4, "width": 0, "top_k": 2},
    "experts: True: expected a whole number above 0": {"base": "llama", "experts": True, "width": 8, "top_k": 1},
    "top_k: 5: more than the 4 experts": {"base": "llama", "experts": 4, "width": 8, "top_k": 5},
}


def test_what_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copyfile(CODE, tmp_path / CODE.name)
    tree = json.loads((root / "llama" / "config.json").read_text())
    tree |= {"model_type": "fft_moe", "auto_map": {"AutoConfig": "modeling_fft_moe.FFTMoEConfig"}}
    for words, section in WRONG.items():
        (tmp_path / "config.json").write_text(json.dumps(tree | {"adapter_moe": section}))
        with pytest.raises(ValueError) as error:
            AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
        assert words in str(error.value), error.value
    # Never as the dense model alone: whoever does not want the code is told.
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert BASES == DENSE


def test_the_command_and_its_card(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label, selection = list(exported.selections.items())[-1]
    which = ["--tier", selection.tier] if selection.client is None else ["--client", selection.client.name]
    out, factory = tmp_path / "out", FACTORIES[exported.task].__name__
    assert command.main([str(exported.run.folder), "--format", "merged", *which, "--out", str(out)]) == 0
    assert "file, and modeling_fft_moe.py" in capsys.readouterr().out
    files = {path.name for path in exported.folders[label].iterdir()}
    assert {path.name for path in out.iterdir()} == files | {"README.md"}
    assert every((out / name).read_bytes() == (exported.folders[label] / name).read_bytes() for name in files)
    card = (out / "README.md").read_text()
    assert f'{factory}.from_pretrained("path/to/this/folder", trust_remote_code=True)' in card
    assert f"adapter experts with a router, {selection.assignment.cap} of them active per token" in card
    assert ("pretrained=path/to/this/folder,trust_remote_code=True" in card) == (exported.task == "causal_lm")
    assert "vllm serve" not in card and "client-0" not in card


@settings(max_examples=40)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 6),
    inner=st.integers(1, 5),
    experts=st.integers(1, 7),
    top_k=st.integers(1, 7),
    seed=st.integers(0, 2**31),
)
def test_the_layer_is_the_equation(rows: int, width: int, inner: int, experts: int, top_k: int, seed: int) -> None:
    """Row by row and expert by expert in float64; what nobody has chosen is not even a number."""
    draw = torch.Generator().manual_seed(seed)
    layer = AdapterExperts(width, AdapterSettings("llama", experts, inner, min(top_k, experts)))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=draw)
    x_BSD = torch.randn(1, rows, width, generator=draw)
    expected_BSD, chosen = by_hand(layer, x_BSD)
    with torch.no_grad():
        for expert in set(range(experts)) - chosen:
            layer.inner[expert] = layer.outer[expert] = torch.nan
        found_BSD = layer(x_BSD)
    assert torch.allclose(found_BSD.double(), expected_BSD, atol=1e-5, rtol=1e-5)


def by_hand(layer: AdapterExperts, x_BSD: Tensor) -> tuple[Tensor, set[int]]:
    """y = sum over the chosen of g_m V_m gelu(U_m x), and who was chosen at all."""
    router, inner, outer = (getattr(layer, name).detach().double() for name in ("router", "inner", "outer"))
    y_BSD, used = torch.zeros_like(x_BSD, dtype=torch.float64), set()
    for s, x_D in enumerate(x_BSD[0].double()):
        z_E = router @ x_D
        chosen = z_E.argsort(descending=True)[: layer.top_k].tolist()
        gates = z_E[chosen].softmax(0)
        for gate, m in zip(gates, chosen, strict=True):
            y_BSD[0, s] += gate * outer[m] @ nn.functional.gelu(inner[m] @ x_D)
        used |= set(chosen)
    return y_BSD, used


ALONE = """
import json, sys
sys.modules["fedmoe_ds"] = None  # importing it is an error
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer
for folder, given, found in json.load(open(sys.argv[1])):
    arrays = {name: torch.from_numpy(value) for name, value in np.load(given).items()}
    factory = AutoModelForCausalLM if "input_ids" in arrays else AutoModelForImageClassification
    model = factory.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        np.save(found, model(**arrays).logits.float().numpy())
    if "input_ids" in arrays:
        text = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("w0 w1", return_tensors="pt")
        assert model.generate(**text, max_new_tokens=3, do_sample=False).shape[1] > text["input_ids"].shape[1]
assert sys.modules["fedmoe_ds"] is None and not [name for name in sys.modules if name.startswith("fedmoe_ds.")]
"""


@pytest.mark.cluster
def test_nothing_of_this_package_is_needed(exports: Callable[[str], Exported], tmp_path: Path) -> None:
    """In a process of its own, in which this package cannot be imported, and from folders that were moved."""
    jobs, expected = [], []
    for name in RUNS:
        made = exports(name)
        label, folder = list(made.folders.items())[-1]
        np.savez(tmp_path / f"{name}.npz", **inputs(made.parts))
        shutil.copytree(folder, tmp_path / name)
        jobs.append((name, f"{name}.npz", f"{name}.npy"))
        expected.append(made.logits[label])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", ALONE, "jobs.json"], cwd=tmp_path, env=environment, check=True, timeout=600)
    for name, logits in zip(RUNS, expected, strict=True):
        found = torch.from_numpy(np.load(tmp_path / f"{name}.npy"))
        assert near(name, found[:, :-1].flatten(0, 1) if found.ndim == 3 else found, logits)


def inputs(parts: Parts) -> dict[str, np.ndarray]:
    """What `their_logits` gives to a model."""
    if parts.foundation.images is None:
        return {"input_ids": IDS}
    held = parts.data.global_holdout()
    return {"pixel_values": np.array(held.select(range(len(held))).pixels)}
