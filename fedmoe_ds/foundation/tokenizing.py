"""Tokenizing: the tokenizer in a model folder, or why there is none that fits."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.meta import first_line

_FAST = "tokenizer.json"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_FILES = (_FAST, *_SENTENCEPIECE, "vocab.json", "vocab.txt", "tekken.json")
"""Any of them holds a vocabulary; what else belongs to a tokenizer are settings."""
_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def load_tokenizer(folder: Path, vocab_size: int) -> Any:
    """The tokenizer in a model folder.

    Args:
        vocab_size: rows of the model's embedding.
    Raises:
        UserError: there is none, it is damaged or needs a package that is missing, or it has ids beyond the embedding.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise all kinds, a plain Exception among them
        raise UserError(f"foundation.path: {folder}: {_trouble(folder, error)}") from error
    # Without any of its files transformers returns an empty tokenizer instead of an error.
    if not any((folder / file).is_file() for file in tokenizer.vocab_files_names.values()):
        raise UserError(f"foundation.path: {folder}: {_NONE}")
    _check_ids(folder, tokenizer, vocab_size)
    return tokenizer


_NONE = "holds no tokenizer; save the model's tokenizer in the same folder"


def _trouble(folder: Path, error: Exception) -> str:
    there = [name for name in _FILES if (folder / name).is_file()]
    if not there:
        return _NONE
    missing = [name for name, module in _PACKAGES.items() if not _installed(module)]
    if there[0] in _SENTENCEPIECE and missing:
        return (
            f"its tokenizer {there[0]} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed: pip install {' '.join(missing)}, or save it as {_FAST} beside the model"
        )
    return f"its tokenizer cannot be loaded: {first_line(error)}; save the model's tokenizer in the folder again"


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _check_ids(folder: Path, tokenizer: Any, vocab_size: int) -> None:
    count, highest = len(tokenizer), max(tokenizer.get_vocab().values(), default=0)
    if count <= vocab_size and highest < vocab_size:
        return
    what = f"{count} tokens" if count > vocab_size else f"a token with id {highest}"
    raise UserError(
        f"foundation.path: {folder}: the tokenizer has {what}, the model only {vocab_size}; "
        "tokenizer and weights belong to different models"
    )
