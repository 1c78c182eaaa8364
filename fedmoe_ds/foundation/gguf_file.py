"""GGUF files: a model of llama.cpp, read by transformers, as a folder of safetensors with its tokenizer.

Weights are dequantised to float32: what a quantised file has lost does not come back, and whoever uses the folder is told.
transformers rebuilds the tokenizer from the file's metadata. How text is split before merges apply has only a name there
(`tokenizer.ggml.pre`); names that are not known here are refused, because another split gives other tokens and no error.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmoe_ds.distributed.stop_points import run_waiting
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.meta_model import CONFIG_FILE, first_line
from fedmoe_ds.storage.strict_json import read_json

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
)
_FULL = frozenset({"F32", "F16", "BF16", "F64"})
_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
"""Splits of llama.cpp that take every digit alone, and go on as GPT-2 does."""
_KNOWN = frozenset(
    {"gpt-2", "gpt2", "llama3", "llama-v3", "llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-4o", "dbrx"}
)
"""Splits that transformers sets, or that are its default (GPT-2's)."""
_GPT2 = frozenset({"gpt-2", "gpt2"})
_FORGOTTEN = ("quantization_config", "_name_or_path", "_model_name_or_path")


def tokenizer_files(file: Path) -> list[Path]:
    """A tokenizer that lies beside a GGUF file, which is taken in place of the rebuilt one; empty without tokenizer.json."""
    if not (file.parent / _TOKENIZER_FILES[0]).is_file():
        return []
    return [file.parent / name for name in _TOKENIZER_FILES if (file.parent / name).is_file()]


def quantisation(file: Path) -> str:
    """What is in the file, in words: `weights dequantised from Q4_1 (210 tensors), Q8_0 (1)`.

    Raises:
        UserError: no GGUF file, one part of several, or the package gguf is missing.
    """
    kinds = Counter(str(tensor.tensor_type.name) for tensor in _reader(file).tensors)
    packed = [(kind, count) for kind, count in kinds.most_common() if kind not in _FULL]
    if not packed:
        return f"GGUF with {' and '.join(sorted(kinds))} weights, not quantised"
    (first, count), *rest = packed
    return f"weights dequantised from {', '.join([f'{first} ({count} tensors)', *(f'{kind} ({n})' for kind, n in rest)])}"


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file into an empty folder: float32 weights, configuration, tokenizer.

    Raises:
        UserError: an architecture or a tokenizer that transformers does not read, or a damaged file.
    """
    metadata = _reader(file).fields
    beside = tokenizer_files(file)
    # A folder with this file alone: nothing else that lies beside it may have a say.
    with tempfile.TemporaryDirectory(prefix="fedmoe-gguf-") as alone, _quiet():
        (Path(alone) / file.name).symlink_to(file.resolve())
        options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        try:
            # Only what is safe to end at any moment runs beside this thread, whose `_quiet` has to end first.
            model = run_waiting(lambda: _dequantised(alone, options))
            tokenizer = None if beside else AutoTokenizer.from_pretrained(alone, trust_remote_code=False, **options)
        except Exception as error:  # transformers raises all kinds, for an unknown architecture as for a damaged file
            raise UserError(
                f"foundation.path: {file}: transformers cannot read it: {first_line(error)}; give its Hugging Face folder"
            ) from error
        # A quantised model refuses to be saved; this one is not any more.
        model.hf_quantizer = None
        run_waiting(lambda: model.save_pretrained(folder))
        if tokenizer is not None:
            _set_split(tokenizer, metadata, file)
            tokenizer.save_pretrained(folder)
    for path in beside:
        shutil.copyfile(path, folder / path.name)
    _mend_config(folder / CONFIG_FILE)


def _dequantised(alone: str, options: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, trust_remote_code=False, **options)


def _set_split(tokenizer: Any, metadata: Any, file: Path) -> None:
    """Split text before merges as the file says."""
    kind, name = (_text(metadata, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    # Older transformers have no table of splits: there every text is cut as GPT-2 does.
    known = _KNOWN if find_spec("transformers.integrations.gguf") is not None else _GPT2
    if kind != "gpt2" or name in known:  # SentencePiece's have no such step
        return
    if name not in _DIGITS:
        raise UserError(
            f"foundation.path: {file}: tokenizer.ggml.pre: {name}: how it splits text is not known here; put the model's "
            "tokenizer.json beside the file"
        )
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


def _text(metadata: Any, key: str) -> str | None:
    field = metadata.get(key)
    return None if field is None else str(field.contents())


def _mend_config(path: Path) -> None:
    """Drop what is about the file, and write float32 numbers as who made the model wrote them: 1e-05 for 9.999999747e-06."""
    tree = read_json(path, constants=True)
    kept = {key: _shortest(value) for key, value in tree.items() if key not in _FORGOTTEN}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True))


def _shortest(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortest(inner) for key, inner in value.items()}
    return float(str(np.float32(value))) if isinstance(value, float) and float(np.float32(value)) == value else value


def _reader(file: Path) -> Any:
    if find_spec("gguf") is None:
        raise UserError(f"foundation.path: {file}: a GGUF file needs the package gguf: pip install gguf, or 'fedmoe-ds[gguf]'")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(file))
    except OSError as error:
        raise UserError(f"foundation.path: {file}: cannot be read: {error.strerror or error}; get the file again") from error
    except Exception as error:  # numpy and struct complain in many ways about bytes that are none
        raise UserError(f"foundation.path: {file}: no GGUF file, or damaged: {first_line(error)}; get it again") from error
    if _text(reader.fields, "split.count") not in (None, "0", "1"):
        raise UserError(
            f"foundation.path: {file}: one of several parts; join them with llama.cpp: llama-gguf-split --merge {file.name} "
            "whole.gguf"
        )
    return reader


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers inside; errors are raised."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        # Its reader of GGUF draws a bar of its own that nothing switches off.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
