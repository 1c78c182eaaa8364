"""Personal state: what belongs to single clients and outlives a round.

Legend: N clients, L layers, E experts of this rank, item the shape of one tensor.

Scalars (rescalers, ranks), control variates, and for personalised methods whole adapters. Dense blocks are replicated on all
ranks; expert blocks are sharded like the experts and replicated over clusters, because a client may train on another cluster in
the next round. Memory grows with the number of clients: that is what a stateful method costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.topology import Topology
from fedmoe_ds.model.adapter_bank import BlockSpec


class Personal:
    """All clients' personal blocks on one rank.

    Args:
        specs: the personal blocks.
        experts: number of experts of this rank.
        clients: number of clients of the federation.
        initial: (block, client index) -> the value before the first round, broadcastable to [L, E, *item] or [L, *item].

    Attributes:
        values: by block name, [N, L, E, *item] or [N, L, *item], on the CPU.
    """

    def __init__(
        self, specs: list[BlockSpec], experts: int, clients: int, initial: Callable[[BlockSpec, int], Tensor | float]
    ) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.values: dict[str, Tensor] = {}
        self._fresh: dict[bool, set[int]] = {True: set(), False: set()}
        for spec in specs:
            axis = (experts,) if spec.expert else ()
            self.values[spec.name] = torch.zeros((clients, len(spec.layers), *axis, *spec.item))
            for index in range(clients):
                self.values[spec.name][index] = torch.as_tensor(initial(spec, index))

    def __bool__(self) -> bool:
        return bool(self.specs)

    def dense(self, index: int) -> dict[str, Tensor]:
        """One client's dense blocks [L, *item]: what every rank knows."""
        return {name: self.values[name][index] for name, spec in self.specs.items() if not spec.expert}

    def store(self, index: int, name: str, value: Tensor) -> None:
        """Keep a client's new value; `share` makes it known to the other ranks."""
        # Adding zero turns -0.0 into 0.0, which is what the sum over ranks makes of it.
        self.values[name][index] = value.cpu() + 0.0
        self._fresh[self.specs[name].expert].add(index)

    def share(self, runtime: Runtime, topology: Topology) -> None:
        """Spread what was stored since the last call. Every client was trained by one cluster, so sums are copies."""
        if not self.specs:
            return
        everyone = {int(i) for part in runtime.gather(sorted(set().union(*self._fresh.values()))) for i in part}
        # All ranks sum tensors of one shape, in one order of clients, whoever trained them.
        indices = sorted(everyone)
        for name, spec in self.specs.items():
            mine = [i for i, index in enumerate(indices) if index in self._fresh[spec.expert]]
            updates = torch.zeros((len(indices), *self.values[name].shape[1:]))
            updates[mine] = self.values[name][[indices[i] for i in mine]]
            # A zero may be a value, so a second sum tells whose blocks were stored anywhere.
            known = torch.zeros(len(indices))
            known[mine] = 1.0
            for tensor in (updates, known):
                self._sum(tensor, spec, runtime, topology)
            for i, index in enumerate(indices):
                if known[i] > 0:
                    self.values[name][index] = updates[i]
        self._fresh = {True: set(), False: set()}

    def _sum(self, tensor: Tensor, spec: BlockSpec, runtime: Runtime, topology: Topology) -> None:
        if not spec.expert:
            runtime.control.sum(tensor)
            return
        # Over NCCL only tensors on the device travel.
        there = tensor.to(runtime.device)
        tensor.copy_(topology.sum_shard.sum(there))

    def items(self, first_expert: int) -> Iterator[tuple[str, BlockSpec, Tensor]]:
        """Every (canonical key, block, [N, *item] view), by layer and global expert id."""
        for name, spec in self.specs.items():
            for i, layer in enumerate(spec.layers):
                if not spec.expert:
                    yield spec.key(layer), spec, self.values[name][:, i]
                    continue
                for e in range(self.values[name].shape[2]):
                    yield spec.key(layer, first_expert + e), spec, self.values[name][:, i, e]
