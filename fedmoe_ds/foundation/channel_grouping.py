"""Channel grouping: a dense model written again, once, in the cache, with the channels of its blocks in another order.

Legend: L layers, W channels of a block (its width), D model width.

A channel j of a block is a row of the matrices that lead to it (W_gate, W_up; W_in and its bias) and a column of the one that
leads back, so a block whose channels are permuted is the same function: what is written is a model of its family, whose
configuration says besides how the channels are grouped (`channel_groups.py`). Saliency as RaFFM orders by magnitudes (arXiv
2310.00247); that it is of both matrices is our completion:

    s_j = sum over the matrices that lead to j of ||row j||_1  +  ||column j of the matrix that leads back||_1

Another order, some channels in several groups, or in none, and channels that always work are other `Plan`s of the same writer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmoe_ds.config.foundation_section import ConvertConfig
from fedmoe_ds.distributed.stop_points import stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import file_sums
from fedmoe_ds.foundation.builtin.pretrain import RECORD_FILE as PRETRAINED
from fedmoe_ds.foundation.channel_groups import KEY, Grouping, inner_names, outer_name, unit_of
from fedmoe_ds.foundation.conversion import files_beside, store
from fedmoe_ds.foundation.dense import DENSE, VIT
from fedmoe_ds.foundation.families import ACTIVATIONS
from fedmoe_ds.foundation.fingerprint import remembered_fingerprint
from fedmoe_ds.foundation.meta_model import CONFIG_FILE, read_config
from fedmoe_ds.foundation.weight_files import INDEX_FILE, WeightFiles, open_weights
from fedmoe_ds.storage import cache
from fedmoe_ds.storage.strict_json import read_json

Note = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a model is written with.

    Attributes:
        grouping: as its configuration will say it.
        order_LW: int64, the old channel at every new place; the new width need not be the old one.
        tensors: further ones of the model, by present name, for its first file.
        facts: further entries of `channel_groups` in the configuration.
    """

    grouping: Grouping
    order_LW: Tensor
    tensors: dict[str, Tensor] | None = None
    facts: dict[str, Any] | None = None


def grouped(source: Path, convert: ConvertConfig, root: Path, note: Note) -> Path:
    """Return the folder, in the cache at `root`, of the dense model in `source` with its channels grouped. Rank 0 only.

    Raises:
        UserError: the model's channels cannot be grouped so, or the cache folder cannot be written.
    """
    config = read_config(source)
    check_convertible(config, convert)
    said = f"{convert.experts} groups of {config.intermediate_size // convert.experts} channels in every feed-forward block"

    def make(folder: Path) -> None:
        files, grouping = WeightFiles(source), Grouping(convert.experts)
        write(source, folder, Plan(grouping, torch.stack([_order(files, convert, *place) for place in _places(config)])))

    return store(cache_key(source, convert, root), said, make, root, note)


def cache_key(source: Path, convert: ConvertConfig, root: Path) -> dict[str, Any]:
    """What decides the bytes of a folder that is made of the model in `source` alone."""
    sums = cache.place(root, file_sums.KIND)
    beside = {path.name: file_sums.file_sum(path, sums) for path in _beside(source)}
    return {"grouped": convert.model_dump(), "model": remembered_fingerprint(source, sums), "beside": beside}


def _beside(source: Path) -> list[Path]:
    # How the model was trained is the record of another folder.
    return [path for path in files_beside(source) if path.name != PRETRAINED]


