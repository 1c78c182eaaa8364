"""FFT-MoE as a model folder with code of its own: the run's logits at every tier, loaded by transformers alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import IMAGES, TEXT, dense_config
from every import every
from federations import Result, run_alone, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    ViTConfig,
)

from fedmoe_ds.errors import UserError
from fedmoe_ds.export import command, model_folder
from fedmoe_ds.export.modeling_fft_moe import BASES, AdapterExperts, AdapterSettings
from fedmoe_ds.foundation.dense import DENSE
from fedmoe_ds.foundation.own_code import use_private_modules
from fedmoe_ds.results import Selection, TrainedRun, open_run

TOLERANCE = 1e-5
FACTORIES: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "image_classification": AutoModelForImageClassification,
}

# Every base stands for one more thing: several files, tied embeddings with heads wider than D / heads, a window, images.
BASE_MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig(**TEXT), {"max_shard_size": "30KB"}),
    "qwen3": (Qwen3Config(**TEXT, tie_word_embeddings=True, head_dim=24), {}),
    "mistral": (MistralConfig(**TEXT, sliding_window=8), {}),
    "vit": (ViTConfig(**IMAGES), {}),
}
SHORT: dict[str, Any] = {
    "federation": {"rounds": 1},
    # Far in two steps: V begins at zero, and a missing expert has to show.
    "local": {"max_steps": 2, "lr": 5e-2},
    "evaluation": {"client_sequences": 0, "max_sequences": 1},
}
# 64 experts of which a row takes three: most of them are chosen by nobody.
MANY = {"experts": 64, "width": 8, "top_k": 3}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qwen3", {}),
    "attention": ("llama", {"adapters": {"attention": ["q_proj", "v_proj"], "rank": 4, "moe": MANY}}),
    "rescaled": ("mistral", {"method": {"name": "flame", "rescaler_scope": "layer"}}),
    "images": ("vit", {}),
    "personal": ("llama", {"method": {"name": "local-only"}}),
    "bfloat16": ("qwen3", {"foundation": {"dtype": "bfloat16"}}),
}


@dataclass(frozen=True)
class Exported:
    """A run, and the folders of its tiers' models (or of two clients' own) with what the run itself puts out there."""

    name: str
    result: Result
    run: TrainedRun
    folders: dict[str, Path]
    logits: dict[str, list[Tensor]]

    @property
    def task(self) -> str:
        return self.run.outline.task

    def load(self, label: str, **options: Any) -> Any:
        return FACTORIES[self.task].from_pretrained(self.folders[label], trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
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
    yield root


@pytest.fixture(scope="module")
def exports(root: Path) -> Callable[[str], Exported]:
    """Runs one of `RUNS` and exports it, once."""
    return cache(partial(export, root))


@pytest.fixture(scope="module", params=RUNS)
def exported(request: pytest.FixtureRequest, exports: Callable[[str], Exported]) -> Exported:
    return exports(request.param)


def export(root: Path, name: str) -> Exported:
    base, changes = RUNS[name]
    result = run_alone(dense_config(root, base, name, SHORT, changes))
    run = open_run(root / "runs" / f"{base}-{name}")
    selections = {label: run.select(label) for label in run.tiers}
    if name == "personal":
        selections = {f"client {i}": run.select(client=run.clients[i].name) for i in (0, 4)}
    folders, logits = {}, {}
    for label, selection in selections.items():
        folders[label] = root / "folders" / f"{name}-{label.replace(' ', '-')}"
        folders[label].mkdir(parents=True)
        model_folder.write(run, selection, folders[label])
        logits[label] = engine_logits(result, selection)
    return Exported(name, result, run, folders, logits)


def samples(result: Result) -> Any:
    """A few of the hold-out's, every token of which is a target."""
    held = result.parts.data.global_holdout().select(range(3))
    return held if held.labels is not None else replace(held, loss_mask=[np.arange(len(ids)) > 0 for ids in held.input_ids])


