"""Continuation: what a start keeps of the checkpoint that it continues, where its configuration leaves that to the machine.

`auto` is what is best here, and versions and machines differ in that: a run that went on with another type of weights, other
kernels or another class of processors would be another run, which its identity refuses. So `auto` means what it meant before,
as long as this machine has it; what a configuration names is never replaced.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fedmoe_ds.config import Config
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.federation.identity import Identity, read_identity
from fedmoe_ds.federation.kernel_identity import INSTRUCTIONS, PRODUCTS, class_named, products_named
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.kernels import matrix

_TYPE = "foundation.dtype"


def read(checkpoint: Path) -> dict[str, str]:
    """What a checkpoint was written with, of what a start may keep. Rank 0 only."""
    return named_in(read_identity(checkpoint))


def named_in(written: Identity) -> dict[str, str]:
    """The same of its identity."""
    kernels = written.get("kernels")
    entries = {_TYPE: written.get(_TYPE), **(kernels if isinstance(kernels, dict) else {})}
    return {name: entries[name] for name in (_TYPE, PRODUCTS, INSTRUCTIONS) if isinstance(entries.get(name), str)}


def with_type(config: Config, before: dict[str, str]) -> Config:
    """With the type of the frozen weights that the checkpoint was written with in place of `auto`."""
    named = before.get(_TYPE)
    if config.foundation.dtype != "auto" or named not in ("float32", "bfloat16"):
        return config
    return config.model_copy(update={"foundation": config.foundation.model_copy(update={"dtype": named})})


def with_products(spec: RunSpec, dtype: torch.dtype, device: torch.device, before: dict[str, str]) -> RunSpec:
    """With torch's products of adapters in place of `auto`, where the checkpoint names these and `auto` is others by now.

    Args:
        dtype: of the rows between the products.
    """
    execution, rank, named = spec.config.execution, spec.config.adapters.rank, before.get(PRODUCTS)
    if execution.adapter_kernels != "auto" or named in (None, products_named(rank, dtype, device, "auto")):
        return spec
    # Others that cannot be had stay refused, by name.
    if named != products_named(rank, dtype, device, "torch"):
        return spec
    kept = execution.model_copy(update={"adapter_kernels": "torch"})
    return replace(spec, config=spec.config.model_copy(update={"execution": kept}))


def take_class(spec: RunSpec, runtime: Runtime, before: dict[str, str]) -> None:
    """Let this process multiply with the bits of the class that the checkpoint names, if all ranks can; else with the best one.

    Collective. Only bfloat16 weights have other bits in every class, and only bitwise mode minds.
    """
    matrix.take(None)  # another run of this process may have taken one
    if not spec.bitwise or spec.config.foundation.dtype != "bfloat16" or INSTRUCTIONS not in before:
        return
    named = class_named(before[INSTRUCTIONS])
    if all(runtime.gather(matrix.kernel_of(named) is not None)):
        matrix.take(named)
