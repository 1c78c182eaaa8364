"""Adapter bank: every trainable of every client in flight, stacked.

Legend: L layers, E experts held by this rank, C clients in flight, R adapter rank.

A block is one kind of trainable over all layers. Expert blocks have the shape [L, E, C, *item], because an expert's rows from
all clients of the wave meet on the rank that holds it; dense blocks have the shape [L, C, *item], because a client's dense part
lives on its home rank alone. Values and gradients are plain fp32 tensors: the kernels write gradients in place, and the
client optimizer runs over whole blocks. Where rows are bfloat16, products read copies of the values (`Bank.value_in`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROUTER_BIAS = "router_bias"
"""Name of the block of what is added to the routers' logits, one number per expert; the server's, no client trains it."""

HEAD, HEAD_BIAS = "head.weight", "head.bias"
"""Names of the blocks of a trained head: what makes logits of hidden states, after all layers."""


OWNED = "expanded."
"""What names of blocks begin with that are whole weights of further layers, in which every client has its own."""


def base_block(a: BlockSpec, b: BlockSpec) -> BlockSpec:
    """The frozen weight under a LoRA pair, as the server keeps it once products move into it."""
    return BlockSpec(f"{a.pair}.base", a.layers, (b.item[0], a.item[1]), expert=a.expert, trained=False)


def remembered_block(spec: BlockSpec, word: str) -> BlockSpec:
    """Where a client remembers something of the shape of a block that it trains; `word` says what."""
    head, _, tail = spec.name.partition(".")
    return replace(spec, name=f"{head}.{word}.{tail}" if tail else f"{head}.{word}", personal=True, trained=False)


def control_block(spec: BlockSpec) -> BlockSpec:
    """Where a client remembers its control variate of a block."""
    return remembered_block(spec, "control")


def shared_blocks(specs: Iterable[BlockSpec]) -> list[BlockSpec]:
    """The blocks that are trained and averaged."""
    return [spec for spec in specs if spec.trained and not spec.personal]


@dataclass(frozen=True)
class BlockSpec:
    """One kind of trainable.

    Attributes:
        name: canonical name, for instance `experts.gate_up.lora_A`.
        layers: model layers that carry it; `(-1,)` when one copy serves the whole model.
        item: shape of one client's parameter in one layer (for expert blocks: of one expert).
        expert: whether there is one per expert.
        personal: stays with the client; never aggregated, never in the global model.
        decay: whether weight decay applies.
        trained: False for what clients only read (a frozen half of a LoRA pair): no optimizer, no aggregation.
        axis: what `layers` count: layers, or the keys of a statistic (`aggregation/averaged_statistics.py`).
    """

    name: str
    layers: tuple[int, ...]
    item: tuple[int, ...]
    expert: bool = False
    personal: bool = False
    decay: bool = True
    trained: bool = True
    axis: str = "layers"

    @property
    def owned(self) -> bool:
        """Whether it is a weight of further layers, and beside no frozen one."""
        return self.name.startswith(OWNED)

    @property
    def after_layers(self) -> bool:
        """Whether it is a part of the head: its gradient comes through no layer."""
        return self.name in (HEAD, HEAD_BIAS)

    @property
    def pair(self) -> str | None:
        """The LoRA pair that this block is one half of, or None."""
        stem, _, tail = self.name.rpartition(".")
        return stem if tail in ("lora_A", "lora_B") else None

    @property
    def rank_axis(self) -> int | None:
        """The axis of `item` that counts LoRA rows: A is [R, in], B is [out, R]; None for other blocks."""
        return None if self.pair is None else (0 if self.name.endswith("_A") else 1)

    def key(self, layer: int, expert: int | None = None) -> str:
        """Canonical tensor name: layer and *global* expert id, so that checkpoints do not know the topology."""
        head, _, tail = self.name.partition(".")
        place = "model" if layer < 0 else f"{self.axis}.{layer}"
        if expert is None:
            return f"{place}.{self.name}"
        return f"{place}.{head}.{expert}.{tail}"


def lora_pairs(specs: Iterable[BlockSpec]) -> list[tuple[BlockSpec, BlockSpec]]:
    """The (A, B) blocks of every LoRA pair among `specs`."""
    by_name = {spec.name: spec for spec in specs}
    return [(spec, by_name[f"{spec.pair}.lora_B"]) for spec in by_name.values() if spec.pair and spec.name.endswith("_A")]


class Bank:
    """Values and (optionally) gradients of a set of blocks.

    Args:
        specs: the blocks.
        experts: number of experts held by this rank.
        clients: length of the client axis of dense blocks (clients at home on this rank).
        expert_clients: length of the client axis of expert blocks (clients of the whole wave); default `clients`.
    """

    def __init__(
        self,
        specs: list[BlockSpec],
        experts: int,
        clients: int,
        expert_clients: int | None = None,
        device: torch.device | None = None,
        with_grad: bool = True,
    ) -> None:
        # For a bank whose tensors a start can make again: keys of those that have changed since. None: all count as changed.
        self.changed: set[str] | None = None
        self.specs = {spec.name: spec for spec in specs}
        self.experts, self.clients, self.device = experts, clients, device or torch.device("cpu")
        self.expert_clients = clients if expert_clients is None else expert_clients
        self.values: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        self._steps = 0
        # By block and type: a copy of the values, and what these were when it was made.
        self._copies: dict[tuple[str, torch.dtype], tuple[Tensor, tuple[int, int]]] = {}
        for spec in specs:
            # Clients come after experts: a layer of an expert block, flattened, is in (expert, client) order, as groups are.
            axis = (experts, self.expert_clients) if spec.expert else (clients,)
            shape = (len(spec.layers), *axis, *spec.item)
            self.values[spec.name] = torch.zeros(shape, device=device)
            if with_grad:
                self.grads[spec.name] = torch.zeros(shape, device=device)
        # A block may skip layers (a dense first block, attention of some layers), so a layer's index is no row number.
        self._row = {spec.name: {layer: i for i, layer in enumerate(spec.layers)} for spec in specs}

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def value(self, name: str, layer: int) -> Tensor:
        """[E, C, *item] or [C, *item]: a view of one layer."""
        return self.values[name][self._index(name, layer)]

    def value_in(self, dtype: torch.dtype, name: str, layer: int) -> Tensor:
        """`value` in the type that products multiply in: a view of a copy of the whole block, which is to be read only.

        The copy is kept until the values change, and then made again as a whole: once per optimizer step, and not in every
        product of every layer.
        """
        values = self.values[name]
        if dtype == values.dtype:
            return self.value(name, layer)
        # torch counts what its operations write, through views as well; `note_step` what it cannot see.
        state = (values._version, self._steps)
        copy, made = self._copies.get((name, dtype), (None, None))
        if copy is None:
            copy = torch.empty_like(values, dtype=dtype)
        if made != state:
            self._copies[name, dtype] = copy.copy_(values), state
        return copy[self._index(name, layer)]

    def note_step(self) -> None:
        """Values were written by kernels that take addresses, as the optimizers' do: copies of them are of the past."""
        self._steps += 1

    def grad(self, name: str, layer: int) -> Tensor:
        """Same shape as `value`; a bank without gradients answers with the values, which no backward pass will touch."""
        return (self.grads or self.values)[name][self._index(name, layer)]

    def _index(self, name: str, layer: int) -> int:
        row = self._row[name]
        # A block of layers (-1,) has one row that serves every layer, for instance a client's only rescaler.
        return row[layer] if layer in row else row[-1]

    def client(self, name: str, slot: int) -> Tensor:
        """[L, E, *item] or [L, *item]: a view of one client's part of a block."""
        return self.values[name].select(2 if self.specs[name].expert else 1, slot)

    def broadcast(self, name: str) -> Tensor:
        """The values with the client axis moved to the front: [C, L, ...] (a view)."""
        return self.values[name].movedim(2 if self.specs[name].expert else 1, 0)

    def note_change(self, key: str, before: Tensor, after: Tensor) -> None:
        """A tensor was written to: it may no longer be what every start makes it."""
        # By bits: -0.0 + 0.0 is 0.0, which is equal and yet hashed to something else.
        if self.changed is not None and not torch.equal(before.view(torch.int32), after.contiguous().view(torch.int32)):
            self.changed.add(key)

    def zero_grad(self) -> None:
        for grad in self.grads.values():
            # In place: kernels add into these very tensors, through views of single layers.
            grad.zero_()

    def nbytes(self) -> int:
        tensors = [*self.values.values(), *self.grads.values(), *(copy for copy, _ in self._copies.values())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def items(self, first_expert: int, slot: int = 0, with_personal: bool = False) -> Iterator[tuple[str, BlockSpec, Tensor]]:
        """Every (canonical key, block, tensor view) of one client slot; personal blocks only if asked for."""
        for spec in self.specs.values():
            if spec.personal and not with_personal:
                continue
            part = self.client(spec.name, slot)
            for i, layer in enumerate(spec.layers):
                if not spec.expert:
                    yield spec.key(layer), spec, part[i]
                    continue
                # Local experts become global ids, so names are the same for any expert-parallel size.
                for e in range(part.shape[1]):
                    yield spec.key(layer, first_expert + e), spec, part[i, e]
