"""Model layouts as people have them: each is loaded as it is, converted once into the cache, or refused with what helps."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from test_foundation import save_model
from transformers import LlamaConfig

from fedmoe_ds.config.foundation_section import FoundationConfig
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.distributed.stop_points import file_sha256
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import conversion, file_sums, load_foundation, planned_task, resolve_foundation
from fedmoe_ds.foundation import tokenizer as tokenizer_module
from fedmoe_ds.storage import cache

TEXT = [
    "import this, and 12 more words of 2026",
    "def words(of: str) -> list[str]:",
    "  return [word for word in of.split()]",
] * 4
VOCAB, HIDDEN, HEADS, KV = 300, 64, 4, 2
IDS = torch.arange(3, 40)[None]

Change = Callable[[Path], Any]


def config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV}
    return LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts") / "model"
    save_model(config(), folder)
    train_tokenizer(TEXT, VOCAB).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def resolve(path: Path, root: Path) -> tuple[Path, list[str]]:
    lines: list[str] = []
    found = resolve_foundation(FoundationConfig(path=str(path), cache=str(root)), 0, lines.append)
    return found, lines


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = load_foundation(folder, FoundationConfig(), 1, 0, "cpu").model(input_ids=IDS).logits
    return result


def pickled(folder: Path, shards: int = 1, **changes: torch.Tensor) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    places = {name: f"pytorch_model-{1 + number % shards:05}-of-{shards:05}.bin" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_converted_once_and_are_the_same(shards: int, model: Path, folder: Path, tmp_path: Path) -> None:
    pickled(folder, shards)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    found, lines = resolve(folder, tmp_path / "cache")
    assert found.parent == tmp_path / "cache" / "foundations" and len(lines) == 1 and f"{shards} file(s)" in lines[0]
    assert torch.equal(logits(found), logits(model))
    assert "the same tensors" in str(conversion.told(found)) and conversion.told(model) is None
    # Found again under another name, without another line; the user's folder is as it was.
    again, lines = resolve(folder.rename(tmp_path / "renamed"), tmp_path / "cache")
    assert again == found and lines == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "renamed").iterdir()} == {p.name: c for p, c in before.items()}


def test_no_large_file_is_read_again_at_the_next_start(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the pickled files, of which the key is made, nor those that they have become."""
    pickled(folder)
    found, _ = resolve(folder, tmp_path / "cache")
    read: list[str] = []
    monkeypatch.setattr(file_sums, "WORTH", (folder / "pytorch_model.bin").stat().st_size // 2)
    monkeypatch.setattr(file_sums, "_SETTLED_NS", -(10**12))
    monkeypatch.setattr(file_sums, "file_sha256", lambda path: read.append(path.name) or file_sha256(path))
    for expected in ({"pytorch_model.bin", "model.safetensors"}, set[str]()):
        read.clear()
        assert resolve(folder, tmp_path / "cache") == (found, [])
        assert {"pytorch_model.bin", "model.safetensors"} & set(read) == expected


@pytest.mark.parametrize("text", ["[]", "no JSON", '{"said": "bought", "libraries": {}}'])
def test_a_record_of_somebody_else_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / conversion.RECORD_FILE).write_text(text)
    assert conversion.told(tmp_path) is None


def test_a_damaged_conversion_is_made_anew(folder: Path, tmp_path: Path) -> None:
    pickled(folder)
    found, _ = resolve(folder, tmp_path / "cache")
    with (found / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"damaged!")
    cache.passed_over()
    again, lines = resolve(folder, tmp_path / "cache")
    assert again == found and len(lines) == 1 and "is damaged: made anew" in str(cache.line([cache.passed_over()]))
    assert torch.isfinite(logits(again)).all()


class Code:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


