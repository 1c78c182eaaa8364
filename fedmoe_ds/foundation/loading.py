"""Sharded loading: a rank reads the dense weights and its own experts, nothing else, straight into their final memory.

The model is built on the meta device, its experts are hosted there, and only then memory is provided: one copy of
every dense tensor and 1/ep_size of every expert tensor. Each read goes from the safetensors file into that memory. Whoever
wants other memory than this process's own (`host_sharing.py`) takes the steps of `load_model` one by one.

Shape suffixes: L local experts, D hidden size, F expert FFN size, G = 2F.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedmoe_ds.config.foundation_section import ExpandConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.autoep import HostedLayer
from fedmoe_ds.foundation.channel_groups import GroupedLayer
from fedmoe_ds.foundation.expansion import expansion_of
from fedmoe_ds.foundation.mapped_weights import Memory, Slot
from fedmoe_ds.foundation.meta_model import CONFIG_FILE, build_on_meta, host_model, read_config
from fedmoe_ds.foundation.tensor_names import UNUSED
from fedmoe_ds.foundation.weight_files import INDEX_FILE, WEIGHTS_FILE, Part, Read, WeightFiles


class Skeleton:
    """A frozen model without memory: which tensors it wants, where they come from, and where they belong.

    Attributes:
        model: on the meta device; experts hosted.
        layers: its hosted layers; none in a dense model.
        dense: slots of everything but experts, the same at every ep_size and on every rank; none of further layers, whose
            weights are clients'.
        experts: slots of this rank's experts.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, ep_size: int, ep_rank: int, asked: ExpandConfig | None = None) -> None:
        """Raises UserError: the folder holds no model of a known family, or ep_size does not divide its experts."""
        self.folder = folder
        # Where there are no weights at all, what is wrong with the configuration is told first.
        files = WeightFiles(folder) if any((folder / name).is_file() for name in (INDEX_FILE, WEIGHTS_FILE)) else None
        if files is not None:
            _check_depth(folder, read_config(folder), len(files.where))
        self.model = build_on_meta(folder, dtype, asked)
        self.expansion = expansion_of(self.model, asked)
        self.layers = host_model(self.model, ep_size, ep_rank)
        self.files = files or WeightFiles(folder)
        self.dense = [slot for slot in _dense_slots(self.model, self.layers) if not self._further(slot.name)]
        self.experts = [slot for layer in self.layers for slot in _expert_slots(layer, dtype)]
        _refuse_unknown(self.files, self.model, self.layers, {self._source(slot.name)[0] for slot in self.dense})

    @property
    def slots(self) -> list[Slot]:
        """Everything that this rank holds."""
        return [*self.dense, *self.experts]

    def load(self, device: torch.device) -> Memory:
        """Every slot in memory of this process's own, filled; see `read`."""
        memory = {slot.name: slot.empty(device) for slot in self.slots}
        self.read(memory)
        return memory

    @torch.no_grad()
    def read(self, memory: Memory) -> None:
        """Fill these tensors, all or some of the slots, from the checkpoint.

        Raises:
            UserError: a tensor or file is missing, damaged, quantised or of another shape.
        """
        wanted = [slot.name for slot in self.dense if slot.name in memory]
        reads = [Read(source, memory[name], part) for name in wanted for source, part in [self._source(name)]]
        for layer in self.layers:
            names = _expert_names(layer)
            if names[0] in memory:
                reads += _expert_reads(layer, self.files, memory[names[0]], memory[names[1]])
        self.files.load(reads)

    def bind(self, memory: Memory, device: torch.device) -> nn.Module:
        """Make these tensors, one for every slot, the model's; it is complete, frozen and in eval mode then."""
        for slot in self.dense:
            _replace_tensor(self.model, slot.name, memory[slot.name])
        for layer in self.layers:
            layer.bind(*(memory[name] for name in _expert_names(layer)))
            layer.bind_counter(device)
        # Tied names had no slots: only now they become the tensor that they share.
        self.model.tie_weights()
        # Buffers outside the state dict (rotary tables) were computed on the CPU when the model was built.
        _move_buffers(self.model, device)
        left = [name for name, tensor in _all_tensors(self.model) if tensor.is_meta and not self._further(name)]
        assert not left, f"never loaded: {left}"
        model: nn.Module = self.model.requires_grad_(False).eval()
        return model

    def _further(self, name: str) -> bool:
        return self.expansion is not None and self.expansion.holds(name)

    def _source(self, name: str) -> tuple[str, Part | None]:
        return _source(name if self.expansion is None else self.expansion.source(name), self.layers)


def load_model(
    folder: Path, dtype: torch.dtype, ep_size: int, ep_rank: int, device: torch.device
) -> tuple[nn.Module, list[HostedLayer]]:
    """Load a model whose experts are split over ep_size ranks; frozen, in eval mode, on `device`.

    A dense model is whole on every rank and has no hosted layers.

    Raises:
        UserError: the folder holds no loadable model of a known family, or ep_size does not divide its experts.
    """
    skeleton = Skeleton(folder, dtype, ep_size, ep_rank)
    return skeleton.bind(skeleton.load(device), device), skeleton.layers


