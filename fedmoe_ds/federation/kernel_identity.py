"""Kernel identity: the kernels of a run by name, the part of its identity that the machine decides, and the same on all ranks.

Other kernels add up in another order. In fast mode, which promises no bits, the processor's instructions stay outside.
"""

from __future__ import annotations

import torch

from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import Foundation
from fedmoe_ds.kernels import matrix, rows, sums
from fedmoe_ds.kernels.compiling import loaded, processor_key
from fedmoe_ds.kernels.device_kernels import LOOP, TORCH
from fedmoe_ds.kernels.frozen_layers import row_dtype
from fedmoe_ds.kernels.lora_products import Kernels, products_for
from fedmoe_ds.model.adapter_bank import BlockSpec

PRODUCTS, INSTRUCTIONS = "execution.adapter_kernels", "kernels.instructions"
"""Names of what a start may keep where it continues a run (continuation.py)."""


def kernels_of(
    config: Config, foundation: Foundation, blocks: list[BlockSpec], device: torch.device, bitwise: bool
) -> dict[str, str]:
    """The kernels of this rank by what they compute, and in bitwise mode the instructions that they are made of.

    Compiled kernels and torch's operations add up in another order, and torch's own products do so with other instructions
    (AVX2, AVX512); bfloat16 weights are multiplied otherwise in every processor class that can do so, and rows rounded.
    """
    kind = device.type
    compiled = {"kernels.rows": rows.available(), "kernels.matrix": matrix.available()} if kind == "cpu" else {}
    found = {name: "compiled" if here else "torch" for name, here in compiled.items()}
    if any(spec.pair for spec in blocks):
        dtype, chosen = row_dtype(foundation.model), config.execution.adapter_kernels
        found[PRODUCTS] = products_named(config.adapters.rank, dtype, device, chosen)
    if bitwise and kind == "cpu":
        found[INSTRUCTIONS] = torch.backends.cpu.get_cpu_capability() + _halves(config)
    return found


def products_named(rank: int, dtype: torch.dtype, device: torch.device, chosen: Kernels) -> str:
    """The adapters' products as a checkpoint names them: torch's by one name, on every generation of devices."""
    name = products_for(rank, dtype, device, chosen).name
    return TORCH if name == LOOP else name


def _halves(config: Config) -> str:
    """What multiplies bfloat16 weights, where it is not what multiplies float32."""
    compiled = matrix.kernel()
    if config.foundation.dtype != "bfloat16" or compiled is None or not compiled.rounds:
        return ""
    # Earlier versions had AVX512-BF16 alone, and the bits of that class are still theirs.
    return "-AMX-BF16" if compiled.processor == "AMX-BF16" else "-BF16"


def class_named(instructions: str) -> str:
    """The class of processors whose bits bfloat16 weights were multiplied with, of what `kernels.instructions` said."""
    endings = {"-AMX-BF16": "AMX-BF16", "-BF16": "AVX512-BF16"}
    return next((name for ending, name in endings.items() if instructions.endswith(ending)), instructions)


def code_of(device: torch.device) -> dict[str, str]:
    """What this rank has compiled: the processor, and of every kernel the source with its compiler (.cpp) and the code (.so).

    No part of the identity: a newer compiler may continue a run.
    """
    if device.type != "cpu":
        return {}
    sums.available()  # the others are loaded by `kernels_of`
    built = loaded().items()
    sources = {f"{name}.cpp": one.source[:12] for name, one in built}
    return {"processor": processor_key()[:12], **sources, **{f"{name}.so": one.code[:12] for name, one in built}}


def agreed(kernels: list[dict[str, str]], hosts: list[str], bitwise: bool) -> dict[str, str]:
    """The kernels of a run, of those of all ranks. Raises UserError where ranks of a bitwise run differ: bits would tell who
    trained whom."""
    for rank in range(len(kernels)) if bitwise else ():
        _check_alike(rank, 0, kernels, hosts)
    return kernels[0]


def check_code(code: list[dict[str, str]], hosts: list[str], bitwise: bool) -> None:
    """The same for what ranks have compiled: equal sources and compilers, and on equal processors equal code."""
    sources = [{name: value for name, value in theirs.items() if name.endswith(".cpp")} for theirs in code]
    processors = [theirs.get("processor") for theirs in code]
    for rank in range(len(code)) if bitwise else ():
        _check_alike(rank, 0, sources, hosts)
        # Against the first rank with an equal processor: a compiler may well make other code for another one.
        _check_alike(rank, processors.index(processors[rank]), code, hosts)


def _check_alike(rank: int, other: int, kernels: list[dict[str, str]], hosts: list[str]) -> None:
    for name in {**kernels[other], **kernels[rank]}:
        mine, theirs = kernels[rank].get(name), kernels[other].get(name)
        if mine != theirs:
            raise UserError(
                f"execution.reproducible: bitwise: rank {rank} on {hosts[rank]} has other {name} ({mine}) than rank {other} "
                f"on {hosts[other]} ({theirs}), which changes bits; use machines and compilers of one kind, or "
                "execution.reproducible=fast"
            )
