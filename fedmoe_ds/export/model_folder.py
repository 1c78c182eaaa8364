"""Model folder: a run with adapter experts beside a dense model (FFT-MoE) as a folder with modelling code of its own.

No adapter format has a router, and no dense model of transformers has experts. So the code of the layer goes with the weights
(`modeling_fft_moe.py`, which needs torch and transformers alone), and everything else is the base model's.

    tensors of the base            under the base's names, block by block out of its files; LoRA on projections is merged
    <block>.adapter_experts.       router [E, D], inner [E, H, D], outer [E, D, H] of every feed-forward block

Legend: E experts, D model width, H width of an expert.

A rescaler s (FLAME) is folded into the outer matrices: y = FFN(x) + s sum_m g_m V_m a_m is linear in V. How many experts a tier
activates is `top_k` of the section `adapter_moe` in config.json.
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

from fedmoe_ds.config.yaml12 import inline_yaml
from fedmoe_ds.errors import UserError
from fedmoe_ds.export import modeling_fft_moe as modeling
from fedmoe_ds.export.loading import HERE, shell
from fedmoe_ds.export.merge import Learnt, Rounding, plan_changes
from fedmoe_ds.export.merged import check_room, check_selection, merged_content, merging_notes, write_beside
from fedmoe_ds.export.shards import write_shards
from fedmoe_ds.export.written import Request, Written
from fedmoe_ds.foundation.own_code import SETTINGS, tokenizer_classes
from fedmoe_ds.foundation.tokenizer import load_tokenizer
from fedmoe_ds.foundation.weight_files import WeightFiles
from fedmoe_ds.foundation.weight_stream import StoredTensor, WeightStream
from fedmoe_ds.model.adapter_moe_layer import INNER, OUTER
from fedmoe_ds.model.moe_layer import ROUTER
from fedmoe_ds.results import TrainedRun
from fedmoe_ds.storage.files import write_whole
from fedmoe_ds.storage.strict_json import read_json

CODE = Path(modeling.__file__)
ENTRIES = {
    "causal_lm": ("AutoModelForCausalLM", modeling.FFTMoEForCausalLM),
    "image_classification": ("AutoModelForImageClassification", modeling.FFTMoEForImageClassification),
}
"""By task: the class that users load a model with, and what it finds in the modelling file."""
_TYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
"""Names of the types that experts are written in: what the run computed in."""

Parts = Callable[[], Iterable[Tensor]]
"""The content of a tensor, block by block."""


def write_model_folder(request: Request) -> Written:
    """Write a model with adapter experts into an empty folder.

    Raises:
        UserError: the model uses some of its experts alone, or they have a form that the folder's code lacks; a file is
            damaged, or the disk has no room.
        OSError: the folder cannot be written.
    """
    check_selection(request)
    _check_forms(request)
    run, out = request.run, request.out
    assert run.config.adapters.moe is not None, "a run without adapter experts is merged into its base"
    files, learnt, told = WeightFiles(run.model), Learnt(run, request.selection), Rounding()
    stream, (changes, _) = WeightStream(files), plan_changes(run, learnt, files)
    base = {tensor.present: tensor for tensor in _wanted(run, stream)}
    experts = dict(_expert_tensors(run, learnt))
    # A class of the folder's own gets no renaming of old names, and files of ViT still have them.
    tensors = [replace(tensor, name=name) for name, tensor in base.items()] + list(experts)
    check_room(tensors, out)
    parts = {tensor.name: content for tensor, content in experts.items()}

    def content(tensor: StoredTensor) -> Iterable[Tensor]:
        stored = base.get(tensor.name)
        return parts[tensor.name]() if stored is None else merged_content(stored, stream, changes, learnt, told)

    shards = write_shards(out, tensors, content)
    write_beside(request, _config(request))
    shutil.copyfile(CODE, out / CODE.name)
    if run.outline.task == "causal_lm":
        _name_tokenizer(run, out)
    said = f"{len(tensors)} tensors in {len(shards)} file{'' if len(shards) == 1 else 's'}, and {CODE.name}"
    return Written("transformers", said, _loading(request), tuple(merging_notes(request, stream, told)))


def _check_forms(request: Request) -> None:
    """Raise UserError for forms of experts that the modelling file does not have."""
    moe = request.run.config.adapters.moe
    assert moe is not None
    for key in ("linear", "shared", "zero", "router_input"):
        if (value := getattr(moe, key)) != type(moe).model_fields[key].default:
            raise UserError(
                f"--format: merged: the run has adapters.moe.{key}={inline_yaml(value)}, which the modelling file of adapter "
                "experts does not have; start from the run itself (adapters.start)"
            )


def _wanted(run: TrainedRun, stream: WeightStream) -> list[StoredTensor]:
    """The base's tensors without second names of tied ones and what models compute by themselves."""
    model: Any = run.outline.model
    names = set(model.state_dict()) - set(model.all_tied_weights_keys)
    return [tensor for tensor in stream.tensors if tensor.present in names]


