"""Text: pre-training of a built-in language model on documents.

Shape suffixes: N sequences, B batch, S sequence length (tokens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedmoe_ds.config.foundation_section import PretrainConfig
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.foundation.builtin.loop import Progress, train_new
from fedmoe_ds.foundation.builtin.loop_state import TrainingState
from fedmoe_ds.foundation.builtin.presets import Preset

SEQUENCE_LENGTH = 128


def train_on_text(
    preset: Preset, config: PretrainConfig, seed: int, texts: list[str], progress: Progress, state: TrainingState
) -> tuple[list[Any], dict[str, Any]]:
    """Train a tokenizer and the model; return the two, to be saved in one folder, and the facts of the training."""
    model_config = preset.config()
    progress(f"foundation: training a tokenizer of {model_config.vocab_size} tokens on {len(texts)} documents")
    tokenizer = train_tokenizer(texts, model_config.vocab_size)
    sequences_NS = pack(tokenizer, texts, model_config.eos_token_id)
    entropy = _unigram_entropy(sequences_NS)
    progress(f"foundation: {sequences_NS.numel()} tokens, unigram entropy {entropy:.2f} nats")

    def create() -> Any:
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
        if preset.family == "olmoe":
            # The grouped kernel is no faster here, and the backward pass of its gather adds in the order of the threads.
            model.set_experts_implementation("eager")
        return model

    def batch_loss(model: Any, rows_B: Tensor) -> Tensor:
        batch_BS = sequences_NS[rows_B]
        loss: Tensor = model(input_ids=batch_BS, labels=batch_BS, use_cache=False).loss
        return loss

    model, losses = train_new(create, batch_loss, len(sequences_NS), (SEQUENCE_LENGTH, "tokens"), config, seed, progress, state)
    return [model, tokenizer], {"tokens": sequences_NS.numel(), "unigram_entropy": entropy, "losses": losses}


def pack(tokenizer: Any, texts: list[str], eos_token_id: int) -> Tensor:
    """Tokenize, join the documents with the end token between them, and cut into full sequences."""
    stream: list[int] = []
    encode = Encoder(tokenizer)
    for text in texts:  # one at a time: a batch would hold every document's offsets and masks at once
        stream += [*encode([text])[0].ids, eos_token_id]
    count = len(stream) // SEQUENCE_LENGTH
    assert count > 0, "the pre-training text is shorter than one sequence"
    return torch.tensor(stream[: count * SEQUENCE_LENGTH]).view(count, SEQUENCE_LENGTH)


def _unigram_entropy(sequences_NS: Tensor) -> float:
    """Entropy of the token frequencies in nats: the loss of the best model that ignores context."""
    counts = torch.bincount(sequences_NS.flatten()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())
