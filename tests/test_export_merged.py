"""A merged export: transformers alone gives the run's own logits, at every tier, for every family and kind of method."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import DIGITS, dense_config, write_dense
from every import every
from federations import make_config, run_alone, write_inputs
from safetensors.torch import load_file, save_file
from test_families import original_rotary
from test_foundation import FAMILIES, save_model
from torch.utils._python_dispatch import TorchDispatchMode
from trained import UNTRAINED, own_logits, random_run, run_folder, their_logits
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from fedmoe_ds.checkpoint.writer import CheckpointWriter
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.export import merged, shards
from fedmoe_ds.export.command import export, main
from fedmoe_ds.export.written import Request
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.foundation import weight_stream
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
    "fedex-lora": {"method": {"name": "fedex-lora"}},
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
# Six channels in a group: no multiple of 16 bytes, which bitwise mode would want.
ALL_GROUPS: dict[str, Any] = {"federation": {"tiers": [{"share": 1.0}]}, "execution": {"reproducible": "fast"}}
GROUPED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {**LAYERS, "foundation": {"convert": {"experts": 8}}}),
    "full": ("llama", {"method": {"name": "fedit"}, "adapters": {"expert_training": "full"}}),
    "images": ("vit", {"data": DIGITS, "method": {"name": "raffm"}, "adapters": {"attention": [], "expert_training": "full"}}),
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
    """Every tier; of personal models, and of personal rescalers, two clients' as well, of a tier that has two."""
    if not run.spec.method.personal_models:
        yield from map(run.select, run.tiers)
    if any(block.personal for block in run.spec.blocks):
        members = max(run.tiers.values(), key=len)
        yield from (run.select(client=client.name) for client in members[:2])


def request(run: TrainedRun, selection: Selection, out: Path) -> Request:
    return Request(run, selection, out, "base")


