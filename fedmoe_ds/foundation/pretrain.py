"""Pre-training of a built-in preset on the spot: real text (the Python standard library), no download, cached.

Only documents of the pre-training half are read, so that federated fine-tuning sees text the foundation has never seen.

Shape suffixes: N sequences, B batch, S sequence length (tokens).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import OlmoeForCausalLM

from fedmoe_ds.config.tree import PretrainConfig
from fedmoe_ds.data import stdlib
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.presets import preset_arguments, preset_config
from fedmoe_ds.randomness import address_key, generator

FORMAT_VERSION = 2
RECORD_FILE = "pretrain.json"
SEQUENCE_LENGTH = 128
_WARMUP_SHARE = 0.05
_REPORTS = 10


def pretrain_preset(preset: str, config: PretrainConfig, seed: int, cache: Path, progress: Callable[[str], None]) -> Path:
    """Return the folder of a pre-trained preset (model, tokenizer, training record), training it if the cache lacks it.

    Deterministic: equal arguments, text and library versions give equal weights. The folder appears whole or not
    at all.

    Raises:
        UserError: unknown preset, or a cache folder that cannot be written.
    """
    arguments = preset_arguments(preset)
    documents, _ = stdlib.split(stdlib.documents())
    key = content_key(arguments, config, seed, documents)
    folder = cache / "foundations" / key
    if folder.is_dir():
        progress(f"foundation: {preset} found in {folder}")
        return folder
    with _staging(folder) as staging:
        _train_and_save(preset, config, seed, [document.text for document in documents], staging, progress)
    progress(f"foundation: {preset} saved in {folder}")
    return folder


def content_key(arguments: dict[str, Any], config: PretrainConfig, seed: int, documents: list[Any]) -> str:
    """Hash of everything that determines the weights."""
    text = hashlib.sha256()
    for document in documents:
        text.update(json.dumps([document.group, document.name, document.text]).encode())
    libraries = {module.__name__: module.__version__.split(".")[:2] for module in (torch, transformers, tokenizers)}
    content = {
        "format": FORMAT_VERSION,
        "model": arguments,
        "pretrain": config.model_dump(),
        "sequence_length": SEQUENCE_LENGTH,
        "seed": seed,
        "text": text.hexdigest(),
        "libraries": libraries,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _train_and_save(
    preset: str, config: PretrainConfig, seed: int, texts: list[str], folder: Path, progress: Callable[[str], None]
) -> None:
    model_config = preset_config(preset)
    progress(f"foundation: training a tokenizer of {model_config.vocab_size} tokens on {len(texts)} documents")
    tokenizer = train_tokenizer(texts, model_config.vocab_size)
    sequences_NS = _pack(tokenizer, texts, model_config.eos_token_id)
    entropy = _unigram_entropy(sequences_NS)
    progress(f"foundation: {sequences_NS.numel()} tokens, unigram entropy {entropy:.2f} nats")
    with _isolated(config.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(address_key(seed, "pretrain-init") % 2**63)
        model = OlmoeForCausalLM(model_config)
        losses = _train(model, sequences_NS, config, seed, progress)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    record = {
        "preset": preset,
        "pretrain": config.model_dump(),
        "seed": seed,
        "tokens": sequences_NS.numel(),
        "unigram_entropy": entropy,
        "losses": losses,
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1))


def _train(model: Any, sequences_NS: Tensor, config: PretrainConfig, seed: int, progress: Callable[[str], None]) -> list[float]:
    """AdamW with warm-up and cosine decay to zero; returns the loss of every step."""
    # The grouped implementation is no faster here, and the backward pass of its gather adds in the order of the threads.
    model.set_experts_implementation("eager")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config.steps))
    losses: list[float] = []
    start = time.monotonic()
    for step, batch_B in enumerate(_batches(len(sequences_NS), config, seed), start=1):
        batch_BS = sequences_NS[torch.from_numpy(batch_B)]
        loss = model(input_ids=batch_BS, labels=batch_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % max(1, config.steps // _REPORTS) == 0 or step == config.steps:
            speed = step * batch_BS.numel() / (time.monotonic() - start)
            progress(f"foundation: step {step}/{config.steps} loss {losses[-1]:.3f} ({speed:.0f} tokens/s)")
    return losses


def _rate(step: int, steps: int) -> float:
    warmup = max(1, round(_WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batches(sequences: int, config: PretrainConfig, seed: int) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """Row numbers of each step: every sequence once per epoch, in an order addressed by (seed, epoch)."""
    epoch = 0
    rows = np.empty(0, dtype=np.int64)
    for _ in range(config.steps):
        while len(rows) < config.batch_size:
            rows = np.concatenate([rows, generator(seed, "pretrain-order", epoch).permutation(sequences)])
            epoch += 1
        batch_B, rows = rows[: config.batch_size], rows[config.batch_size :]
        yield batch_B


def _pack(tokenizer: Any, texts: list[str], eos_token_id: int) -> Tensor:
    """Tokenize, join the documents with the end token between them, and cut into full sequences."""
    stream: list[int] = []
    for text in texts:  # one at a time: a batch would hold every document's offsets and masks at once
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], eos_token_id]
    count = len(stream) // SEQUENCE_LENGTH
    assert count > 0, "the pre-training text is shorter than one sequence"
    return torch.tensor(stream[: count * SEQUENCE_LENGTH]).view(count, SEQUENCE_LENGTH)


def _unigram_entropy(sequences_NS: Tensor) -> float:
    """Entropy of the token frequencies in nats: the loss of the best model that ignores context."""
    counts = torch.bincount(sequences_NS.flatten()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


@contextmanager
def _isolated(threads: int) -> Iterator[None]:
    """Run with this number of CPU threads and reproducible kernels only, then restore what the process had."""
    guard: Any = torch.utils.deterministic
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), guard.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    guard.fill_uninitialized_memory = False  # the guard against unwritten memory costs much time
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        guard.fill_uninitialized_memory = before[2]


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` that becomes `folder` in one rename, after its files have reached the disk."""
    staging = folder.parent / f".staging-{uuid.uuid4().hex}"
    try:
        staging.mkdir(parents=True)
        yield staging
        for file in staging.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        _publish(staging, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"foundation.cache: {folder.parent}: cannot be written: {error}; free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, folder: Path) -> None:
    try:
        staging.rename(folder)
    except OSError:
        # Another process may have trained the same content meanwhile; equal content, so either copy will do.
        if not folder.is_dir():
            raise
