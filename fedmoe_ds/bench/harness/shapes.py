"""Shapes: the random models that are measured: OLMoE (arXiv 2409.02060), and Llama (arXiv 2302.13971) without experts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.harness.checks import check_known
from fedmoe_ds.errors import UserError

# Wide enough that loss and routing depend on every expert and adapter: a wrong one is plainly seen in the loss.
_INITIALIZER_RANGE = 0.1
_POSITIONS = 512
_SPECIAL_TOKENS = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of one model; `top_k` is the model's own K. Without experts it is a Llama, `ffn` wide."""

    name: str
    experts: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    vocab: int
    top_k: int = 8

    def facts(self) -> dict[str, Any]:
        """The sizes under the names that the rows of a result use."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("e32", experts=32, hidden=256, ffn=128, layers=4, heads=4, vocab=2048),
        Shape("e64", experts=64, hidden=512, ffn=256, layers=4, heads=8, vocab=2048),
        # OLMoE-1B-7B, for a GPU.
        Shape("olmoe-7b", experts=64, hidden=2048, ffn=1024, layers=16, heads=16, vocab=50304),
        Shape("dense", experts=0, hidden=256, ffn=768, layers=4, heads=4, vocab=2048, top_k=1),
        Shape("dense-tiny", experts=0, hidden=32, ffn=48, layers=2, heads=2, vocab=128, top_k=1),
        Shape("tiny", experts=16, hidden=32, ffn=16, layers=2, heads=2, vocab=128),
        # About 600 MiB in float32, most of it experts.
        Shape("load", experts=64, hidden=512, ffn=512, layers=3, heads=8, vocab=4096),
        Shape("load-tiny", experts=16, hidden=64, ffn=64, layers=2, heads=2, vocab=128),
    )
}


def find_shape(name: str, dense: bool = False) -> Shape:
    """The shape with this name. Raises UserError when there is none, or it has no experts and `dense` does not allow that."""
    check_known("--shape", "shape", name, [known for known, shape in SHAPES.items() if dense or shape.experts])
    return SHAPES[name]


def check_positions(length: int) -> None:
    """Raises UserError for sequences that are longer than the models can take."""
    if length > _POSITIONS:
        raise UserError(f"--length: {length}: the measured models have {_POSITIONS} positions; use {_POSITIONS} or less")


def write_model(
    shape: Shape, seed: int, folder: Path, shard_size: str = "100MB", dtype: str = "float32", device: str = "cpu"
) -> None:
    """Save a random model of this shape as a Hugging Face folder of sharded safetensors; random numbers are float32, drawn on
    `device` (each kind has its own)."""
    from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

    common = sizes(shape.vocab, shape.hidden, shape.ffn, shape.layers, shape.heads)
    if not shape.experts:
        save_random(LlamaForCausalLM, LlamaConfig(**common), seed, folder, shard_size, dtype, device)
        return
    config = OlmoeConfig(
        **common,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=False,
    )
    save_random(OlmoeForCausalLM, config, seed, folder, shard_size, dtype, device)


def sizes(vocab: int, hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    """What the configurations of all measured models have in common."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": _POSITIONS,
        "tie_word_embeddings": False,
        "initializer_range": _INITIALIZER_RANGE,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }


def save_random(
    kind: Any, config: Any, seed: int, folder: Path, shard_size: str = "100MB", dtype: str = "float32", device: str = "cpu"
) -> None:
    """Save a model of a class of transformers with random weights, without a trace in this process's state (on its CPU)."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        kind(config).to(getattr(torch, dtype)).to("cpu").save_pretrained(folder, max_shard_size=shard_size)


def write_with_tokenizer(shape: Shape, seed: int, folder: Path, texts: list[str]) -> Shape:
    """Save a model with a tokenizer that is trained on texts. Returns its shape: the vocabulary holds every byte."""
    from fedmoe_ds.data.tokenizer import BYTES, train_tokenizer

    shape = replace(shape, vocab=max(shape.vocab, BYTES + _SPECIAL_TOKENS))
    write_model(shape, seed, folder)
    train_tokenizer(texts, shape.vocab).save_pretrained(folder)
    return shape
