"""LoRA: a run's adapters as `adapter_model.safetensors` and `adapter_config.json`, in the formats `peft` and `peft-fused`.

A tier of r < R rows is written at rank r, where its rows are the leading ones: alpha says the same scale. What a LoRA file has
no place for is refused before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from fedmoe_ds.adapter_formats import Format, ModuleNames, lora_entries, lora_targets, names_of
from fedmoe_ds.adapter_formats.adapter_config import CONFIG, config_tree
from fedmoe_ds.adapter_formats.lora_file import HEAD_MODULE, WEIGHTS, Entry, head_entry
from fedmoe_ds.clients.assignment import leading
from fedmoe_ds.errors import UserError
from fedmoe_ds.export.loading import lora_loading
from fedmoe_ds.export.merge import Learnt
from fedmoe_ds.export.shards import write_tensors
from fedmoe_ds.export.written import Request, Written, check_pre_gate, check_router_bias, no_masks
from fedmoe_ds.foundation.channel_groups import GroupedLayer
from fedmoe_ds.foundation.weight_stream import StoredTensor
from fedmoe_ds.model.adapter_bank import HEAD, HEAD_BIAS, lora_pairs
from fedmoe_ds.model.adapter_moe_layer import INNER, OUTER
from fedmoe_ds.model.moe_layer import DOWN, GATE_UP, RESCALER, ROUTER

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank (0.33)."""
DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16")}
"""Types of an adapter's tensors, and what safetensors calls them."""

_WHOLE = {
    ROUTER: "a trained router is whole weights",
    **dict.fromkeys((HEAD, HEAD_BIAS), "a trained head is whole weights"),
    **dict.fromkeys((GATE_UP, DOWN), "experts that were trained whole (adapters.expert_training: full) are whole weights"),
    **dict.fromkeys((INNER, OUTER), "adapter experts beside a dense model (adapters.moe) are layers of their own"),
}


def write_lora(fmt: Format, request: Request) -> Written:
    """Write the adapters of one model. Raises UserError where the format cannot hold all of it."""
    run, spec = request.run, request.run.spec
    where = f"--format: {fmt}"
    names = names_of(spec.model_type, where)
    check_carried(where, fmt, names, request)
    rank, alpha = rank_and_alpha(request)
    task = "CAUSAL_LM" if run.outline.task == "causal_lm" else None
    heads = [block for block in spec.blocks if block.after_layers]
    targets = lora_targets(fmt, names, spec.blocks) | ({"modules_to_save": [HEAD_MODULE]} if heads else {})
    tree = config_tree(targets, rank, alpha, request.base, task)
    (request.out / CONFIG).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    places, learnt = dict(run.items()), Learnt(run, request.selection)

    def read(key: str) -> Tensor:
        return learnt.tensor(key, places[key])

    entries = list(lora_entries(fmt, names, spec.blocks, spec.expert_layout.num_experts, rank))
    entries += [head_entry(block) for block in heads]
    dtype, stored = DTYPES[request.dtype or "float32"]
    path = request.out / WEIGHTS
    by_name = {entry.name: entry for entry in entries}

    def content(tensor: StoredTensor) -> Iterator[Tensor]:
        yield _converted(by_name[tensor.name], by_name[tensor.name].make(read), dtype)

    write_tensors(path, [StoredTensor(entry.name, entry.name, entry.shape, stored, path) for entry in entries], content)
    needed = vllm_rank(rank)
    served = names.served and fmt == "peft"
    said = f"LoRA of rank {rank}, alpha {alpha:g}, {len(entries)} tensors"
    if served:
        said += f"; vLLM needs --max-lora-rank {needed}" if needed else f"; vLLM takes no rank above {VLLM_RANKS[-1]}"
    in_peft = loads_in_peft(fmt, names, request)
    notes = (
        () if in_peft else (f"PEFT takes no keys of single experts for a '{spec.model_type}' model, but --format peft-fused.",)
    )
    return Written("peft", said, lora_loading(request, needed if served else None, in_peft), notes)


