"""Merged: a whole model in Hugging Face's format, which whatever loads the base loads as well, without any of this package.

The base's files are read block by block, what was learnt is added (`merge.py`), and the same tensors are written under the same
names and types, so that memory holds a block and not a model. Configuration, tokenizer and chat template are the base's; of a
tier with fewer active experts the configuration says so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fedmoe_ds.errors import UserError
from fedmoe_ds.export.channel_groups import add_groups
from fedmoe_ds.export.loading import model_loading
from fedmoe_ds.export.merge import Changes, Learnt, Rounding, plan_changes
from fedmoe_ds.export.shards import write_shards
from fedmoe_ds.export.written import Request, Written, check_pre_gate, check_router_bias, no_masks, without_common_model
from fedmoe_ds.foundation.channel_groups import KEY
from fedmoe_ds.foundation.meta_model import CONFIG_FILE
from fedmoe_ds.foundation.weight_files import WeightFiles
from fedmoe_ds.foundation.weight_stream import StoredTensor, WeightStream, row_blocks
from fedmoe_ds.planner.memory import format_bytes
from fedmoe_ds.report.formats import many
from fedmoe_ds.storage.files import write_whole
from fedmoe_ds.storage.strict_json import read_json

TOP_K = "num_experts_per_tok"
"""What all families of `foundation.families` call it."""
_BESIDE = (
    "generation_config.json", "*processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja", "*.py",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What of the base's folder goes along: by name, since a folder may hold anything beside a model."""

_PLACES = frozenset(
    ("_name_or_path", "_model_name_or_path", "name_or_path", "_commit_hash", "special_tokens_map_file", "tokenizer_file")
)
"""Keys of settings in which versions of transformers note what a model or a tokenizer was loaded from."""


def write_merged(request: Request) -> Written:
    """Write a model into an empty folder.

    Raises:
        UserError: the model's architecture has no place for what was learnt, or the disk has no room.
        OSError: the folder cannot be written.
    """
    check_selection(request)
    files, learnt, told = WeightFiles(request.run.model), Learnt(request.run, request.selection), Rounding()
    changes, carried = plan_changes(request.run, learnt, files)
    left = sorted(set(learnt.blocks) - carried - add_groups(request, learnt, changes))
    if left:
        raise UserError(f"--format: merged: the base model has no weight that {left[0]} could move into; use --format peft")
    stream = WeightStream(files)
    check_room(stream.tensors, request.out)

    def content(tensor: StoredTensor) -> Iterable[Tensor]:
        return merged_content(tensor, stream, changes, learnt, told)

    shards = write_shards(request.out, stream.tensors, content)
    write_beside(request, _config_changes(request))
    size = sum(tensor.nbytes for tensor in stream.tensors)
    said = f"{many(len(stream.tensors), 'tensor')} of {format_bytes(size)} in {many(len(shards), 'file')}"
    notes = tuple(merging_notes(request, stream, told))
    # In the card, too: whoever loads the export has not seen the command's output.
    loading = [model_loading(request), *(f"{line[0].upper()}{line[1:]}." for line in notes)]
    return Written("transformers", said, "\n\n".join(loading), notes)


def check_selection(request: Request) -> None:
    """Raise UserError where a model's configuration has no word for what the selected one is."""
    run, selection, method = request.run, request.selection, request.run.config.method.name
    check_router_bias(run, "--format: merged")
    check_pre_gate(run, "--format: merged")
    if selection.client is None and without_common_model(run):
        raise UserError(f"--format: merged: method {method} has a model for every client and none for all; name a --client")
    if (why := no_masks(selection, method, f"no {CONFIG_FILE}")) is not None:
        raise UserError(f"--format: merged: {why}")


def check_room(tensors: list[StoredTensor], out: Path) -> None:
    """Raise UserError where a folder's disk has no room for these tensors."""
    needed, there = sum(tensor.nbytes for tensor in tensors), shutil.disk_usage(out).free
    if there < needed:
        raise UserError(
            f"--out: {out.parent}: {there / 2**30:.1f} GiB are free, and the model takes {needed / 2**30:.1f}; make room, or "
            "name a folder on another disk"
        )


def merged_content(
    tensor: StoredTensor, stream: WeightStream, changes: Changes, learnt: Learnt, told: Rounding
) -> Iterator[Tensor]:
    """A tensor of the export, block by block."""
    planned = changes.get(tensor.present)
    if planned is None:
        yield from (stream.block(tensor, rows) for rows in tensor.blocks())
    elif len(tensor.shape) <= 2:
        yield from planned[0].blocks(learnt, lambda rows: stream.block(tensor, rows), tensor.blocks(), told)
    else:
        for expert, change in enumerate(planned):
            old_OI = stream.block(tensor, slice(expert, expert + 1))[0]
            yield from change.blocks(learnt, old_OI.__getitem__, row_blocks(tensor.shape[1:], tensor.item_bytes), told)


def write_beside(request: Request, changes: dict[str, Any]) -> None:
    """The base's configuration with these changes, tokenizer and what else a loader reads."""
    base, out = request.run.model, request.out
    for path in sorted({path for pattern in _BESIDE for path in base.glob(pattern) if path.is_file()}):
        place = out / path.relative_to(base)
        place.parent.mkdir(exist_ok=True)
        _copy(path, place)
    config = _portable(read_json(base / CONFIG_FILE, constants=True)) | changes
    # Merged groups of channels are a block of the model's family again.
    config.pop(KEY, None)
    write_whole(out / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _copy(path: Path, place: Path) -> None:
    """To the byte, but settings without the paths that the tool which saved them has put in."""
    if path.name.endswith("_config.json"):
        settings = read_json(path, constants=True)
        if (portable := _portable(settings)) != settings:
            write_whole(place, json.dumps(portable, indent=2, ensure_ascii=False) + "\n")
            return
    shutil.copyfile(path, place)


def _portable(tree: Any) -> Any:
    """Settings without where somebody once had these files: a folder of that machine, or a name that is another model's."""
    if isinstance(tree, dict):
        return {key: _portable(value) for key, value in tree.items() if key not in _PLACES}
    return [_portable(value) for value in tree] if isinstance(tree, list) else tree


def _config_changes(request: Request) -> dict[str, Any]:
    """What a tier with fewer active experts has other than the base."""
    less = request.run.outline.layers and request.top_k != request.full_top_k
    return {TOP_K: request.top_k} if less else {}


def merging_notes(request: Request, stream: WeightStream, told: Rounding) -> Iterator[str]:
    """What the number format of the base's files means for this export."""
    if told.added:
        types = " and ".join(sorted({tensor.dtype for tensor in stream.tensors if tensor.item_bytes < 4}))
        yield (
            f"rounding: the base's weights are {types}, and so are these; what rounding has changed has {told.share:.2g} of "
            "the norm of what was added, and logits differ from the run's accordingly (--format peft rounds nothing)"
        )
    if request.run.config.foundation.dtype == "bfloat16" and any(tensor.dtype == "F32" for tensor in stream.tensors):
        yield "the run read the base's weights in bfloat16; the export has them in float32, as the base's files do"
