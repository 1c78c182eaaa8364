"""Tokenizer: the one in a model folder, or why there is none that fits."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.meta_model import first_line, read_config
from fedmoe_ds.foundation.own_code import SWITCH, tokenizer_classes, use_private_modules

_FAST = "tokenizer.json"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_FILES = (_FAST, *_SENTENCEPIECE, "vocab.json", "vocab.txt", "tekken.json")
"""Any of them holds a vocabulary; what else belongs to a tokenizer are settings."""
_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
_ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def load_tokenizer(folder: Path, vocab_size: int, trust: bool = False) -> Any:
    """The tokenizer in a model folder.

    Args:
        vocab_size: rows of the model's embedding.
        trust: run the folder's own code where the tokenizer's settings name some.
    Raises:
        UserError: there is none, it is damaged or needs a package that is missing, or it has ids beyond the embedding.
    """
    config = read_config(folder)
    code = trust and bool(tokenizer_classes(folder))
    if code:
        use_private_modules()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=code)
        # Without any of its files transformers returns an empty tokenizer instead of an error.
        empty = not code and not any((folder / file).is_file() for file in tokenizer.vocab_files_names.values())
        ids = [] if empty else list(tokenizer.get_vocab().values())
        count = 0 if empty else len(tokenizer)
        tokenizer("a")  # settings of another type show when they are used
    except _ENDS:
        raise
    except BaseException as error:  # transformers and tokenizers raise all kinds; a panic of Rust is no Exception
        raise UserError(f"foundation.path: {folder}: {_trouble(folder, error)}") from error
    if empty:
        raise UserError(f"foundation.path: {folder}: {_NONE}")
    _check_ids(folder, count, max(ids, default=0), vocab_size)
    return tokenizer


def has_tokenizer(folder: Path, trust: bool = False) -> bool:
    """Whether a model folder holds what `load_tokenizer` would load, intact or not."""
    return any((folder / name).is_file() for name in _FILES) or (trust and bool(tokenizer_classes(folder)))


_NONE = "holds no tokenizer; save the model's tokenizer in the same folder"


def _trouble(folder: Path, error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"its tokenizer is Python code of this folder, which is not run; save it as {_FAST}, or read the code and set "
            f"{SWITCH}=true"
        )
    there = [name for name in _FILES if (folder / name).is_file()]
    if not there:
        return _NONE
    missing = [name for name, module in _PACKAGES.items() if not _installed(module)]
    # `_FILES` has tokenizer.json first, and with that one no package is missing.
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


def _check_ids(folder: Path, count: int, highest: int, vocab_size: int) -> None:
    # Ids may have gaps, so the highest one counts as well as how many there are.
    if count <= vocab_size and highest < vocab_size:
        return
    what = f"{count} tokens" if count > vocab_size else f"a token with id {highest}"
    raise UserError(
        f"foundation.path: {folder}: the tokenizer has {what}, the model only {vocab_size}; "
        "tokenizer and weights belong to different models"
    )