def check_convertible(config: Any, convert: ConvertConfig) -> None:
    """Raise UserError unless the blocks of a model, by its transformers configuration, can be cut into such groups."""
    if config.model_type not in DENSE:
        raise UserError(
            f"foundation.convert: {convert.kind}: a '{config.model_type}' model has experts of its own; drop the section, or "
            "use a dense foundation (tiny-llama, tiny-vit)"
        )
    known = ("gelu",) if config.model_type == VIT else tuple(ACTIVATIONS)
    if config.hidden_act not in known:
        raise UserError(
            f"foundation.convert: {convert.kind}: groups of channels cannot compute '{config.hidden_act}'; give a model with "
            f"one of {', '.join(known)}"
        )
    if getattr(config, "mlp_bias", False):
        raise UserError(
            f"foundation.convert: {convert.kind}: blocks with a gate and biases are not known here; give one without mlp_bias"
        )
    if getattr(config, KEY, None) is not None:
        raise UserError(f"foundation.convert: {convert.kind}: the model's channels are grouped already; drop the section")
    if config.intermediate_size % convert.experts:
        width = config.intermediate_size
        valid = ", ".join(str(count) for count in range(1, min(width, 64) + 1) if width % count == 0)
        raise UserError(
            f"foundation.convert.experts: {convert.experts}: the {width} channels of a block cannot be cut into as many equal "
            f"groups; use one of {valid}"
        )


def _places(config: Any) -> list[tuple[str, bool]]:
    """(path of the block, whether it has a gate) of every layer."""
    prefix = "vit" if config.model_type == VIT else "model"
    gated = unit_of(config) is not None
    return [(f"{prefix}.layers.{index}.mlp", gated) for index in range(config.num_hidden_layers)]


def saliency(inner: list[Tensor], outer_DW: Tensor) -> Tensor:
    """s_j of every channel, float64 [W]; `inner` are [W, D]."""
    # Rows that lie in one piece are added up in one way, wherever they are: the order does not depend on the initial one.
    rows = [*inner, outer_DW.t().contiguous()]
    return torch.stack([matrix.double().abs().sum(1) for matrix in rows]).sum(0)


def _order(files: WeightFiles, convert: ConvertConfig, path: str, gated: bool) -> Tensor:
    stop_point()
    inner = [read(files, f"{path}.{leaf}.weight") for leaf in inner_names(gated)]
    if convert.order == "given":
        return torch.arange(len(inner[0]))
    # Stable: of channels of one saliency the first comes first.
    salient_W = saliency(inner, read(files, f"{path}.{outer_name(gated)}.weight"))
    return salient_W.sort(descending=True, stable=True).indices


def read(files: WeightFiles, name: str) -> Tensor:
    """A tensor of a model by its present name."""
    if name not in files:
        raise UserError(f"foundation.path: {files.list}: no tensor '{name}'; get the whole model")
    path, stored = files.where[name]
    with open_weights(path) as file:
        found: Tensor = file.get_tensor(stored)
    return found


def write(source: Path, folder: Path, plan: Plan) -> None:
    """Write the model of `source` into an empty folder, its channels placed as the plan says."""
    for path in _beside(source):
        shutil.copyfile(path, folder / path.name)
    said = vars(plan.grouping) | (plan.facts or {})
    config = {**read_json(source / CONFIG_FILE, constants=True), "intermediate_size": plan.order_LW.shape[1], KEY: said}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1))
    files, placed = WeightFiles(source), _placed(read_config(source), plan)
    more = plan.tensors or {}
    if more and (index := folder / INDEX_FILE).is_file():
        listed = read_json(index)
        listed["weight_map"] |= dict.fromkeys(more, files.paths[0].name)
        index.write_text(json.dumps(listed, indent=1))
    # File by file, so that no more than one of them is in memory.
    for path in files.paths:
        stop_point()
        tensors = dict(more)
        with open_weights(path) as file:
            for name, (own, stored) in files.where.items():
                if own == path:
                    tensors[stored] = placed.get(name, _same)(file.get_tensor(stored))
        save_file(tensors, folder / path.name, {"format": "pt"})
        more = {}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _placed(config: Any, plan: Plan) -> dict[str, Callable[[Tensor], Tensor]]:
    """What places the channels of a tensor, by its present name."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for (path, gated), order_W in zip(_places(config), plan.order_LW, strict=True):

        def rows(tensor: Tensor, order_W: Tensor = order_W) -> Tensor:
            return tensor.index_select(0, order_W)

        def columns(tensor: Tensor, order_W: Tensor = order_W) -> Tensor:
            return tensor.index_select(1, order_W)

        found |= {f"{path}.{leaf}.{kind}": rows for leaf in inner_names(gated) for kind in ("weight", "bias")}
        found[f"{path}.{outer_name(gated)}.weight"] = columns
    return found
