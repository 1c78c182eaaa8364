"""Fit: whether method, foundation, data and adapters go together, told as early as it can be known."""

from __future__ import annotations

from typing import Any

from fedmoe_ds.config import Config
from fedmoe_ds.data import ImageInput, check_task
from fedmoe_ds.errors import UserError
from fedmoe_ds.experts.places import Places, adapter_places, check_shards, hosted_places
from fedmoe_ds.foundation import FeedForwardSite, HostedLayer, planned_sparse, planned_task
from fedmoe_ds.foundation.foundation import planned_config
from fedmoe_ds.foundation.positions import longest_sequence
from fedmoe_ds.foundation.rowwise import independent_rows
from fedmoe_ds.methods import Facts
from fedmoe_ds.runtime import Runtime

ROW = 4
"""Rows of whole 16-byte units: a kernel's path may depend on the alignment of a row."""


def is_bitwise(config: Config, runtime: Runtime) -> bool:
    """Whether this run promises equal bits on any topology."""
    mode = config.execution.reproducible
    return mode == "bitwise" or (mode == "auto" and runtime.device.type == "cpu")


def shares_passes(bitwise: bool, model_type: str, config: Config, device: str) -> bool:
    """Whether all clients in flight go through the model together. In bitwise mode that takes kernels which keep rows apart;
    adapter experts beside a dense model have none."""
    apart = config.adapters.moe is None and independent_rows(model_type, config.foundation.dtype, device)
    return not bitwise or apart


def facts_of(config: Config, places: Places) -> Facts:
    """What methods may ask about the model."""
    return Facts(places.top_k, places.num_experts, config.adapters.rank, config.seed, places.renormalised, tuple(places.layers))


def check_plan(config: Config, bitwise: bool) -> None:
    """Whether mode, foundation, data and adapters go together, as far as that is known before anything is loaded."""
    if bitwise and config.execution.threads > 1:
        raise UserError(
            f"execution.threads: {config.execution.threads}: bitwise mode needs 1: threads cut a kernel's work in the middle "
            "of a row; use threads=1, or reproducible=fast"
        )
    task = planned_task(config.foundation)
    if task is not None:
        check_task(task, config.data)
    check_length(config, planned_config(config.foundation))
    sparse = planned_sparse(config.foundation)
    if sparse is not None:
        check_adapters(config, sparse)
    moe = config.adapters.moe
    if moe is None:
        return
    check_shards(moe, config.topology.ep_size)
    if bitwise and moe.width % ROW:
        raise UserError(
            f"adapters.moe.width: {moe.width}: bitwise mode needs a multiple of {ROW} (rows start on 16 bytes); change it, or "
            "use execution.reproducible=fast"
        )


def check_length(config: Config, model: Any) -> None:
    """The model has a position for every token of a sequence. `model` is its transformers configuration, None if unknown yet.

    Raises UserError.
    """
    longest = longest_sequence(model)
    if longest is not None and config.data.sequence_length > longest:
        raise UserError(
            f"data.sequence_length: {config.data.sequence_length}: the foundation "
            f"({config.foundation.path or config.foundation.preset}) has {longest} positions; use at most {longest}"
        )


def check_adapters(config: Config, sparse: bool) -> None:
    """Adapter experts stand beside dense models and nowhere else. Raises UserError."""
    named = config.foundation.path or config.foundation.preset
    if sparse and config.adapters.moe is not None:
        raise UserError(
            f"adapters.moe: {named} has experts of its own; drop the section, or use a dense foundation (tiny-llama)"
        )
    if not sparse and config.adapters.moe is None:
        raise UserError(
            f"foundation: {named}: method {config.method.name} needs a mixture of experts and this model is dense; use "
            "a sparse one (tiny-olmoe), or put adapter experts beside it with an adapters.moe section (method fft-moe)"
        )


def find_places(config: Config, layers: list[HostedLayer], sites: list[FeedForwardSite], shard: int) -> Places:
    """Where the experts of a run are. Raises UserError when the model and `adapters.moe` do not go together."""
    check_adapters(config, bool(layers))
    if config.adapters.moe is None:
        return hosted_places(layers)
    return adapter_places(sites, config.adapters.moe, config.topology.ep_size, shard)


def positions(images: ImageInput | None) -> int:
    """Token rows that the blocks see per target of one epoch, which is how data count: 1 for text."""
    return 1 if images is None else images.positions


def check_widths(places: Places) -> None:
    """Bitwise mode needs rows that start on 16 bytes. Raises UserError."""
    if places.width % ROW or places.ffn % ROW:
        raise UserError(
            f"execution.reproducible: bitwise: the model's widths {places.width} and {places.ffn} must be multiples of {ROW} "
            "(rows must start on 16 bytes); use fast"
        )
