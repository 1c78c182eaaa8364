"""Broken model folders: each ends in one line that names the folder or file, what is wrong and what helps, and no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federations import alone
from launching import changed, run
from safetensors.torch import load_file, save_file
from test_foundation import EXPERTS, FAMILIES, FFN, VOCAB, edit_config, save_model

from fedmoe_ds.config import Config, FoundationConfig
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.build import load_shared_foundation
from fedmoe_ds.foundation import load_foundation, planned_sparse, planned_task
from fedmoe_ds.foundation.weight_files import WeightFiles

WEIGHTS, INDEX, CONFIG, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
NORM = "model.norm.weight"

Break = Callable[[Path], None]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`: weights in one file; `sharded`: in several."""
    root = tmp_path_factory.mktemp("sound")
    for name, options in (("whole", {}), ("sharded", {"max_shard_size": "30KB"})):
        save_model(FAMILIES["olmoe"][0](), root / name, **options)
        train_tokenizer(["import this"], VOCAB).save_pretrained(root / name)
    return root


def start(folder: Path) -> None:
    """What a run does with `foundation.path`, up to the loaded model."""
    config = Config.model_validate({"name": "x", "foundation": {"path": str(folder), "cache": str(folder / "cache")}})
    planned_task(config.foundation), planned_sparse(config.foundation)
    load_shared_foundation(config, *alone(), SimpleNamespace(note=lambda line: None))  # type: ignore[arg-type]


