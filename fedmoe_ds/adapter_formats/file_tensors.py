"""File tensors: those of a LoRA file by layer and target, checked to be complete, and how ours are made from them.

Legend: E experts, R rank of the file, F expert width, I and O input and output width of a projection.

Ours have one A for gate and up of an expert. Where a file has one for each and they differ, they are joined, at twice the rank:

    A13 = [A_gate; A_up]  [2R, I]        B13 = [[B_gate, 0], [0, B_up]]  [2F, 2R]

which adds the same products, and no others. The fused format is described in `lora_file.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmoe_ds.adapter_formats.adapter_config import LoRAConfig
from fedmoe_ds.adapter_formats.lora_file import DOWN, GATE_UP, PREFIX
from fedmoe_ds.adapter_formats.module_names import Place, place_of
from fedmoe_ds.errors import UserError


@dataclass(frozen=True)
class Ours:
    """One of our tensors: its shape, and how it is read."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class _Stored:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]


_Module = tuple[int | None, str]
"""Expert and branch (`gate`, `up`, `down`) of a key of one expert; (None, "") for all others."""
_ALONE: _Module = (None, "")


class FileTensors:
    """The tensors of an opened safetensors file.

    Attributes:
        fused: whether all experts of a layer share one pair.
        experts: of a layer; 0 without any.
        ranks: LoRA rows of ours by target.
        ours: by canonical key.
    Raises:
        UserError: from the constructor, beginning with `where`: a tensor is unknown, missing, or of a wrong shape.
    """

    def __init__(self, where: str, file: Any, config: LoRAConfig) -> None:
        self.where, self.file, self.config = where, file, config
        self._last: tuple[str, Tensor] | None = None
        # (layer, target) -> (expert, branch), half -> tensor
        self.found: dict[tuple[int, str], dict[tuple[_Module, str], _Stored]] = {}
        kinds = {self._take(name) for name in sorted(file.keys())} - {None}
        if not self.found:
            raise UserError(f"{where}: holds no tensors; get the file again")
        if len(kinds) > 1:
            raise UserError(f"{where}: has keys of single experts and of fused ones; give an adapter with one of the two")
        self.fused = True in kinds
        self._check_targets()
        self.experts = self._count_experts()
        self.ranks = {target: self._rank(target) for _, target in sorted(self.found)}
        self.ours: dict[str, Ours] = {}
        for layer, target in sorted(self.found):
            self.ours |= self._canonical(layer, target)

    # Sorting

    def _take(self, name: str) -> bool | None:
        """Sort a tensor in; whether it is of fused experts, None: of none."""
        stem, _, tail = name.rpartition(".lora_")
        place = self._place(stem) if tail in ("A.weight", "B.weight") else None
        if place is None:
            raise self._refusal(name, "is no LoRA tensor of a module that can be adapted here; give an adapter without it")
        shape = tuple(self.file.get_slice(name).get_shape())
        if len(shape) != 2:
            raise self._refusal(name, f"shape {shape}: expected two axes; get the file again")
        entry, key = self.found.setdefault((place.layer, place.target), {}), ((place.expert, place.branch), tail[0])
        # Names of two ages can mean one module.
        if key in entry:
            raise self._refusal(name, f"is {entry[key].name} under another name; leave one of them")
        entry[key] = _Stored(name, shape)
        return place.fused if place.target in (GATE_UP, DOWN) else None

    def _place(self, stem: str) -> Place | None:
        return place_of(stem.removeprefix(PREFIX)) if stem.startswith(PREFIX) else None

    def _check_targets(self) -> None:
        """Experts are adapted whole, and the configuration's parameters are those of the tensors."""
        for layer, target in self.found:
            other = {GATE_UP: DOWN, DOWN: GATE_UP}.get(target)
            if other is not None and (layer, other) not in self.found:
                raise UserError(
                    f"{self.where}: layer {layer} adapts {target} and not {other}: here experts are adapted whole; give an "
                    "adapter of all their projections"
                )
        named = {name.rpartition(".")[2] for name in self.config.parameters}
        if named != ({"gate_up_proj", "down_proj"} if self.fused else set()):
            raise UserError(
                f"{self.where}: the configuration's target_parameters are {self.config.parameters}, which are not those of the "
                "tensors; give two files that belong together"
            )

    def _count_experts(self) -> int:
        sizes = {self._size(layer, target) for layer, target in self.found if target in (GATE_UP, DOWN)}
        if len(sizes) > 1:
            raise UserError(f"{self.where}: layers have {sorted(sizes)} experts; all need as many")
        return sizes.pop() if sizes else 0

    def _size(self, layer: int, target: str) -> int:
        """Experts of a layer."""
        stored = self.found[layer, target]
        if self.fused:
            rank, a = self._stored_rank(target), self._half(layer, target, _ALONE, "A")
            if a.shape[0] % rank or not a.shape[0]:
                raise self._refusal(a.name, f"shape {a.shape}: expected {rank} rows for every expert; get the file again")
            return a.shape[0] // rank
        ids = {expert for (expert, _), _ in stored if expert is not None}
        # Not a range up to the largest: somebody else wrote it.
        missing = next(e for e in itertools.count() if e not in ids)
        if missing < len(ids):
            raise UserError(
                f"{self.where}: layer {layer}: {target}: expert {missing} is missing; all experts of a layer are needed"
            )
        return len(ids)

    def _stored_rank(self, target: str) -> int:
        """LoRA rows of one expert's or projection's pair in the file."""
        return self.config.rank * (self.config.gate_up_factor if target == GATE_UP else 1)

    def _rank(self, target: str) -> int:
        """LoRA rows of ours: twice the file's where A of gate and up differ somewhere."""
        rank = self._stored_rank(target)
        if target != GATE_UP or self.fused:
            return rank
        for layer in sorted(layer for layer, found in self.found if found == GATE_UP):
            for e in range(self.experts):
                gate, up = (self._half(layer, target, (e, branch), "A") for branch in ("gate", "up"))
                if gate.shape != up.shape:
                    raise self._refusal(up.name, f"shape {up.shape}, but {gate.name} has {gate.shape}; get the file again")
                if not torch.equal(self._get(gate), self._get(up)):
                    return 2 * rank
        return rank

    # Ours

    def _canonical(self, layer: int, target: str) -> dict[str, Ours]:
        part, _, name = target.partition(".")
        if part != "experts":
            return self._plain(f"layers.{layer}.{target}", layer, target, _ALONE)
        keys = [f"layers.{layer}.experts.{e}.{name}" for e in range(self.experts)]
        if self.fused:
            return self._unfused(keys, layer, target)
        found: dict[str, Ours] = {}
        for e, key in enumerate(keys):
            if target == DOWN:
                found |= self._plain(key, layer, target, (e, "down"))
            else:
                found |= self._joined(key, layer, target, e)
        return found

    def _plain(self, key: str, layer: int, target: str, module: _Module) -> dict[str, Ours]:
        a, b = self._pair(layer, target, module, self._stored_rank(target))
        return {f"{key}.lora_A": Ours(a.shape, lambda: self._get(a)), f"{key}.lora_B": Ours(b.shape, lambda: self._get(b))}

    def _joined(self, key: str, layer: int, target: str, e: int) -> dict[str, Ours]:
        stored, rank = self._stored_rank(target), self.ranks[target]
        (a_gate, b_gate), (a_up, b_up) = (self._pair(layer, target, (e, branch), stored) for branch in ("gate", "up"))
        if b_gate.shape != b_up.shape:
            raise self._refusal(b_up.name, f"shape {b_up.shape}, but {b_gate.name} has {b_gate.shape}; get the file again")

        def a() -> Tensor:
            return self._get(a_gate) if rank == stored else torch.cat([self._get(a_gate), self._get(a_up)])

        def b() -> Tensor:
            halves = self._get(b_gate), self._get(b_up)
            if rank == stored:
                return torch.cat(halves)
            joined: Tensor = torch.block_diag(*halves)  # type: ignore[no-untyped-call]
            return joined

        shape_a, shape_b = (rank, a_gate.shape[1]), (2 * b_gate.shape[0], rank)
        return {f"{key}.lora_A": Ours(shape_a, a), f"{key}.lora_B": Ours(shape_b, b)}

    def _unfused(self, keys: list[str], layer: int, target: str) -> dict[str, Ours]:
        rank, experts = self._stored_rank(target), self.experts
        a, b = self._pair(layer, target, _ALONE, rank * experts)

        def of(e: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
            # Row e * R + j of A, column j * E + e of B.
            return lambda: self._rows(a, slice(e * rank, (e + 1) * rank)), lambda: self._get(b)[:, e::experts]

        found: dict[str, Ours] = {}
        for e, key in enumerate(keys):
            make_a, make_b = of(e)
            found[f"{key}.lora_A"] = Ours((rank, a.shape[1]), make_a)
            found[f"{key}.lora_B"] = Ours((b.shape[0], rank), make_b)
        return found

    # Single tensors

    def _pair(self, layer: int, target: str, module: _Module, rank: int) -> tuple[_Stored, _Stored]:
        """A and B of one module, of this rank over all experts that they hold."""
        a, b = (self._half(layer, target, module, half) for half in "AB")
        for there, rows in ((a, a.shape[0]), (b, b.shape[1])):
            if rows != rank:
                raise self._refusal(there.name, f"shape {there.shape}: its rank is {rows}, not {rank}; a run has one rank")
        return a, b

    def _half(self, layer: int, target: str, module: _Module, half: str) -> _Stored:
        there = self.found[layer, target].get((module, half))
        if there is None:
            expert, branch = module
            place = f"layer {layer}: {target}" + ("" if expert is None else f": expert {expert}: {branch}_proj")
            raise self._refusal(place, f"lora_{half} is missing; get the file again")
        return there

    def _get(self, there: _Stored) -> Tensor:
        # The experts of a layer are asked for one after the other, and B of all of them is one tensor if they are fused.
        if self._last is None or self._last[0] != there.name:
            self._last = there.name, self._checked(there, self.file.get_tensor(there.name))
        return self._last[1]

    def _rows(self, there: _Stored, rows: slice) -> Tensor:
        return self._checked(there, self.file.get_slice(there.name)[rows])

    def _checked(self, there: _Stored, value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.itemsize < 2:
            raise self._refusal(there.name, f"is {value.dtype}; give weights that are not quantised")
        return value

    def _refusal(self, name: str, why: str) -> UserError:
        return UserError(f"{self.where}: {name}: {why}")
