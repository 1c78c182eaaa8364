"""Expanded: a run with further layers (`foundation.expand`) as a dense model of transformers with so many layers more.

The base's tensors go along to the byte, under the numbers that their layers have in the expanded model; further layers are
written beside them, in the types of those that they began as copies of. Whatever loads the base loads the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedmoe_ds.export.loading import model_loading
from fedmoe_ds.export.merge import Learnt, Rounding
from fedmoe_ds.export.merged import check_room, check_selection, merging_notes, write_beside
from fedmoe_ds.export.shards import write_shards
from fedmoe_ds.export.written import Request, Written
from fedmoe_ds.foundation.expansion import Expansion
from fedmoe_ds.foundation.meta_model import read_config
from fedmoe_ds.foundation.weight_files import WeightFiles
from fedmoe_ds.foundation.weight_stream import StoredTensor, WeightStream
from fedmoe_ds.model.adapter_bank import OWNED, BlockSpec
from fedmoe_ds.planner.memory import format_bytes
from fedmoe_ds.report.formats import many

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def write_expanded(request: Request) -> Written:
    """Write a model into an empty folder.

    Raises:
        UserError: a file is damaged, or the disk has no room.
        OSError: the folder cannot be written.
    """
    check_selection(request)
    run, expansion = request.run, request.run.outline.expansion
    assert expansion is not None, "a run without further layers is merged into its base"
    learnt, told, stream = Learnt(run, request.selection), Rounding(), WeightStream(WeightFiles(run.model))
    stored = {tensor.present: tensor for tensor in stream.tensors}
    base = {expansion.placed(name): tensor for name, tensor in stored.items()}
    further = dict(_further(learnt, expansion, stored, f"{run.outline.model.base_model_prefix}.layers"))
    tensors = [replace(tensor, name=name) for name, tensor in base.items()] + [tensor for tensor, _ in further.values()]
    check_room(tensors, request.out)

    def content(tensor: StoredTensor) -> Iterable[Tensor]:
        if (found := base.get(tensor.name)) is not None:
            return (stream.block(found, rows) for rows in found.blocks())
        return iter([_rounded(learnt, *further[tensor.name], told)])

    shards = write_shards(request.out, tensors, content)
    write_beside(request, _config_changes(request, expansion))
    size = sum(tensor.nbytes for tensor in tensors)
    said = f"{many(len(tensors), 'tensor')} of {format_bytes(size)} in {many(len(shards), 'file')}"
    notes = tuple(merging_notes(request, stream, told))
    loading = [model_loading(request), *(f"{line[0].upper()}{line[1:]}." for line in notes)]
    return Written("transformers", said, "\n\n".join(loading), notes)


Placed = tuple[StoredTensor, tuple[str, BlockSpec]]
"""A tensor to be written, and the canonical key and the block of its values."""


def _further(
    learnt: Learnt, expansion: Expansion, stored: dict[str, StoredTensor], layers: str
) -> Iterator[tuple[str, Placed]]:
    for block in learnt.blocks.values():
        for layer in block.layers:
            name = f"{layers}.{layer}.{block.name.removeprefix(OWNED)}"
            like = stored[expansion.source(name)]
            yield name, (StoredTensor(name, name, block.item, like.dtype, like.path), (block.key(layer), block))


def _rounded(learnt: Learnt, tensor: StoredTensor, place: tuple[str, BlockSpec], told: Rounding) -> Tensor:
    value = learnt.tensor(*place)
    rounded = value.to(_TYPES[tensor.dtype])
    # Against nothing: of a further layer all was added.
    if tensor.item_bytes < 4:
        told.add(torch.zeros_like(value), value, rounded)
    return rounded


def _config_changes(request: Request, expansion: Expansion) -> dict[str, Any]:
    """What the base's configuration says of its layers."""
    kinds = getattr(read_config(request.run.model), "layer_types", None)
    changes: dict[str, Any] = {"num_hidden_layers": expansion.depth + expansion.blocks}
    return changes | ({"layer_types": expansion.widened(kinds)} if kinds else {})
