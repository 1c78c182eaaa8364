"""Merged: a whole model in Hugging Face's format, which whatever loads the base loads as well, without any of this package.

The base's files are read block by block, what was learnt is added (`merge.py`), and the same tensors are written under the same
names and types, so that memory holds a block and not a model. Configuration, tokenizer and chat template are the base's; of a
tier with fewer active experts the configuration says so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedmoe_ds.errors import UserError
from fedmoe_ds.export.merge import Changes, Learnt, Rounding, plan_changes
from fedmoe_ds.export.shards import write_shards
from fedmoe_ds.foundation.meta_model import CONFIG_FILE
from fedmoe_ds.foundation.weight_files import WeightFiles
from fedmoe_ds.foundation.weight_stream import StoredTensor, WeightStream, row_blocks
from fedmoe_ds.results import Selection, TrainedRun
from fedmoe_ds.storage.files import write_whole
from fedmoe_ds.storage.strict_json import read_json

TOP_K = "num_experts_per_tok"
"""What all families of `foundation.families` call it."""
CHAT_TEMPLATE = "chat_template.jinja"
_BESIDE = (
    "generation_config.json", "*processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What of the base's folder goes along: by name, since a folder may hold anything beside a model."""


@dataclass(frozen=True)
class Written:
    """What an export has written, and what its reader has to know."""

    files: list[Path]
    notes: list[str] = field(default_factory=list)


def write(run: TrainedRun, selection: Selection, out: Path) -> Written:
    """Write the model of a tier or client into an empty folder.

    Raises:
        UserError: the model's architecture has no place for what was learnt, or the folder cannot be written.
    """
    _check(run, selection)
    files, learnt = WeightFiles(run.model), Learnt(run, selection)
    changes, carried = plan_changes(run, learnt, files)
    left = sorted(set(learnt.blocks) - carried)
    if left:
        raise UserError(f"--format: merged: the base model has no weight that {left[0]} could move into; use --format peft")
    stream, told = WeightStream(files), Rounding()
    _check_room(stream.tensors, out)

    def content(tensor: StoredTensor) -> Iterable[Tensor]:
        return _content(tensor, stream, changes, learnt, told)

    try:
        written = write_shards(out, stream.tensors, content)
        written += _write_beside(run, selection, out)
    except OSError as error:
        raise UserError(f"--out: {out}: cannot write: {error.strerror or error}; make room, or name another folder") from None
    return Written(written, _notes(run, stream, told))


def _check(run: TrainedRun, selection: Selection) -> None:
    method = run.config.method.name
    if run.config.adapters.moe is not None:
        raise UserError(
            "--format: merged: adapter experts stand beside the base's layers and in none of them; use --format model"
        )
    if run.spec.method.personal_models and selection.client is None:
        raise UserError(
            f"--format: merged: method {method} has a model for every client and none for all; name one by --client"
        )
    if selection.assignment.allowed_E is not None:
        raise UserError(
            f"--tier: {selection.tier}: method {method} lets it use some of the experts alone, and no {CONFIG_FILE} can say "
            "that; export another tier"
        )


def _check_room(tensors: list[StoredTensor], out: Path) -> None:
    needed, there = sum(tensor.nbytes for tensor in tensors), shutil.disk_usage(out).free
    if there < needed:
        raise UserError(
            f"--out: {out}: {there / 2**30:.1f} GiB are free, and the model takes {needed / 2**30:.1f}; make room, or name a "
            "folder on another disk"
        )


def _content(tensor: StoredTensor, stream: WeightStream, changes: Changes, learnt: Learnt, told: Rounding) -> Iterator[Tensor]:
    """A tensor of the export, block by block."""
    planned = changes.get(tensor.present)
    if planned is None:
        yield from (stream.block(tensor, rows) for rows in tensor.blocks())
    elif len(tensor.shape) == 2:
        yield from planned[0].blocks(learnt, lambda rows: stream.block(tensor, rows), tensor.blocks(), told)
    else:
        for expert, change in enumerate(planned):
            old_OI = stream.block(tensor, slice(expert, expert + 1))[0]
            yield from change.blocks(learnt, old_OI.__getitem__, row_blocks(tensor.shape[1:], tensor.item_bytes), told)


def _write_beside(run: TrainedRun, selection: Selection, out: Path) -> list[Path]:
    """Configuration, tokenizer and what else a loader reads."""
    found = {path for pattern in _BESIDE for path in run.model.glob(pattern) if path.is_file()}
    written = []
    for path in sorted(found):
        shutil.copyfile(path, out / path.name)
        written.append(out / path.name)
    used = run.config.data.chat_template
    if used is not None and Path(used).is_file():
        # The template that clients were asked in, in place of the tokenizer's own: transformers looks for this file first.
        shutil.copyfile(used, out / CHAT_TEMPLATE)
        written = sorted({*written, out / CHAT_TEMPLATE})
    config = read_json(run.model / CONFIG_FILE, constants=True)
    if run.outline.layers and selection.assignment.cap != run.spec.expert_layout.top_k:
        config[TOP_K] = selection.assignment.cap
    write_whole(out / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return [*written, out / CONFIG_FILE]


def _notes(run: TrainedRun, stream: WeightStream, told: Rounding) -> list[str]:
    """What the base's number format and missing files mean for this export."""
    notes = []
    if told.added:
        types = " and ".join(sorted({tensor.dtype for tensor in stream.tensors if tensor.item_bytes < 4}))
        notes.append(
            f"The base's weights are {types}, and so are these. The run computed its adapters in float32 beside the weights; "
            f"merged, they are rounded with them: the norm of what rounding has changed is {told.share:.2g} of the norm of what "
            "was added. Logits differ from the run's accordingly."
        )
    if run.config.foundation.dtype == "bfloat16" and any(tensor.dtype == "F32" for tensor in stream.tensors):
        notes.append(
            "The run rounded the base's weights to bfloat16 when it read them; this folder has float32, as the base has."
        )
    used = run.config.data.chat_template
    if used is not None and not Path(used).is_file():
        notes.append("The chat template that the run was given is no longer there: this folder has the tokenizer's own.")
    return notes