@torch.no_grad()
def engine_logits(result: Result, selection: Selection) -> list[Tensor]:
    """The run's own, sample by sample: of a text at every position that predicts."""
    evaluator, part = result.parts.evaluator, samples(result)
    personal, member = result.parts.state.personal, selection.members[0]
    if selection.client is None:
        evaluator._load_mean(list(selection.members), personal, False)
    else:
        evaluator._load_own(member, personal)
    how = evaluator._assigned(member, personal, False)
    with evaluator._receiving(how):
        found = evaluator._pass([part], how).logits_NV
    return list(found.split([len(ids) - 1 for ids in part.input_ids] if part.labels is None else 1))


@torch.no_grad()
def folder_logits(model: Any, result: Result) -> list[Tensor]:
    """The same of a model of transformers, every sample by itself."""
    part = samples(result)
    if part.labels is not None:
        return [model(pixel_values=torch.from_numpy(np.array(pixels))[None]).logits.float() for pixels in part.pixels]
    return [model(input_ids=torch.from_numpy(np.array(ids))[None]).logits[0, :-1].float() for ids in part.input_ids]


def furthest(found: list[Tensor], expected: list[Tensor]) -> float:
    assert [one.shape for one in found] == [one.shape for one in expected]
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))


def test_logits_are_the_runs_at_every_tier(exported: Exported) -> None:
    tolerance = 0.05 if exported.name == "bfloat16" else TOLERANCE
    seen = []
    for label, expected in exported.logits.items():
        model = exported.load(label)
        assert next(model.parameters()).dtype == getattr(torch, exported.run.config.foundation.dtype)
        assert not model.training and model.config.model_type == "fft_moe"
        found = folder_logits(model, exported.result)
        assert furthest(found, expected) <= tolerance
        seen.append(found)
    # What tells tiers and clients apart is in the folders.
    assert len(seen) > 1 and every(furthest(one, seen[0]) > 10 * TOLERANCE for one in seen[1:])


def test_what_is_in_a_folder(exported: Exported) -> None:
    base, run = exported.run.model, exported.run
    stored = {file: load_file(file) for folder in (base, *exported.folders.values()) for file in folder.glob("*.safetensors")}
    of_base = {name: value for file, tensors in stored.items() if file.parent == base for name, value in tensors.items()}
    projections = [f"{name}.weight" for name in run.config.adapters.attention]
    for label, folder in exported.folders.items():
        tensors = {name: value for file, held in stored.items() if file.parent == folder for name, value in held.items()}
        added = {name for name in tensors if ".adapter_experts." in name}
        assert len(added) == 2 * 3 and every(name.rpartition(".")[2] in ("router", "inner", "outer") for name in added)
        kept = tensors.keys() - added
        if exported.task == "causal_lm":
            assert kept == of_base.keys()
            same = {name for name in kept if torch.equal(tensors[name], of_base[name])}
            assert kept - same == {name for name in kept if name.endswith(tuple(projections))} if projections else kept == same
        config = json.loads((folder / "config.json").read_text())
        cap = (
            run.tiers[label][0].cap
            if label in run.tiers
            else run.select(client=run.clients[int(label[-1])].name).members[0].cap
        )
        assert config["adapter_moe"]["top_k"] == cap and config["architectures"] == [
            config["auto_map"][FACTORIES[exported.task].__name__].partition(".")[2]
        ]
        assert (folder / "modeling_fft_moe.py").read_bytes() == model_folder.CODE.read_bytes()
        texts = [path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".py", ".md", ".jinja")]
        assert every("client-0" not in text for text in texts), "no client's name leaves the run"


def test_the_tokenizer_is_the_runs(exported: Exported) -> None:
    if exported.task != "causal_lm":
        return
    ours = exported.result.parts.foundation.tokenizer
    for folder in exported.folders.values():
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert (
            type(theirs) is type(ours)
            and theirs("w0 w11 ### Response:\n")["input_ids"] == ours("w0 w11 ### Response:\n")["input_ids"]
        )