def _dense_slots(model: Any, layers: list[HostedLayer]) -> list[Slot]:
    """Every tensor that is not an expert's and no second name of another one."""
    experts = {f"{layer.name}.experts.{leaf}" for layer in layers for leaf in ("w1", "w2", "w3")}
    skip = experts | set(model.all_tied_weights_keys)
    return [
        Slot(name, tuple(tensor.shape), _storage_dtype(model, name, tensor))
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in skip
    ]


def _expert_names(layer: HostedLayer) -> tuple[str, str]:
    return f"{layer.name}.experts.w13", f"{layer.name}.experts.w2"


def _expert_slots(layer: HostedLayer, dtype: torch.dtype) -> list[Slot]:
    shapes = (layer.w13.shape, layer.w2.shape)
    return [Slot(name, tuple(shape), dtype) for name, shape in zip(_expert_names(layer), shapes, strict=True)]


def _expert_reads(layer: HostedLayer, files: WeightFiles, w13_LGD: Tensor, w2_LDF: Tensor) -> list[Read]:
    """What fills this rank's experts of one layer, expert by expert."""
    if isinstance(layer, GroupedLayer):
        return _group_reads(layer, w13_LGD, w2_LDF)
    source = layer.source_names[f"{layer.name}.experts."]
    fused = f"{source}gate_up_proj" in files
    reads = []
    for local, expert in enumerate(layer.experts):
        if fused:
            # Only these rows of the fused tensor are read: the other experts belong to other ranks.
            rows = slice(expert, expert + 1)
            reads.append(Read(f"{source}gate_up_proj", w13_LGD[local : local + 1], rows))
            reads.append(Read(f"{source}down_proj", w2_LDF[local : local + 1], rows))
        else:
            # Views: what is read lands in the two halves of w13.
            gate_FD, up_FD = w13_LGD[local].chunk(2)
            reads.append(Read(f"{source}{expert}.gate_proj.weight", gate_FD))
            reads.append(Read(f"{source}{expert}.up_proj.weight", up_FD))
            reads.append(Read(f"{source}{expert}.down_proj.weight", w2_LDF[local]))
    return reads


def _group_reads(layer: GroupedLayer, w13_LGD: Tensor, w2_LDF: Tensor) -> list[Read]:
    """Of groups of channels: rows of the matrices that lead to them, columns of the one that leads back."""
    reads = []
    for local, expert in enumerate(layer.experts):
        channels = layer.channels(expert)
        halves = w13_LGD[local].chunk(len(layer.inner))
        reads += [Read(f"{layer.name}.{leaf}.weight", half, channels) for leaf, half in zip(layer.inner, halves, strict=True)]
        reads.append(Read(f"{layer.name}.{layer.outer}.weight", w2_LDF[local], (slice(None), channels)))
    return reads


def _replace_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, with the marks that the old one carries."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
        return
    parameter = nn.Parameter(value, requires_grad=False)
    parameter.__dict__.update(module._parameters[leaf].__dict__)
    module._parameters[leaf] = parameter


def _refuse_unknown(files: WeightFiles, model: Any, layers: list[HostedLayer], dense: set[str]) -> None:
    """Refuse a checkpoint with a tensor that no rank would read: its config and weights disagree."""
    known = dense | set(model.all_tied_weights_keys)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for layer in layers:
        if isinstance(layer, GroupedLayer):
            known |= {f"{layer.name}.{leaf}.weight" for leaf in (*layer.inner, layer.outer)}
            continue
        source = layer.source_names[f"{layer.name}.experts."]
        known |= {f"{source}gate_up_proj", f"{source}down_proj"}
        for expert in range(layer.num_experts):
            known |= {f"{source}{expert}.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj")}
    for name, (path, stored) in files.where.items():
        if name not in known and not any(pattern.search(name) for pattern in (UNUSED, *ignored)):
            raise UserError(
                f"foundation.path: {path}: tensor '{stored}' has no place in a '{model.config.model_type}' model; "
                "config and weights belong to different models"
            )


def source_name(name: str, layers: list[HostedLayer]) -> str:
    """What a tensor of the hosted model is called in the model of transformers 5."""
    for layer in layers:
        for hosted, source in layer.source_names.items():
            if name.startswith(hosted):
                return source + name.removeprefix(hosted)
    return name


def _source(name: str, layers: list[HostedLayer]) -> tuple[str, Part | None]:
    """The same, with the part of it that the tensor is; None for all of it."""
    for layer in layers:
        if name in layer.parts:
            return layer.parts[name]
    return source_name(name, layers), None


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


def _check_depth(folder: Path, config: Any, tensors: int) -> None:
    """Every layer has tensors: what cannot be there need not be built first."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > tensors:
        raise UserError(
            f"foundation.path: {folder}: {CONFIG_FILE}: num_hidden_layers: {layers}: the weights have {tensors} tensors; "
            "config and weights belong to different models"
        )
