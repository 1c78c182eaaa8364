"""Model folder: a run with adapter experts beside a dense model (FFT-MoE) as a folder with modelling code of its own.

No adapter format has a router, and no dense model of transformers has experts. So the code of the layer goes with the weights
(`modeling_fft_moe.py`, which needs torch and transformers alone), and the base model's class is taken as it is.

    tensors of the base          under the base's names, block by block out of its files; LoRA on projections is merged into them
    <block>.adapter_experts.     router [E, D], inner [E, H, D], outer [E, D, H] of every feed-forward block

Legend: E experts, D model width, H width of an expert.

A rescaler s (FLAME) is folded into the outer matrices: y = FFN(x) + s sum_m g_m V_m a_m is linear in V. What a tier may activate
is `top_k` of the section `adapter_moe` in config.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from fedmoe_ds.export import modeling_fft_moe as modeling
from fedmoe_ds.export.merge import Learnt, Rounding, plan_changes
from fedmoe_ds.export.shards import write_shards
from fedmoe_ds.foundation.meta_model import CONFIG_FILE
from fedmoe_ds.foundation.tokenizer import load_tokenizer
from fedmoe_ds.foundation.weight_files import WeightFiles
from fedmoe_ds.foundation.weight_stream import StoredTensor, WeightStream
from fedmoe_ds.model.adapter_moe_layer import INNER, OUTER
from fedmoe_ds.model.lora_linear import find_projections
from fedmoe_ds.model.moe_layer import ROUTER
from fedmoe_ds.results import Selection, TrainedRun
from fedmoe_ds.storage.strict_json import read_json

CODE = Path(modeling.__file__)
ENTRIES = {
    "causal_lm": ("AutoModelForCausalLM", modeling.FFTMoEForCausalLM),
    "image_classification": ("AutoModelForImageClassification", modeling.FFTMoEForImageClassification),
}
"""By task: the class that users load a model with, and what it finds in the modelling file."""
_TYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
"""safetensors' and torch's names of the types that adapters are written in: the type that the run computed in."""

Source = Callable[[], Iterable[Tensor]]
"""The content of a tensor, block by block."""


def write_model(run: TrainedRun, selection: Selection, out: Path) -> Rounding:
    """Write the model of a tier or client into an empty folder.

    Returns:
        How much of what was learnt the type of the base's files had no room for.
    Raises:
        UserError: a file of the base or of the checkpoint is damaged.
        OSError: the folder cannot be written.
    """
    assert run.config.adapters.moe is not None, "a run without adapter experts is merged into its base"
    told, learnt = Rounding(), _learnt(run, selection)
    # Later entries of the same name would take the place of earlier ones: experts and base have no name in common.
    sources = dict(_base_tensors(run, learnt, told)) | dict(_expert_tensors(run, selection, learnt))
    named = {tensor.name: source for tensor, source in sources.items()}
    write_shards(out, list(sources), lambda tensor: named[tensor.name]())
    _write_json(out / CONFIG_FILE, _config(run, selection))
    shutil.copyfile(CODE, out / CODE.name)
    return told


def _learnt(run: TrainedRun, selection: Selection) -> Learnt:
    known = dict(run.items())

    def find(key: str) -> Tensor | None:
        return run.value(key, known[key], selection) if key in known else None

    return Learnt(find, run.base, run.scale(selection), rescale=selection.assignment.rescale or 1.0)


def _base_tensors(run: TrainedRun, learnt: Learnt, told: Rounding) -> Iterator[tuple[StoredTensor, Source]]:
    model: Any = run.outline.model
    files = WeightFiles(run.model)
    stream = WeightStream(files)
    plan = plan_changes(run.spec.blocks, [], find_projections(model, run.config.adapters), files, 1.0)
    # Neither second names of tied tensors, nor what models compute by themselves.
    wanted = set(model.state_dict()) - set(model.all_tied_weights_keys)
    for tensor in stream.tensors:
        if tensor.present not in wanted:
            continue
        read = partial(stream.block, tensor)
        source: Source = partial(_unchanged, tensor, read)
        if tensor.present in plan.changes:
            (change,) = plan.changes[tensor.present]
            source = partial(change.blocks, learnt, read, tensor.blocks(), told)
        # A class of the folder's own gets no renaming of old names: ViT's files still have them.
        yield replace(tensor, name=tensor.present), source


def _unchanged(tensor: StoredTensor, read: Callable[[slice], Tensor]) -> Iterator[Tensor]:
    yield from map(read, tensor.blocks())


def _expert_tensors(run: TrainedRun, selection: Selection, learnt: Learnt) -> Iterator[tuple[StoredTensor, Source]]:
    stored, dtype = _TYPES[run.config.foundation.dtype]
    specs = {spec.name: spec for spec in run.spec.blocks}
    experts = run.spec.expert_layout.num_experts

    def stacked(name: str, layer: int, factor: float) -> Iterator[Tensor]:
        for expert in range(experts):
            value = run.value(specs[name].key(layer, expert), specs[name], selection)
            yield (value if factor == 1.0 else value * factor).to(dtype)

    def router(layer: int) -> Iterator[Tensor]:
        yield run.value(specs[ROUTER].key(layer), specs[ROUTER], selection).to(dtype)

    for site in run.outline.sites:
        factor = learnt.factor(site.index)
        for leaf, shape, source in (
            ("router", specs[ROUTER].item, partial(router, site.index)),
            ("inner", (experts, *specs[INNER].item), partial(stacked, INNER, site.index, 1.0)),
            ("outer", (experts, *specs[OUTER].item), partial(stacked, OUTER, site.index, factor)),
        ):
            name = f"{site.path}.adapter_experts.{leaf}"
            yield StoredTensor(name, name, shape, stored, run.checkpoint), source


def _config(run: TrainedRun, selection: Selection) -> dict[str, Any]:
    """The base's configuration with the section of the experts, and the names of the classes in the modelling file."""
    moe, (auto_class, entry) = run.config.adapters.moe, ENTRIES[run.outline.task]
    assert moe is not None
    tree = read_json(run.model / CONFIG_FILE, constants=True)
    # What said how the base was saved; and code of the base's folder, which no run has used.
    kept = {key: value for key, value in tree.items() if key not in ("auto_map", "torch_dtype", "_name_or_path")}
    classes = {"AutoConfig": modeling.FFTMoEConfig.__name__, auto_class: entry.__name__}
    return kept | {
        "model_type": modeling.MODEL_TYPE,
        "architectures": [entry.__name__],
        "auto_map": {auto: f"{CODE.stem}.{name}" for auto, name in classes.items()},
        # What the run computed in, whatever the base's files are stored in.
        "dtype": run.config.foundation.dtype,
        "transformers_version": transformers.__version__,
        modeling.SECTION: {
            "base": run.spec.model_type,
            "experts": moe.experts,
            "width": moe.width,
            "top_k": selection.assignment.cap,
        },
    }


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
