"""Sharded loading: a rank reads the dense weights and its own experts, nothing else, straight into their final memory.

The model is built on the meta device, its experts are hosted there, and only then memory is allocated: one copy of
every dense tensor and 1/ep_size of every expert tensor. Each read goes from the safetensors file into that memory.

Shape suffixes: L local experts, D hidden size, F expert FFN size, G = 2F.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.dense import is_dense, type_task
from fedmoe_ds.foundation.hosting import HostedLayer, host_experts

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Checkpoints from before transformers 5 store one tensor per expert, under family names; in the model they are fused.
_OLD_NAMES = (
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"\.experts\.(\d+)\.w1\.weight$"), r".experts.\1.gate_proj.weight"),
    (re.compile(r"\.experts\.(\d+)\.w3\.weight$"), r".experts.\1.up_proj.weight"),
    (re.compile(r"\.experts\.(\d+)\.w2\.weight$"), r".experts.\1.down_proj.weight"),
    # ViT files still have the names from before transformers 5, and transformers goes on writing them.
    (re.compile(r"^vit\.encoder\.layer\."), "vit.layers."),
    (re.compile(r"^(vit\.layers\.\d+\.attention)\.attention\.query\."), r"\1.q_proj."),
    (re.compile(r"^(vit\.layers\.\d+\.attention)\.attention\.key\."), r"\1.k_proj."),
    (re.compile(r"^(vit\.layers\.\d+\.attention)\.attention\.value\."), r"\1.v_proj."),
    (re.compile(r"^(vit\.layers\.\d+\.attention)\.output\.dense\."), r"\1.o_proj."),
    (re.compile(r"^(vit\.layers\.\d+)\.intermediate\.dense\."), r"\1.mlp.fc1."),
    (re.compile(r"^(vit\.layers\.\d+)\.output\.dense\."), r"\1.mlp.fc2."),
)
# Some checkpoints carry what models compute, or a pooler that a ViT classifier reads nothing from.
_UNUSED = re.compile(r"rotary_emb\.inv_freq$|^vit\.pooler\.")

# Every page read from a mapped file counts as resident memory until the file is closed: reopen after this many bytes.
_BYTES_PER_OPEN = 64 * 2**20


@dataclass(frozen=True)
class Read:
    """One tensor (or some of its leading rows) of the checkpoint and the memory that receives it."""

    name: str
    target: Tensor
    rows: slice | None = None


class WeightFiles:
    """Which safetensors file of a model folder holds which tensor, under the names of the transformers 5 model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX_FILE
        if index.is_file():
            stored = {name: folder / file for name, file in _read_json(index)["weight_map"].items()}
        elif (folder / WEIGHTS_FILE).is_file():
            with _open(folder / WEIGHTS_FILE) as file:
                stored = dict.fromkeys(file.keys(), folder / WEIGHTS_FILE)
        else:
            raise UserError(f"foundation.path: {folder}: holds no {WEIGHTS_FILE}; save the model with safetensors")
        self.list = index if index.is_file() else folder / WEIGHTS_FILE
        self.where = {_new_name(name): (path, name) for name, path in stored.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.where

    @property
    def paths(self) -> list[Path]:
        """All weight files, in name order."""
        return sorted({path for path, _ in self.where.values()})

    def load(self, reads: list[Read]) -> None:
        """Fill every target, file by file, converting to its dtype and device.

        Raises:
            UserError: a tensor or file is missing, damaged, quantised or of another shape.
        """
        missing = sorted({read.name for read in reads if read.name not in self.where})
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(f"foundation.path: {self.list}: no tensor '{missing[0]}'{more}; get the whole model")
        for path, batch in self._batches(reads):
            with _open(path) as file:
                for read in batch:
                    self._copy(file, path, read)

    def _batches(self, reads: list[Read]) -> Iterator[tuple[Path, list[Read]]]:
        by_file: dict[Path, list[Read]] = {}
        for read in reads:
            by_file.setdefault(self.where[read.name][0], []).append(read)
        for path in sorted(by_file):
            batch: list[Read] = []
            size = 0
            for read in by_file[path]:
                batch.append(read)
                size += read.target.nbytes
                if size >= _BYTES_PER_OPEN:
                    yield path, batch
                    batch, size = [], 0
            yield path, batch

    def _copy(self, file: Any, path: Path, read: Read) -> None:
        stored = self.where[read.name][1]
        try:
            source: Tensor = file.get_tensor(stored) if read.rows is None else file.get_slice(stored)[read.rows]
        except SafetensorError as error:
            raise UserError(f"foundation.path: {path}: tensor '{stored}' cannot be read: {error}") from error
        if not source.is_floating_point() or source.itemsize < 2:
            raise UserError(
                f"foundation.path: {path}: tensor '{stored}' is {source.dtype}; give weights that are not quantised"
            )
        if source.shape != read.target.shape:
            raise UserError(
                f"foundation.path: {path}: tensor '{stored}' has shape {tuple(source.shape)}, {CONFIG_FILE} implies "
                f"{tuple(read.target.shape)}; config and weights belong to different models"
            )
        read.target.copy_(source)


def load_model(
    folder: Path, dtype: torch.dtype, ep_size: int, ep_rank: int, device: torch.device
) -> tuple[nn.Module, list[HostedLayer]]:
    """Load a model whose experts are split over ep_size ranks; frozen, in eval mode, on `device`.

    A dense model is whole on every rank and has no hosted layers.

    Raises:
        UserError: the folder holds no loadable model of a known family, or ep_size does not divide its experts.
    """
    model = build_on_meta(folder, dtype)
    layers = host_model(model, ep_size, ep_rank)
    files = WeightFiles(folder)
    reads = _allocate_dense(model, layers, device)
    for layer in layers:
        reads += _allocate_experts(layer, files, dtype, device)
    _refuse_unknown(files, model, layers, reads)
    with torch.no_grad():
        files.load(reads)
    model.tie_weights()
    _move_buffers(model, device)
    left = [name for name, tensor in _all_tensors(model) if tensor.is_meta]
    assert not left, f"never loaded: {left}"
    return model.requires_grad_(False).eval(), layers


def host_model(model: Any, ep_size: int, ep_rank: int) -> list[HostedLayer]:
    """Host the experts of a sparse model; of a dense one there are none. Freezes the model; see `host_experts`."""
    if not is_dense(model):
        return host_experts(model, ep_size, ep_rank)
    model.requires_grad_(False)
    return []


def read_config(folder: Path) -> Any:
    """The transformers configuration of a model folder."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"foundation.path: {folder}: {CONFIG_FILE} cannot be used: {first_line(error)}") from error


def build_on_meta(folder: Path, dtype: torch.dtype) -> Any:
    """Build the model of `folder/config.json` with its parameters on the meta device and its buffers on the CPU."""
    config = read_config(folder)
    if getattr(config, "quantization_config", None):
        raise UserError(f"foundation.path: {folder}: the weights are quantised; give a model that is not")
    factory: Any = AutoModelForImageClassification
    if type_task(config.model_type) == "causal_lm":
        factory = AutoModelForCausalLM
        config.use_cache = False
        config.output_router_logits = False  # the hosted router reports its logits itself, not through transformers
    try:
        with init_empty_weights(include_buffers=False):
            model = factory.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError as error:
        raise UserError(
            f"foundation.path: {folder}: model_type '{config.model_type}' is no causal language model and no ViT: "
            f"{first_line(error)}"
        ) from error
    model.config._name_or_path = str(folder)
    return model


def _allocate_dense(model: Any, layers: list[HostedLayer], device: torch.device) -> list[Read]:
    """Give every tensor that is not an expert's real memory; return where each comes from."""
    experts = {f"{layer.name}.experts.{leaf}" for layer in layers for leaf in ("w1", "w2", "w3")}
    skip = experts | set(model.all_tied_weights_keys)
    reads = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in skip:
            continue
        target = torch.empty_like(tensor, device=device, dtype=_storage_dtype(model, name, tensor), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(tensor, nn.Parameter):
            parameter = nn.Parameter(target, requires_grad=False)
            parameter.__dict__.update(tensor.__dict__)
            target, module._parameters[leaf] = parameter.data, parameter
        else:
            module._buffers[leaf] = target
        reads.append(Read(_source_name(name, layers), target))
    return reads


def _allocate_experts(layer: HostedLayer, files: WeightFiles, dtype: torch.dtype, device: torch.device) -> list[Read]:
    """Allocate this rank's experts of one layer; return the reads that fill them, expert by expert."""
    w13_LGD = torch.empty(layer.w13.shape, dtype=dtype, device=device)
    w2_LDF = torch.empty(layer.w2.shape, dtype=dtype, device=device)
    layer.bind(w13_LGD, w2_LDF)
    layer.bind_counter(device)
    source = layer.source_names[f"{layer.name}.experts."]
    fused = f"{source}gate_up_proj" in files
    reads = []
    for local, expert in enumerate(layer.experts):
        if fused:
            rows = slice(expert, expert + 1)
            reads.append(Read(f"{source}gate_up_proj", w13_LGD[local : local + 1], rows))
            reads.append(Read(f"{source}down_proj", w2_LDF[local : local + 1], rows))
        else:
            gate_FD, up_FD = w13_LGD[local].chunk(2)
            reads.append(Read(f"{source}{expert}.gate_proj.weight", gate_FD))
            reads.append(Read(f"{source}{expert}.up_proj.weight", up_FD))
            reads.append(Read(f"{source}{expert}.down_proj.weight", w2_LDF[local]))
    return reads


def _refuse_unknown(files: WeightFiles, model: Any, layers: list[HostedLayer], reads: list[Read]) -> None:
    """Refuse a checkpoint with a tensor that no rank would read: its config and weights disagree."""
    known = {read.name for read in reads} | set(model.all_tied_weights_keys)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for layer in layers:
        source = layer.source_names[f"{layer.name}.experts."]
        for expert in range(layer.num_experts):
            known |= {f"{source}{expert}.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj")}
    for name, (path, stored) in files.where.items():
        if name not in known and not any(pattern.search(name) for pattern in (_UNUSED, *ignored)):
            raise UserError(
                f"foundation.path: {path}: tensor '{stored}' has no place in a '{model.config.model_type}' model; "
                "config and weights belong to different models"
            )


def _source_name(name: str, layers: list[HostedLayer]) -> str:
    for layer in layers:
        for hosted, source in layer.source_names.items():
            if name.startswith(hosted):
                return source + name.removeprefix(hosted)
    return name


def _storage_dtype(model: Any, name: str, tensor: Tensor) -> torch.dtype:
    """Some families keep a few tensors in float32 whatever the model's dtype (DeepSeek-V3: the router's bias)."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return torch.float32 if any(pattern in name for pattern in strict) else tensor.dtype


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _new_name(name: str) -> str:
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"foundation.path: {path}: missing weight file; get the whole model") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"foundation.path: {path}: damaged weight file: {first_line(error)}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"foundation.path: {path}: cannot be read: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a one-line report."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