BAD_PICKLES: dict[str, tuple[Change, str]] = {
    "code": (lambda file: torch.save({"x": Code()}, file), r"as tensors alone: .*could be code"),
    "text": (lambda file: file.write_text("version https://git-lfs"), r"as tensors alone: "),
    "a list": (lambda file: torch.save([torch.ones(2)], file), r"more than named tensors"),
    "a number": (lambda file: torch.save({"step": 3}, file), r"more than named tensors"),
    "empty": (lambda file: file.write_bytes(b""), r"as tensors alone: "),
}


@pytest.mark.parametrize("what", BAD_PICKLES)
def test_a_pickle_of_something_else_is_one_line(
    what: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    write, message = BAD_PICKLES[what]
    write(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"^foundation\.path: \S*pytorch_model\.bin: .*{message}"):
        resolve(folder, tmp_path / "cache")
    assert not (tmp_path / "ran").exists() and list((tmp_path / "cache" / "foundations").iterdir()) == []


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order that llama.cpp rotates them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(model: Path, file: Path, kind: str = "F32", pre: str | None = "smollm") -> None:
    """What llama.cpp's converter writes of a Llama with a byte-level tokenizer."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    tokens += [f"[unused{number}]" for number in range(len(tokens), VOCAB)]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number < 2 else 1 for number in range(VOCAB)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in load_file(model / "model.safetensors").items():
        stem = re.sub(r"model\.layers\.(\d+)\.", r"blk.\1.", name.removesuffix(".weight"))
        prefix, rest = (stem[:6], stem[6:]) if stem.startswith("blk.") else ("", stem)
        values = permuted(tensor, HEADS if "q_proj" in name else KV) if "q_proj" in name or "k_proj" in name else tensor
        array = values.float().numpy()
        full = f"{prefix}{NAMES[rest]}.weight"
        if kind == "F32" or array.ndim == 1:
            writer.add_tensor(full, np.ascontiguousarray(array))
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(full, gguf.quants.quantize(np.ascontiguousarray(array), quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_gives_the_model_and_its_tokenizer(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(model, file)
    assert planned_task(FoundationConfig(path=str(file))) is None
    found, lines = resolve(file, tmp_path / "cache")
    assert len(lines) == 1 and "not quantised" in lines[0]
    torch.testing.assert_close(logits(found), logits(model), atol=0, rtol=0)
    settings = json.loads((found / "config.json").read_text())
    assert settings["rms_norm_eps"] == 1e-5 and "quantization_config" not in settings
    tokenizer = load_foundation(found, FoundationConfig(), 1, 0, "cpu").tokenizer
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.chat_template == "{{ messages[0]['content'] }}"
    # smollm: as GPT-2, with every digit alone; merges of this tokenizer may join digits, and must not here.
    plain = train_tokenizer(TEXT, VOCAB)
    assert every_alike(tokenizer, plain, ["def words(of: str)", "  import this\n\nand é☃"])
    assert [tokenizer.decode([number]) for number in tokenizer("2026", add_special_tokens=False)["input_ids"]] == list("2026")
    # A folder with this file is the same model.
    (tmp_path / "folder").mkdir()
    shutil.copy(file, tmp_path / "folder" / "model.gguf")
    assert resolve(tmp_path / "folder", tmp_path / "cache") == (found, [])


def every_alike(left: Any, right: Any, texts: list[str]) -> bool:
    ids = [[one(text, add_special_tokens=False)["input_ids"] for text in texts] for one in (left, right)]
    return bool(texts) and ids[0] == ids[1]


def test_a_quantised_gguf_says_what_was_dequantised(model: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "tiny.gguf", "Q8_0", pre="gpt-2")
    found, _ = resolve(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert re.search(r"weights dequantised from Q8_0 \(\d+ tensors\)", str(conversion.told(found)))
    close, exact = logits(found), logits(model)
    assert 0 < (close - exact).abs().max() < 0.2 * exact.std()


def test_a_gguf_with_an_unknown_split_needs_its_tokenizer_beside_it(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(model, file, pre="of-tomorrow")
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre: of-tomorrow: .*tokenizer\.json beside"):
        resolve(file, tmp_path / "cache")
    shutil.copy(model / "tokenizer.json", tmp_path)
    shutil.copy(model / "tokenizer_config.json", tmp_path)
    found, _ = resolve(file, tmp_path / "cache")
    assert (found / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def two_ggufs(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("model-Q4_K_M.gguf", "model-Q8_0.gguf"):
        (folder / name).write_bytes(b"GGUF")


def bad_gguf(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)


def adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def original(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "params.json").write_text('{"dim": 64}')
    (folder / "consolidated.00.pth").write_bytes(b"x")


def quantised(folder: Path) -> None:
    changed_config = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (folder / "config.json").write_text(json.dumps(changed_config))


def code_model(folder: Path) -> None:
    changed_config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(changed_config))


def missing_shard(folder: Path) -> None:
    pickled(folder, 2)
    next(folder.glob("pytorch_model-*.bin")).unlink()


REFUSED: dict[str, tuple[Change, str]] = {
    "PEFT adapter": (adapter, r"PEFT adapter and no model; merge it first: python -c .*merge_and_unload"),
    "publisher's own": (original, r"consolidated\.00\.pth.*convert_llama_weights_to_hf"),
    "several GGUF": (two_ggufs, r"2 GGUF files \(model-Q4_K_M\.gguf, model-Q8_0\.gguf\); give one"),
    "damaged GGUF": (bad_gguf, r"model\.gguf: no GGUF file, or damaged"),
    "quantised": (quantised, r"the weights are quantised; give a model that is not: .*dequantize"),
    "code of its own": (code_model, r"its model is Python code of this folder"),
    "a missing shard": (missing_shard, r"pytorch_model-\d+-of-00002\.bin: missing weight file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_layout_that_is_not_read_is_refused_with_what_helps(what: str, folder: Path, tmp_path: Path) -> None:
    change, message = REFUSED[what]
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        logits(resolve(folder, tmp_path / "cache")[0])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_gguf_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors: a file; give the model's folder"):
        resolve(folder / "model.safetensors", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_tokenizer_alone_serves(kind: str, tmp_path: Path) -> None:
    lines = [line for text in TEXT for line in (text, text.upper())]
    trained = io.BytesIO()
    # As Llama's: no normalisation of text, white space kept, unknown characters as bytes.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, vocab_size=VOCAB + 10, model_type=kind, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    save_model(config(vocab_size=VOCAB + 10), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(trained.getvalue())
    tokenizer = load_foundation(tmp_path, FoundationConfig(), 1, 0, "cpu").tokenizer
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    texts = [*TEXT[:3], "  two  spaces", "é☃ unknown"]
    assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] == [
        reference.encode(text) for text in texts
    ]


def test_a_sentencepiece_tokenizer_without_its_packages_says_which(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"needs the packages")
    monkeypatch.setattr(tokenizer_module, "_installed", lambda module: False)
    with pytest.raises(UserError, match=r"tokenizer\.model needs .*pip install sentencepiece protobuf"):
        logits(folder)


def test_tied_and_half_precision_weights_are_read(tmp_path: Path) -> None:
    model = save_model(config(tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    model.half().save_pretrained(tmp_path / "half")
    for name in ("tied", "half"):
        train_tokenizer(TEXT, VOCAB).save_pretrained(tmp_path / name)
    torch.testing.assert_close(logits(tmp_path / "half"), logits(tmp_path / "tied"), atol=0.02, rtol=0.02)


def test_a_snapshot_of_the_hub_is_read(model: Path, folder: Path, tmp_path: Path) -> None:
    """Its files are links into `blobs/`, as huggingface-hub lays them down."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0f"
    folder.rename(blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    found, lines = resolve(snapshot, tmp_path / "cache")
    assert found == snapshot and lines == [] and torch.equal(logits(found), logits(model))