def _expert_tensors(run: TrainedRun, learnt: Learnt) -> Iterator[tuple[StoredTensor, Parts]]:
    stored, dtype = _TYPES[run.config.foundation.dtype]
    experts = run.spec.expert_layout.num_experts

    def router(layer: int) -> Iterator[Tensor]:
        yield _there(learnt, ROUTER, layer, None).to(dtype)

    def stacked(name: str, layer: int) -> Iterator[Tensor]:
        factor = learnt.rescaler(layer) if name == OUTER else 1.0
        for expert in range(experts):
            value = _there(learnt, name, layer, expert)
            yield (value if factor == 1.0 else value * factor).to(dtype)

    for site in run.outline.sites:
        for leaf, shape, content in (
            ("router", learnt.blocks[ROUTER].item, partial(router, site.index)),
            ("inner", (experts, *learnt.blocks[INNER].item), partial(stacked, INNER, site.index)),
            ("outer", (experts, *learnt.blocks[OUTER].item), partial(stacked, OUTER, site.index)),
        ):
            name = f"{site.path}.adapter_experts.{leaf}"
            yield StoredTensor(name, name, shape, stored, run.checkpoint), content


def _there(learnt: Learnt, name: str, layer: int, expert: int | None) -> Tensor:
    value = learnt.whole(name.rpartition(".")[0], layer, expert)
    assert value is not None, "a run with adapter experts has them in every layer"
    return value


def _config(request: Request) -> dict[str, Any]:
    """What config.json says other than the base's: the section of the experts, and the classes of the modelling file."""
    run = request.run
    moe, (auto_class, entry) = run.config.adapters.moe, ENTRIES[run.outline.task]
    assert moe is not None
    classes = {"AutoConfig": modeling.FFTMoEConfig, auto_class: entry}
    return {
        "model_type": modeling.MODEL_TYPE,
        "architectures": [entry.__name__],
        # In the place of code of the base's own folder, which no run has used.
        "auto_map": {auto: f"{CODE.stem}.{found.__name__}" for auto, found in classes.items()},
        # What the run computed in, whatever the base's files are stored in.
        "dtype": run.config.foundation.dtype,
        "transformers_version": transformers.__version__,
        modeling.SECTION: {
            "base": run.spec.model_type,
            "experts": moe.experts,
            "width": moe.width,
            "top_k": request.top_k,
        },
    }


def _name_tokenizer(run: TrainedRun, out: Path) -> None:
    """Say in the tokenizer's settings which class the run's tokenizer is of.

    transformers goes by the model's type too, for some types against these settings; of this type it knows nothing.
    """
    if tokenizer_classes(out):  # code of its own names itself
        return
    tokenizer = load_tokenizer(run.model, run.spec.size.vocabulary, run.config.foundation.trust_remote_code)
    file = out / SETTINGS
    settings = read_json(file, constants=True) if file.is_file() else {}
    settings["tokenizer_class"] = type(tokenizer).__name__
    write_whole(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _loading(request: Request) -> str:
    """Markdown for the card."""
    auto_class, _ = ENTRIES[request.run.outline.task]
    code = f'from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("{HERE}", trust_remote_code=True)'
    parts = [
        f"With transformers 5. `{CODE.name}` in this folder is Python code that runs when the model is loaded; it imports "
        "torch and transformers and nothing else:",
        f"```python\n{code}\n```",
        f"It computes in {request.run.config.foundation.dtype}, as the run did, unless `dtype` says otherwise.",
    ]
    if request.run.outline.task == "causal_lm":
        arguments = f"pretrained={HERE},trust_remote_code=True"
        parts += [
            "With lm-evaluation-harness:",
            shell([f"lm_eval --model hf --model_args {arguments}", "--tasks arc_easy"]),
            "vLLM and SGLang do not know this architecture. Whether what they do with models of transformers' own code serves "
            "it, too, was not tried: count on transformers alone.",
        ]
    return "\n\n".join(parts)