def load(folder: Path, images: bool = False) -> Any:
    factory: Any = AutoModelForImageClassification if images else AutoModelForCausalLM
    model, facts = factory.from_pretrained(folder, output_loading_info=True)
    assert not any(facts[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), facts
    return model.eval()


def check(config: Config, parts: Parts, folder: Path, alike: bool = False) -> None:
    """Every model of a run: its logits, and that no two of them are alike, nor one of them the base, unless all are `alike`."""
    run, seen = open_run(run_folder(config)), []
    for number, selection in enumerate(selections(run)):
        export("merged", request(run, selection, folder / str(number)))
        with original_rotary():
            theirs_NV = their_logits(load(folder / str(number), parts.foundation.images is not None), parts)
        ours_NV = own_logits(parts, selection)
        difference = float((ours_NV - theirs_NV).abs().max())
        assert difference <= TOLERANCE, (selection, difference)
        seen.append(theirs_NV)
    with original_rotary():
        seen.append(their_logits(load(run.model, parts.foundation.images is not None), parts))
    pairs = [(one, seen[-1]) for one in seen[:-1]] if alike else list(itertools.combinations(seen, 2))
    assert pairs and min(float((one - other).abs().max()) for one, other in pairs) > 1e-3 and seen[-1].abs().max() > 0.3


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


@pytest.mark.parametrize("kind", GROUPED)
def test_groups_of_channels(root: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are dense blocks again, whichever rows of a matrix are read together."""
    monkeypatch.setattr(weight_stream, "BLOCK_BYTES", 1024)
    family, changes = GROUPED[kind]
    convert = {"foundation": {"convert": {"experts": 4}, "cache": str(root / "cache")}}
    config = configure(root, f"groups-{kind}", ALL_GROUPS, convert, changes, family=family)
    parts = random_run(config)
    check(config, parts, tmp_path, alike=kind == "lora")  # a factor of a client, and none of a tier
    told = json.loads((tmp_path / "0" / "config.json").read_text())
    assert "channel_groups" not in told and told["intermediate_size"] == 48
    assert "active experts" not in (tmp_path / "0" / "README.md").read_text(), "nobody who loads it has experts"
    run = open_run(run_folder(config))
    with pytest.raises(UserError, match=r"groups of channels \(foundation.convert\) are parts of a block's matrices; use"):
        export("peft", request(run, next(selections(run)), tmp_path / "peft"))


@pytest.mark.parametrize("method", ["raffm", "flame"])
def test_a_sub_model_of_groups_is_refused(root: Path, method: str, tmp_path: Path) -> None:
    few = {"federation": {"tiers": [{"top_k": 4, "share": 1.0}, {"top_k": 2, "share": 1.0}]}, "method": {"name": method}}
    convert = {"foundation": {"convert": {"experts": 4}, "cache": str(root / "cache")}}
    config = configure(root, f"groups-few-{method}", convert, {"adapters": {"expert_training": "full"}}, few, family="llama")
    random_run(config)
    run = open_run(run_folder(config))
    with pytest.raises(UserError, match=r"^--format: merged: .*tier 2.* and no config.json can say that; export"):
        export("merged", request(run, run.select("2"), tmp_path / "out"))


def test_flora_after_two_rounds(root: Path, tmp_path: Path) -> None:
    config = configure(root, "flora", {"method": {"name": "flora"}, "federation": {"rounds": 2}})
    check(config, run_alone(config).parts, tmp_path, alike=True)  # what ranks bought has moved into one base


def test_names_types_and_what_nobody_trained_stay(root: Path, tmp_path: Path) -> None:
    """The export has the layout of the base's files, in several shards; a tier says its top-k, and only that."""
    config = configure(root, "layout", {"method": {"name": "fedit"}}, family="mixtral")
    random_run(config)
    run = open_run(run_folder(config))
    export("merged", request(run, run.select("1"), tmp_path / "out"))
    base, ours = load_file(run.model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: (value.dtype, value.shape) for name, value in ours.items()} == {
        name: (value.dtype, value.shape) for name, value in base.items()
    }
    changed = {name for name, value in ours.items() if not torch.equal(value, base[name])}
    trained = [expert for expert in range(8) if expert not in UNTRAINED]
    assert changed == {
        *(
            f"model.layers.{n}.block_sparse_moe.experts.{e}.{leaf}.weight"
            for n in (0, 1)
            for e in trained
            for leaf in ("w1", "w2", "w3")
        ),
        *(f"model.layers.{n}.self_attn.{leaf}_proj.weight" for n in (0, 1) for leaf in "qv"),
    }
    theirs = json.loads((run.model / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**theirs, "num_experts_per_tok": 1}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run.model / name).read_bytes()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(AutoTokenizer.from_pretrained(run.model))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_several_shards(root: Path, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "LARGEST", 50_000)
    monkeypatch.setattr(weight_stream, "BLOCK_BYTES", 1024)
    config = configure(root, f"shards-{family}", LAYERS, DEEPSEEK if "deepseek" in family else {}, family=family)
    check(config, random_run(config), tmp_path)
    index = json.loads((tmp_path / "0" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "0").glob("*.safetensors"))
    largest = {path: max(value.nbytes for value in load_file(path).values()) for path in files}
    assert len(files) > 3 and set(index["weight_map"].values()) == {path.name for path in files}
    assert every(sum(value.nbytes for value in load_file(path).values()) <= max(50_000, largest[path]) for path in files)


def test_no_path_of_this_machine_goes_along(root: Path, tmp_path: Path) -> None:
    """transformers 4 has noted in every model and tokenizer that it saved where it was loaded from; the rest of them stays."""
    for family in ("model", "llama"):
        base = tmp_path / family
        shutil.copytree(root / family, base)
        for name in ("config.json", "tokenizer_config.json"):
            noted = {"_name_or_path": str(base), "name_or_path": str(base), "special_tokens_map_file": f"{base}/x.json"}
            settings = json.loads((base / name).read_text())
            (base / name).write_text(
                json.dumps({**settings, **noted, "vision_config": {"_name_or_path": str(base), "depth": 2}})
            )
        changes = {"foundation": {"path": str(base)}, "method": {"name": "fedit"}}
        config = dense_config(root, family, "noted", changes) if family == "llama" else configure(root, "noted", changes)
        random_run(config)
        for fmt in ("merged",) if family == "llama" else ("merged", "peft", "peft-fused"):
            out = tmp_path / f"{family}-{fmt}"
            assert main([str(run_folder(config)), "--format", fmt, "--out", str(out)]) == 0
            files = [path for path in out.rglob("*") if path.is_file()]
            assert files and not [path.name for path in files if str(tmp_path).encode() in path.read_bytes()]
            if fmt == "merged":
                found = json.loads((out / "tokenizer_config.json").read_text())
                assert found["vision_config"] == {"depth": 2} and found.keys() >= settings.keys()
                assert AutoTokenizer.from_pretrained(out).vocab_size


def test_bfloat16(root: Path, tmp_path: Path) -> None:
    """Sums in float64 are rounded once to the base's type, and the export tells how much of the update that took."""
    base = tmp_path / "base"
    shutil.copytree(root / "model", base)
    weights = {name: value.bfloat16() for name, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = configure(root, "bf16", {"foundation": {"path": str(base), "dtype": "bfloat16"}, "method": {"name": "fedit"}})
    parts = random_run(config)
    run = open_run(run_folder(config))
    selection = run.select()
    written = merged.write_merged(request(run, selection, made(tmp_path / "out")))
    found, name = load_file(tmp_path / "out" / "model.safetensors"), "model.layers.1.mlp.experts.3.up_proj.weight"
    a, b = (parts.state.adapters.client(f"experts.gate_up.lora_{half}", 0)[1, 3] for half in "AB")
    exact = weights[name].double() + 2.0 * (b[16:].double() @ a.double())
    assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], exact.bfloat16())
    assert written.notes[0].startswith(
        "rounding: the base's weights are BF16, and so are these; what rounding has changed has 0.0"
    )
    assert written.loading.endswith(f"\n\nR{written.notes[0][1:]}.")
    with original_rotary():
        theirs_NV = their_logits(load(tmp_path / "out"), parts)
    ours_NV = own_logits(parts, selection)
    distance_N = (ours_NV - theirs_NV).norm(dim=1) / ours_NV.norm(dim=1)
    assert 1e-4 < distance_N.median() < 0.03, distance_N


@pytest.mark.parametrize(("method", "shards"), [("flame", 2), ("flora-merged", 4)])
def test_the_topology_leaves_no_trace(root: Path, method: str, shards: int, tmp_path: Path) -> None:
    """The files of several expert-parallel ranks, each with its own experts, and the first one with all that is dense."""
    parts = random_run(configure(root, f"split-{method}", METHODS[method]))
    run = open_run(run_folder(parts.config))
    files: dict[str, dict[str, torch.Tensor]] = {}
    for path in run.checkpoint.glob("*.safetensors"):
        content = load_file(path)
        # Whose rows they are, every file of them says.
        rows = {key: content.pop(key) for key in ("clients",) if key in content}
        for key, value in content.items():
            found = re.search(r"\.experts\.(\d)\.", key)
            shard = int(found[1]) * shards // 8 if found else 0
            name = path.name.replace("00000-of-00001.safetensors", f"{shard:05d}-of-{shards:05d}.safetensors")
            files.setdefault(name, dict(rows))[key] = value
    assert len(files) > shards
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", parts.runtime, 1, background=False)
    writer.begin(run.snapshot, files, {"config.yaml": parts.config_text})
    writer.finish()
    shutil.copy(run.folder / "metrics.jsonl", tmp_path / "run")
    for one, name in ((run, "whole"), (open_run(tmp_path / "run"), "split")):
        export("merged", request(one, one.select("2"), tmp_path / name))
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert every((tmp_path / "split" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_a_converted_base(root: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(root / "model", base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    config = configure(root, "pickled", LAYERS, {"foundation": {"path": str(base)}})
    check(config, random_run(config), tmp_path)
    assert not (tmp_path / "0" / "conversion.json").exists()


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations have made, while somebody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        # What a file's mapping is given to is no memory of its own.
        mapped = function is torch.ops.aten.set_.source_Storage
        if isinstance(result, torch.Tensor) and not mapped and result.untyped_storage().data_ptr() not in given:
            self.now += (size := result.untyped_storage().nbytes())
            self.most = max(self.most, self.now)
            weakref.finalize(result, self.gone, size)
        return result

    def gone(self, size: int) -> None:
        self.now -= size


def test_memory_holds_a_block_and_not_a_model(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = 2048
    monkeypatch.setattr(weight_stream, "BLOCK_BYTES", block)
    config = configure(root, "streamed", LAYERS)
    random_run(config)
    run = open_run(run_folder(config))
    with Alive() as alive:
        merged.write_merged(request(run, run.select(), made(tmp_path / "out")))
    sizes = [value.nbytes for value in load_file(tmp_path / "out" / "model.safetensors").values()]
    # A block in float64, the rounded one, the rows of B and A in float64.
    assert block < alive.most <= 6 * block < max(sizes) < sum(sizes) / 5, (alive.most, max(sizes), sum(sizes))


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_what_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(root, "refused", {"method": {"name": "fedsa-lora"}})
    random_run(config)
    run = open_run(run_folder(config))
    own = run.select(client=run.clients[0].name)
    with pytest.raises(UserError, match=r"--format: merged: method fedsa-lora has a model for every client .* name a --client"):
        export("merged", request(run, run.select(), tmp_path / "out"))
    masked = dataclasses.replace(own, assignment=dataclasses.replace(own.assignment, allowed_LE=np.ones((2, 8), dtype=bool)))
    with pytest.raises(UserError, match=r"method fedsa-lora lets its client use some of the experts alone"):
        export("merged", request(run, masked, tmp_path / "out"))
    extra = dataclasses.replace(run.spec.blocks[0], name="elsewhere.lora_A")
    odd = dataclasses.replace(run, spec=dataclasses.replace(run.spec, blocks=[*run.spec.blocks, extra]))
    with pytest.raises(UserError, match=r"the base model has no weight that elsewhere\.lora_A could move into"):
        export("merged", request(odd, own, tmp_path / "out"))
    monkeypatch.setattr(merged.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**10}))
    with pytest.raises(UserError, match=r"--out: .*: 0\.0 GiB are free, and the model takes 0\.0; make room"):
        export("merged", request(run, own, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
