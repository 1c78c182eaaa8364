"""Pre-gated passes: the router before the layers, client by client, and what its targets are in a layer.

Whoever shares a pass decides no bit of a client's decisions: its rows go through the router by themselves, at their own length.

Legend: B sequences, S positions of the pass, T = B * S token rows, E experts, C client slots, D model width, F channels of a
dense feed-forward block.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmoe_ds.foundation.pre_gate import NAME, PreGate, logits, overlaps
from fedmoe_ds.kernels.frozen_layers import frozen_rows
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.pass_context import Execution, Pass
from fedmoe_ds.model.router import Routing

PREFIX = f"{NAME}."
"""Of the names of a trained router's blocks."""


def pre_gate_blocks(gate: PreGate) -> list[BlockSpec]:
    """The router's blocks, one copy for the whole model."""
    return [BlockSpec(PREFIX + name, (-1,), size) for name, size in gate.shape.weights().items()]


def initial_router(gate: PreGate) -> dict[str, Tensor]:
    """By canonical key, what these blocks begin as."""
    return {f"model.{PREFIX}{name}": value for name, value in gate.weights().items()}


def decide(gate: PreGate, execution: Execution, run: Pass, ids_BS: Tensor) -> Tensor:
    """float32 [T, E]: logits of every token row, for all layers; they require a gradient where observers teach the router."""
    sequences, positions = ids_BS.shape
    teaches = execution.wave.overlaps and torch.is_grad_enabled()
    parts = []
    with nullcontext() if teaches else torch.no_grad():
        for segment in run.segments:
            length = min(segment.longest, positions)
            own_BS = ids_BS[segment.start : segment.stop, :length]
            found_BSE = logits(_weights(gate, execution.bank, segment.slot, teaches), gate.shape.layers, own_BS)
            parts.append(F.pad(found_BSE, (0, 0, 0, positions - length)))
    # The stand-in row of an idle rank belongs to no client, and is routed nowhere.
    missing = sequences - sum(len(part) for part in parts)
    parts.append(ids_BS.new_zeros(missing, positions, gate.shape.experts, dtype=torch.float32))
    return torch.cat(parts).flatten(0, 1)


def _weights(gate: PreGate, bank: Bank, slot: int, teaches: bool) -> dict[str, Tensor]:
    """The router of a client: its own where it is trained, else the foundation's."""
    if PREFIX + "head" not in bank:
        return gate.weights()
    found = {}
    for name in gate.shape.weights():
        # A copy: a slot of the bank may begin at any address, and libraries' products may depend on that.
        own = bank.value(PREFIX + name, -1)[slot].clone()
        if teaches:
            own.requires_grad_().register_hook(partial(_add, bank.grad(PREFIX + name, -1)[slot]))
        found[name] = own
    return found


def _add(total: Tensor, gradient: Tensor) -> None:
    total.add_(gradient)


def unit_gates(routing: Routing) -> Routing:
    """The same choice, every expert of it with weight one: what a router before the layers decides is who, not how much."""
    return replace(routing, weights_TK=routing.kept_TK.to(routing.probs_TE.dtype))


@torch.no_grad()
def layer_overlaps(gate: PreGate, place: int, x_TD: Tensor) -> Tensor:
    """float32 [T, E]: how many of a row's largest channels, in the dense block at this place, each expert has."""
    gate_TF, up_TF = frozen_rows(x_TD, gate.gate_up_LGD[place].to(x_TD.dtype), transposed=True).chunk(2, dim=-1)
    return overlaps(F.silu(gate_TF) * up_TF, gate.masks_LEF[place])