def test_it_generates_saves_and_converts(exported: Exported, tmp_path: Path) -> None:
    label = next(iter(exported.folders))
    model = exported.load(label)
    expected = folder_logits(model, exported.result)
    if exported.task == "causal_lm":
        ids = torch.from_numpy(np.array(samples(exported.result).input_ids[0]))[None, :5]
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        cached, whole = (model.generate(ids, use_cache=use_cache, **asked) for use_cache in (True, False))
        assert cached.shape[1] > 5 and torch.equal(cached, whole)
    model.save_pretrained(tmp_path / "saved")
    again = FACTORIES[exported.task].from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert furthest(folder_logits(again, exported.result), expected) == 0.0
    if exported.name == "images":
        return
    half = exported.load(label, dtype=torch.bfloat16)
    assert every(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    spread = max(float(one.abs().max()) for one in expected)
    assert furthest(folder_logits(half, exported.result), expected) < 0.1 * spread


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
    shutil.copyfile(model_folder.CODE, folder / model_folder.CODE.name)
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
    shutil.copyfile(model_folder.CODE, tmp_path / model_folder.CODE.name)
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
    label, folder = list(exported.folders.items())[-1]
    which = ["--tier", label] if label in exported.run.tiers else ["--client", exported.run.clients[int(label[-1])].name]
    out = tmp_path / "out"
    assert command.main([str(exported.run.folder), "--format", "merged", *which, "--out", str(out)]) == 0
    assert ": a model with code of its own" in capsys.readouterr().out
    files = {path.name for path in folder.iterdir()}
    assert {path.name for path in out.iterdir()} - files == {"README.md"}
    assert every((out / name).read_bytes() == (folder / name).read_bytes() for name in files)
    card = (out / "README.md").read_text()
    factory, cap = FACTORIES[exported.task].__name__, json.loads((out / "config.json").read_text())["adapter_moe"]["top_k"]
    assert f'{factory}.from_pretrained("path/to/this/folder", trust_remote_code=True)' in card
    assert f"adapter experts with a router, {cap} of them active per token" in card and "vllm serve" not in card
    assert ("lm_eval --model hf --model_args pretrained=path/to/this/folder,trust_remote_code=True" in card) == (
        exported.task == "causal_lm"
    )
    assert "client-0" not in card


def test_no_model_of_a_tier_where_clients_have_their_own(root: Path, tmp_path: Path) -> None:
    run = open_run(root / "runs" / "llama-personal")
    with pytest.raises(UserError, match="local-only has a model for every client and none for all; name one by --client"):
        model_folder.write(run, run.select("4"), tmp_path)
    assert list(tmp_path.iterdir()) == []


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
for folder, kind, samples in json.load(open(sys.argv[1])):
    factory = AutoModelForImageClassification if kind == "pixel_values" else AutoModelForCausalLM
    model = factory.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad(), np.load(samples) as given:
        found = [model(**{kind: torch.from_numpy(given[name])[None]}).logits[0].float().numpy() for name in given.files]
    np.savez(samples + ".out.npz", *found)
    if kind == "input_ids":
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
        part = samples(made.result)
        given, kind = (part.input_ids, "input_ids") if part.labels is None else (list(part.pixels), "pixel_values")
        for label, folder in made.folders.items():
            moved = tmp_path / f"{name}-{label}"
            shutil.copytree(folder, moved)
            np.savez(tmp_path / f"{moved.name}.npz", *map(np.array, given))
            jobs.append((str(moved), kind, f"{moved}.npz"))
            expected.append((0.05 if name == "bfloat16" else TOLERANCE, made.logits[label]))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", ALONE, "jobs.json"], cwd=tmp_path, env=environment, check=True, timeout=600)
    for (_, kind, given_file), (tolerance, logits) in zip(jobs, expected, strict=True):
        with np.load(given_file + ".out.npz") as out:
            found = [torch.from_numpy(out[name]) for name in out.files]
        found = [one[:-1] for one in found] if kind == "input_ids" else [one[None] for one in found]
        assert furthest(found, logits) <= tolerance