def write(name: str, content: str | bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def remove(*names: str) -> Break:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def cut(name: str) -> Break:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def folder_in_place(name: str) -> Break:
    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return replace


def config(**changes: Any) -> Break:
    return lambda folder: edit_config(folder, **changes)


def no_key(key: str) -> Break:
    def remove(folder: Path) -> None:
        tree = json.loads((folder / CONFIG).read_text())
        del tree[key]
        (folder / CONFIG).write_text(json.dumps(tree))

    return remove


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    def edit(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return edit


def poison(name: str, value: float) -> Break:
    return tensors(lambda weights: weights[name].view(-1)[-1:].fill_(value))


def header(folder: Path) -> None:
    """Bytes in the middle of the header's JSON that are none."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[40:60] = b"\xff" * 20
    (folder / WEIGHTS).write_bytes(data)


def header_of_size(size: int) -> Break:
    """The first eight bytes of a safetensors file say how long its header is."""
    return lambda folder: write(WEIGHTS, size.to_bytes(8, "little") + (folder / WEIGHTS).read_bytes()[8:])(folder)


def index(change: Callable[[dict[str, Any]], Any]) -> Break:
    def edit(folder: Path) -> None:
        tree = json.loads((folder / INDEX).read_text())
        change(tree)
        (folder / INDEX).write_text(json.dumps(tree))

    return edit


def shard(position: int, change: Callable[[Path], None]) -> Break:
    return lambda folder: change(sorted(folder.glob("model-*.safetensors"))[position])


def move_to_another_shard(tree: dict[str, Any]) -> None:
    places = tree["weight_map"]
    places[NORM] = next(file for file in places.values() if file != places[NORM])


def tokenizer_of(size: int) -> Break:
    def replace(folder: Path) -> None:
        train_tokenizer([" ".join(map(str, range(3000)))], size).save_pretrained(folder)

    return replace


def token_ids_beyond(folder: Path) -> None:
    tree = json.loads((folder / TOKENIZER).read_text())
    words = tree["model"]["vocab"]
    words[max(words, key=lambda word: words[word])] = 5000
    (folder / TOKENIZER).write_text(json.dumps(tree))


NO_TOKENIZER = (TOKENIZER, "tokenizer_config.json")
# name: (which sound model, how it is broken, what the line says)
CASES: dict[str, tuple[str, Break, str]] = {
    "no config": ("whole", remove(CONFIG), r"holds no config\.json; give a Hugging Face model folder"),
    "empty config": ("whole", write(CONFIG, ""), r"config\.json cannot be used: "),
    "cut config": ("whole", cut(CONFIG), r"config\.json cannot be used: "),
    "binary config": ("whole", write(CONFIG, b"\xff\xfe\x00\x81"), r"config\.json cannot be used: "),
    "config is a list": ("whole", write(CONFIG, "[1]"), r"config\.json cannot be used: "),
    "config is a number": ("whole", write(CONFIG, "3"), r"config\.json cannot be used: "),
    "config is a folder": ("whole", folder_in_place(CONFIG), r"holds no config\.json"),
    "config without a type": ("whole", no_key("model_type"), r"config\.json cannot be used: .*model_type"),
    "unknown type": ("whole", config(model_type="gpt9"), r"config\.json cannot be used: .*gpt9"),
    "type is a number": ("whole", config(model_type=7), r"config\.json cannot be used: "),
    "code of its own": (
        "whole",
        config(model_type="mine", auto_map={"AutoConfig": "configuration_mine.MineConfig"}),
        r"its model is Python code of this folder, and a model's code is never run; give a model of a family",
    ),
    "another family": ("whole", config(model_type="gpt2"), r"model_type 'gpt2' is neither a known"),
    "width is a word": ("whole", config(hidden_size="wide"), r"config\.json cannot be used: .*hidden_size"),
    "width is negative": ("whole", config(hidden_size=-32), r"config\.json"),
    "width is zero": ("whole", config(hidden_size=0), r"config\.json"),
    "width does not fit heads": ("whole", config(num_attention_heads=5), r"config\.json|has shape"),
    "no layers": ("whole", config(num_hidden_layers=0), r"config\.json|no place|no MoE"),
    "fewer layers": ("whole", config(num_hidden_layers=1), r"has no place in a 'olmoe' model; config and weights"),
    "more layers": ("whole", config(num_hidden_layers=3), r"no tensor 'model\.layers\.2.*; get the whole model"),
    "no experts": ("whole", config(num_experts=0), r"config\.json|experts"),
    "more experts": ("whole", config(num_experts=16), r"no tensor|has shape .* belong to different models"),
    "more experts per token": ("whole", config(num_experts_per_tok=9), r"top_k=9 exceeds num_experts=8"),
    "no expert per token": ("whole", config(num_experts_per_tok=0), r"num_experts_per_tok: 0"),
    "padding beyond": ("whole", config(pad_token_id=VOCAB + 7), r"config\.json"),
    "larger vocabulary": ("whole", config(vocab_size=VOCAB * 2), r"has shape .* config\.json implies .*different models"),
    "unknown activation": ("whole", config(hidden_act="swoosh"), r"config\.json.*swoosh"),
    "quantised": ("whole", config(quantization_config={"quant_method": "fp8"}), r"the weights are quantised; give a model"),
    "no weights": ("whole", remove(WEIGHTS), r"holds no model\.safetensors; save the model with safetensors"),
    "empty weights": ("whole", write(WEIGHTS, ""), r"model\.safetensors: damaged weight file: .*; get the file again"),
    "cut weights": ("whole", cut(WEIGHTS), r"model\.safetensors: damaged weight file: "),
    "corrupt header": ("whole", header, r"model\.safetensors: damaged weight file: "),
    "text for weights": ("whole", write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), r"damaged weight file: "),
    "weights are a folder": ("whole", folder_in_place(WEIGHTS), r"model\.safetensors"),
    "no tensor": ("whole", tensors(lambda weights: weights.pop(NORM)), r"no tensor 'model\.norm\.weight'; get the whole"),
    "no expert": ("whole", tensors(lambda weights: weights.pop(EXPERT)), rf"no tensor '{EXPERT}'; get the whole"),
    "surplus tensor": (
        "whole",
        tensors(lambda weights: weights.update({"model.layers.0.mlp.gate.bias": torch.ones(EXPERTS)})),
        r"'model\.layers\.0\.mlp\.gate\.bias' has no place in a 'olmoe' model",
    ),
    "wrong shape": (
        "whole",
        tensors(lambda weights: weights.update({NORM: torch.ones(7)})),
        r"'model\.norm\.weight' has shape \(7,\), config\.json implies \(32,\)",
    ),
    "wrong expert": (
        "whole",
        tensors(lambda weights: weights.update({EXPERT: torch.ones(FFN, 7)})),
        rf"'{EXPERT}' has shape \(16, 7\), config\.json implies \(16, 32\)",
    ),
    "whole numbers": (
        "whole",
        tensors(lambda weights: weights.update({NORM: torch.ones(32, dtype=torch.int8)})),
        r"'model\.norm\.weight' is torch\.int8; give weights that are not quantised",
    ),
    "NaN": ("whole", poison(NORM, float("nan")), r"'model\.norm\.weight' .*not finite; get the file again"),
    "NaN in an expert": ("whole", poison(EXPERT, float("nan")), rf"'{EXPERT}' .*not finite; get the file again"),
    "infinity": ("whole", poison("lm_head.weight", float("-inf")), r"'lm_head\.weight' .*not finite"),
    "missing shard": ("sharded", shard(1, Path.unlink), r"00002-of-.*: missing weight file; get the whole model"),
    "empty shard": ("sharded", shard(-1, lambda file: os.truncate(file, 0)), r"damaged weight file: "),
    "cut shard": ("sharded", shard(0, lambda file: os.truncate(file, 500)), r"damaged weight file: "),
    "empty index": ("sharded", write(INDEX, ""), r"index\.json: cannot be read: "),
    "index is a list": ("sharded", write(INDEX, "[]"), r"index\.json: holds no weight_map"),
    "index without a map": ("sharded", index(lambda tree: tree.pop("weight_map")), r"index\.json: holds no weight_map"),
    "map is a list": ("sharded", index(lambda tree: tree.update(weight_map=[1])), r"index\.json: holds no weight_map"),
    "map names a number": (
        "sharded",
        index(lambda tree: tree["weight_map"].update({NORM: 3})),
        r"index\.json: weight_map: 'model\.norm\.weight': 3: no file",
    ),
    "map leads out": (
        "sharded",
        index(lambda tree: tree["weight_map"].update({NORM: "../other.safetensors"})),
        r"index\.json: weight_map: 'model\.norm\.weight': \.\./other\.safetensors: no file",
    ),
    "map lacks a tensor": (
        "sharded",
        index(lambda tree: tree["weight_map"].pop(NORM)),
        r"index\.json: no tensor 'model\.norm\.weight'",
    ),
    "map names another shard": ("sharded", index(move_to_another_shard), r"tensor 'model\.norm\.weight' cannot be read"),
    "index and one file": (
        "sharded",
        lambda folder: save_file({NORM: torch.ones(32)}, folder / WEIGHTS),
        r"holds both model\.safetensors and model\.safetensors\.index\.json.*remove",
    ),
    "no tokenizer": ("whole", remove(*NO_TOKENIZER), r"holds no tokenizer; save the model's tokenizer in the same folder"),
    "no tokenizer but its settings": ("whole", remove(TOKENIZER), r"holds no tokenizer; save the model's tokenizer"),
    **{
        f"weights with a header of {size} bytes": (
            "whole",
            header_of_size(size),
            r"model\.safetensors: damaged weight file: \S.*; get",
        )
        for size in (0, 1, 100, 2**31, 2**40, 2**62, 2**63, 2**64 - 1)
    },
    **{
        f"{name} of {levels} levels": (
            which,
            write(name, "[" * levels + "]" * levels),
            rf"{re.escape(name)}.*nested deeper than 64",
        )
        for which, name in (("whole", CONFIG), ("sharded", INDEX))
        for levels in (400, 900, 5000, 200_000)
    },
    "a number of 5000 digits": (
        "whole",
        write(CONFIG, '{"x": ' + "9" * 5000 + "}"),
        r"config\.json cannot be used: .*too many digits",
    ),
    "layers without end": ("whole", config(num_hidden_layers=10**9), r"num_hidden_layers: 1000000000: expected at most 1000"),
    "more layers than tensors": (
        "whole",
        config(num_hidden_layers=900),
        r"num_hidden_layers: 900: the weights have \d+ tensors",
    ),
    "experts without end": ("whole", config(num_experts=10**9), r"num_experts: 1000000000: expected at most 8192"),
    "a shard of a long name": (
        "sharded",
        index(lambda tree: tree["weight_map"].update({NORM: "x" * 300})),
        "no file of this folder",
    ),
    "empty tokenizer": ("whole", write(TOKENIZER, ""), r"its tokenizer cannot be loaded: \S.*; save"),
    "cut tokenizer": ("whole", cut(TOKENIZER), r"its tokenizer cannot be loaded: \S.*; save"),
    "tokenizer is a list": ("whole", write(TOKENIZER, "[]"), r"its tokenizer cannot be loaded: \S.*; save"),
    "tokenizer is a folder": ("whole", folder_in_place(TOKENIZER), r"tokenizer.*; save"),
    "empty tokenizer settings": ("whole", write("tokenizer_config.json", ""), r"its tokenizer cannot be loaded: \S.*; save"),
    "cut tokenizer settings": ("whole", cut("tokenizer_config.json"), r"its tokenizer cannot be loaded: \S.*; save"),
    "larger tokenizer": ("whole", tokenizer_of(600), r"the tokenizer has 600 tokens, the model only 320; .*different models"),
    "token beyond the model": ("whole", token_ids_beyond, r"the tokenizer has .*5000.* the model only 320"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_folder_is_one_line(case: str, sound: Path, tmp_path: Path) -> None:
    which, damage, message = CASES[case]
    folder = Path(shutil.copytree(sound / which, tmp_path / "model"))
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        start(folder)
    line = str(caught.value)
    assert line.startswith(f"foundation.path: {folder}"), line
    assert "\n" not in line and len(line) < 900 and not line.endswith(":"), line


@contextmanager
def another_user() -> Iterator[Path]:
    """A folder of another user's, and this process without the right to read whatever it wants."""
    folder = Path(tempfile.mkdtemp(prefix="fedmoe-test-"))
    folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield folder
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)


UNREADABLE = {
    "folder": ("whole", ".", r"config\.json: cannot be read: Permission denied; give this user the right to read it"),
    "config": ("whole", CONFIG, r"config\.json cannot be used: .*[Pp]ermission"),
    "weights": ("whole", WEIGHTS, r"model\.safetensors: cannot be read; give this user the right to read it"),
    "shard": ("sharded", "model-00002-of-00009.safetensors", r"00002-of-00009\.safetensors: cannot be read; give this user"),
    "index": ("sharded", INDEX, r"index\.json: cannot be read: .*Permission denied"),
    "tokenizer": ("whole", TOKENIZER, r"its tokenizer cannot be loaded: .*[Pp]ermission"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_may_not_be_read_is_one_line(case: str, sound: Path, tmp_path: Path) -> None:
    which, name, message = UNREADABLE[case]
    with another_user() as root:
        euid = os.geteuid()
        os.seteuid(os.getuid())
        folder = Path(shutil.copytree(sound / which, root / "model"))
        for file in folder.iterdir():
            file.chmod(0o644)
        (folder / name).chmod(0)
        (folder / "cache").mkdir() if name != "." else None
        os.seteuid(euid)
        with pytest.raises(UserError, match=message) as caught:
            start(folder)
        os.seteuid(os.getuid())
        (folder / name).chmod(0o700)
    assert "\n" not in str(caught.value)


def test_a_second_copy_of_a_tensor_does_not_count(sound: Path, tmp_path: Path) -> None:
    """The index says which one is the model's; the other may lie in any shard, before or after it."""
    for position in (0, -1):
        folder = Path(shutil.copytree(sound / "sharded", tmp_path / f"model{position}"))
        places = json.loads((folder / INDEX).read_text())["weight_map"]
        stale = sorted(folder.glob("model-*.safetensors"))[position]
        moved = [*[name for name, file in places.items() if file != stale.name][:3], EXPERT, NORM]
        weights = load_file(stale)
        extra = {name: torch.full((5,), 7.0) for name in moved if places[name] != stale.name}
        save_file({**weights, **extra}, stale, {"format": "pt"})
        loaded = load_foundation(folder, FoundationConfig(), 1, 0, "cpu").model
        expected = load_foundation(sound / "sharded", FoundationConfig(), 1, 0, "cpu").model
        for (name, tensor), other in zip(loaded.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(tensor, other), name


COMMAND = {
    "missing shard": 2,
    "no tokenizer": 2,
}
"""Broken folders that the real command is given, and on how many ranks."""


@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", COMMAND)
def test_the_command_ends_with_this_line(case: str, sound: Path, nano: dict[str, Any], tmp_path: Path) -> None:
    which, damage, message = CASES[case]
    folder = Path(shutil.copytree(sound / which, tmp_path / "model"))
    damage(folder)
    cache = str(tmp_path / "cache")
    tree = changed(nano, output=str(tmp_path), foundation={"path": str(folder), "cache": cache}, topology={"ep_size": 1})
    assert re.search(message, run(tree, tmp_path, ranks=COMMAND[case]).mistake())


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "..", ".", "", "a/b", "a\0b", "./model.safetensors", "a\\b"])
def test_a_weight_map_names_files_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match=r"index\.json: weight_map: 'x': .*no file of this folder"):
        WeightFiles(tmp_path)
