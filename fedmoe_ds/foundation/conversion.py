"""Conversion: model layouts that are not safetensors beside a configuration, made into such a folder once, in the cache.

* `pytorch_model.bin`, in one file or several with an index: the same tensors in safetensors files. Only tensors are unpickled.
* a GGUF file: loaded by transformers, its weights dequantised to float32, its tokenizer rebuilt from the file's metadata.

Key of an entry is what is in the files, so that one model under two names is converted once. What cannot be converted is
refused with the command that helps.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedmoe_ds.distributed.stop_points import run_waiting, stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import file_sums, folder_record
from fedmoe_ds.foundation.gguf_file import convert_gguf, quantisation, tokenizer_files
from fedmoe_ds.foundation.meta_model import CONFIG_FILE, first_line
from fedmoe_ds.foundation.weight_files import INDEX_FILE, WEIGHTS_FILE
from fedmoe_ds.storage import cache
from fedmoe_ds.storage.strict_json import read_json, tree_sha256

RECORD_FILE = "conversion.json"
FORMAT = 1
"""Raise it whenever equal files would give another folder."""
PICKLED_FILE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
GGUF = ".gguf"
_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
"""What a folder may hold beside weights: configuration, tokenizer, and code that its tokenizer may be allowed to run."""

Note = Callable[[str], None]


def converted(path: Path, root: Path, note: Note) -> Path:
    """Return a folder of safetensors with the model at `path`: a folder or a GGUF file. Rank 0 only.

    Args:
        root: of the cache folder.
        note: takes a line where something is converted or found.
    Raises:
        UserError: a layout that is not read, or damaged files.
    """
    if _is(path, Path.is_file):
        if path.suffix != GGUF:
            raise UserError(f"foundation.path: {path}: a file; give the model's folder, or a {GGUF} file")
        return _from_gguf(path, root, note)
    # What is no folder, or holds no names for this user, is told by who reads the folder next.
    if not _is(path, Path.is_dir) or not os.access(path, os.R_OK | os.X_OK):
        return path
    if any((path / name).is_file() for name in (INDEX_FILE, WEIGHTS_FILE)):
        return path
    if any((path / name).is_file() for name in (PICKLED_FILE, PICKLED_INDEX)):
        # Without its configuration it is no model: known before many GB are written.
        return _from_pickled(path, root, note) if (path / CONFIG_FILE).is_file() else path
    ggufs = sorted(path.glob(f"*{GGUF}"))
    if len(ggufs) == 1:
        return _from_gguf(ggufs[0], root, note)
    if ggufs:
        names = ", ".join(file.name for file in ggufs[:4])
        raise UserError(
            f"foundation.path: {path}: holds {len(ggufs)} GGUF files ({names}); give one of them as foundation.path"
        )
    _refuse_other(path)
    return path


def told(folder: Path) -> str | None:
    """What a conversion has to say about the model in a folder, in one line; None where nothing was converted."""
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    try:
        record = read_json(file)
    except (OSError, ValueError):
        return None
    # A file of this name may lie in anybody's model folder: only what a conversion has sealed speaks here.
    if not isinstance(record, dict) or not cache.has_seal(record):
        return None
    said = record.get("said")
    return f"foundation: {said}" if isinstance(said, str) else None


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except OSError:  # a folder above it that may not be entered
        return False


def store(key: dict[str, Any], said: str, make: Callable[[Path], None], root: Path, note: Note) -> Path:
    """Return the folder of a converted model in the cache at `root`, made if it is not there.

    Args:
        key: all that decides what is in it.
        said: the line about it that every start says and every report shows.
        make: writes the model into an empty folder.
    Raises:
        UserError: the cache folder cannot be written, and what `make` raises.
    """
    libraries = {name: version(name).split(".")[:2] for name in ("torch", "transformers", "tokenizers", "safetensors")}
    entry = tree_sha256({"format": FORMAT, **key, "libraries": libraries})[:32]
    folder = cache.place(root, "foundations") / entry
    record = folder / RECORD_FILE
    sums = cache.place(root, file_sums.KIND)

    def whole() -> bool:
        return folder_record.usable(record, lambda file: file_sums.file_sum(file, sums))

    with cache.storing(folder, SafetensorError):
        if not whole():
            note(f"foundation: converting {said}")
            with cache.draft(folder, whole) as draft:
                make(draft)
                folder_record.write(draft / RECORD_FILE, {**key, "libraries": libraries, "said": said})
    return folder


def _from_gguf(file: Path, root: Path, note: Note) -> Path:
    said = f"{file.name}: {quantisation(file)}"
    key = {"gguf": _digest(file, root), "beside": {path.name: _digest(path, root) for path in tokenizer_files(file)}}
    return store(key, said, lambda folder: convert_gguf(file, folder), root, note)


def _from_pickled(source: Path, root: Path, note: Note) -> Path:
    weights, beside = _pickled_files(source), files_beside(source)
    key = {"pickled": {path.name: _digest(path, root) for path in (*weights, *beside)}}
    said = f"{source.name}: {len(weights)} file(s) {PICKLED_FILE} to safetensors, the same tensors"

    def make(folder: Path) -> None:
        for path in beside:
            shutil.copyfile(path, folder / path.name)
        _write_shards(weights, folder)

    return store(key, said, make, root, note)


def _pickled_files(source: Path) -> list[Path]:
    index = source / PICKLED_INDEX
    if not index.is_file():
        return [source / PICKLED_FILE]
    try:
        places = read_json(index)["weight_map"].values()
        files = [source / Path(name).name for name in sorted(set(places))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"foundation.path: {index}: cannot be read: {first_line(error)}; get the file again") from error
    for file in files:
        if not file.is_file():
            raise UserError(f"foundation.path: {file}: missing weight file; get the whole model")
    return files


def files_beside(source: Path) -> list[Path]:
    """What a model folder holds beside weights."""
    found = {path for pattern in _BESIDE for path in source.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name not in (PICKLED_INDEX, RECORD_FILE))


def _write_shards(files: list[Path], folder: Path) -> None:
    """One safetensors file per file, so that no more than one of them is in memory."""
    places: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        stop_point()
        name = WEIGHTS_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        names = run_waiting(partial(_written_again, file, folder / name))
        places.update(dict.fromkeys(names, name))
    if len(files) > 1:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=1))


def _written_again(file: Path, target: Path) -> list[str]:
    """Write the tensors of a pickled file as safetensors; returns their names."""
    tensors = _unpickled(file)
    save_file(tensors, target, {"format": "pt"})
    return list(tensors)


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, none of which shares memory with another. Nothing but tensors is unpickled: no code runs."""
    try:
        # Files of torch before 1.6 are no archives and cannot be mapped.
        tree = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError as error:
        raise UserError(f"foundation.path: {file}: cannot be read: {error.strerror or error}; mend its permissions") from error
    except Exception as error:  # torch raises all kinds for a damaged file
        raise UserError(
            f"foundation.path: {file}: cannot be read as tensors alone: {first_line(error)}; nothing else is unpickled, "
            "since it could be code: get the file again, or save the model with safetensors (save_pretrained does)"
        ) from error
    if not isinstance(tree, dict) or not all(
        isinstance(value, Tensor) and isinstance(name, str) for name, value in tree.items()
    ):
        raise UserError(
            f"foundation.path: {file}: holds more than named tensors: it is no model of transformers; save the model with "
            "save_pretrained"
        )
    seen: set[int] = set()
    alone = {}
    for name, tensor in tree.items():
        place = tensor.untyped_storage().data_ptr()
        # Tied weights are one tensor with two names; safetensors wants each in memory of its own.
        alone[name] = tensor.clone().contiguous() if place in seen else tensor.contiguous()
        seen.add(place)
    return alone


def _refuse_other(folder: Path) -> None:
    """Raise UserError for layouts that others read and that are not converted here, with the command that does."""
    adapters, names = folder / "adapter_config.json", {path.name for path in folder.iterdir()}
    if adapters.is_file():
        raise UserError(
            f'foundation.path: {folder}: holds a PEFT adapter and no model; merge it first: python -c "from peft import '
            f"AutoPeftModelForCausalLM as A; A.from_pretrained('{folder}').merge_and_unload().save_pretrained('merged')\" and "
            "copy the base model's tokenizer into merged/"
        )
    original = sorted(name for name in names if name.startswith("consolidated") and name.endswith((".pth", ".safetensors")))
    if original and not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"foundation.path: {folder}: holds the publisher's own format ({original[0]}, params.json); convert it with "
            f"transformers' script of its family: python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir "
            f"{folder} --output_dir converted (models.mistral for Mistral), or get the repository's Hugging Face files"
        )


def _digest(file: Path, root: Path) -> str:
    try:
        return file_sums.file_sum(file, cache.place(root, file_sums.KIND))
    except OSError as error:
        raise UserError(f"foundation.path: {file}: cannot be read: {error.strerror or error}; mend its permissions") from error