def rank_and_alpha(request: Request) -> tuple[int, float]:
    """LoRA rows that are written, and the alpha that gives them the scale of the run."""
    adapters, assignment = request.run.config.adapters, request.selection.assignment
    full, rank = adapters.rank, assignment.rank(adapters.rank)
    rows_R, first_R = assignment.rows_R, leading(rank, full)
    # Rows in between cannot be left out of a file that counts them: all are written, those that are not held as zeros.
    if rows_R is not None and first_R is not None and (rows_R != first_R).any():
        rank = full
    # With all rows alpha to the bit, which the way over rank and back would not always give.
    alpha = adapters.alpha * assignment.scale
    return rank, alpha if rank == full else alpha * rank / full


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that holds a rank; None above the largest."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def check_carried(where: str, fmt: Format, names: ModuleNames, request: Request) -> None:
    """Refuse what a LoRA file has no place for; `where` begins the line.

    Raises:
        UserError: with the way out.
    """
    run, selection, out = request.run, request.selection, "use --format merged"
    check_router_bias(run, where)
    check_pre_gate(run, where)
    if run.outline.layers and isinstance(run.outline.layers[0], GroupedLayer) and any(b.expert for b in run.spec.blocks):
        raise UserError(
            f"{where}: a LoRA file has no place for it: groups of channels (foundation.convert) are parts of a block's "
            f"matrices; {out}"
        )
    halves = {half.name for pair in lora_pairs(run.spec.blocks) for half in pair}
    # PEFT takes a whole classifier along (modules_to_save); an output matrix beside LoRA is what no server loads.
    whole = {HEAD, HEAD_BIAS} if halves and run.outline.images is not None else set()
    for block in run.spec.blocks:
        if block.name not in halves | whole | {RESCALER}:
            why = _WHOLE.get(block.name, f"{block.name} is no LoRA pair")
            raise UserError(f"{where}: a LoRA file has no place for it: {why}; {out}")
    if run.spec.method.absorbs:
        raise UserError(
            f"{where}: method {run.config.method.name} moves its products into the base model, so that its adapters alone are "
            f"nothing; {out}"
        )
    holder = "neither a LoRA file nor a model's configuration"
    if (masked := no_masks(selection, run.config.method.name, holder)) is not None:
        raise UserError(f"{where}: {masked}")
    for factor in _factors(request):
        if factor != 1.0:
            whose = "the client" if selection.client is not None else f"tier {selection.tier}"
            raise UserError(
                f"{where}: the rescaler of {whose} multiplies the experts' output by {factor:.6g}, which no LoRA file can say; "
                f"{out}, which folds it into the weights"
            )
    if fmt == "peft" and not names.served and not loads_in_peft(fmt, names, request):
        raise UserError(
            f"{where}: PEFT takes no keys of single experts for a '{run.spec.model_type}' model; use --format peft-fused"
        )


def loads_in_peft(fmt: Format, names: ModuleNames, request: Request) -> bool:
    """Whether PEFT understands the file; of some families only servers take keys of single experts."""
    return fmt == "peft-fused" or names.converted or not any(block.expert for block in request.run.spec.blocks)


def _factors(request: Request) -> Iterator[float]:
    """What FLAME's rescaler multiplies by, fixed or learnt."""
    run, selection = request.run, request.selection
    if selection.assignment.rescale is not None:
        yield selection.assignment.rescale
    for block in run.spec.blocks:
        if block.name == RESCALER:
            yield from (float(run.value(block.key(layer), block, selection)) for layer in block.layers)


def _converted(entry: Entry, value: Tensor, dtype: torch.dtype) -> Tensor:
    assert tuple(value.shape) == entry.shape, (entry.name, value.shape, entry.shape)
    converted = value.to(dtype)
    # float16 ends at 65504, and a file with infinities would be loaded without a word.
    if not converted.isfinite().all():
        raise UserError(f"--dtype: {dtype}: {entry.name} has numbers that it cannot hold; use float32")
    return converted
