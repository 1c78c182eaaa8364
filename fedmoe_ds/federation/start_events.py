"""Start events: what a start records before its first round: the start line, the `run` event and the `data` event."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

from fedmoe_ds.clients.client import Count, counts_of, tiers_of
from fedmoe_ds.config import Config, idle_keys
from fedmoe_ds.distributed.topology import Topology
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.privacy_account import account
from fedmoe_ds.federation.samples import length_counts
from fedmoe_ds.federation.virtual_clock import VirtualClock
from fedmoe_ds.foundation import conversion
from fedmoe_ds.kernels import matrix
from fedmoe_ds.kernels.device_kernels import grouped_by, triton_fault
from fedmoe_ds.kernels.frozen_layers import row_dtype
from fedmoe_ds.kernels.lora_products import products_for
from fedmoe_ds.model.moe_layer import GATE_UP

_COUNTS: tuple[Count, ...] = ("samples", "sequences", "targets")


def start_line(parts: Parts) -> str:
    """Who runs what, in one line, the grouped kernel included."""
    layout, launch = parts.topology.layout, parts.runtime.launch
    dtype, device = row_dtype(parts.foundation.model), parts.runtime.device
    config = parts.config
    kernel = products_for(config.adapters.rank, dtype, device, config.execution.adapter_kernels).kernel
    # Only LoRA pairs go through the adapter kernels; whole experts have none.
    paired = any(spec.pair for spec in parts.spec.blocks)
    products = f"; adapter products by {kernel}" if paired else ""
    if device.type == "cuda":
        # Of a configuration with `auto` nobody sees which type was chosen, and with it how fast the device is.
        products = f"; weights in {config.foundation.dtype}{products}"
    products += _frozen_products(parts, dtype)
    mode = "bitwise" if parts.spec.bitwise else "fast"
    return (
        f"{layout.world_size} ranks ({launch.launcher}, {parts.runtime.device.type}) = {layout.clusters} clusters x ep_size "
        f"{layout.ep_size}; {len(parts.clients)} clients; {mode}{products}{_trained(parts)}{_devices(parts)}"
        f"{account(config, len(parts.clients))}{_without_effect(config)}"
    )


def _frozen_products(parts: Parts, dtype: torch.dtype) -> str:
    """The kernel of products with frozen weights, and on the CPU the class of processors that it is made for."""
    device = parts.runtime.device
    if device.type != "cpu":
        fault = triton_fault(device)
        # Nobody should have to guess why a device is slow.
        without = "" if fault is None else f"; without Triton ({fault})"
        return _expert_products(parts, dtype) + without
    compiled = matrix.kernel() if dtype == torch.float32 else None  # its rows are float32
    if compiled is None:
        return f"; frozen products by torch for {torch.backends.cpu.get_cpu_capability()}"
    # Slower than it could be here: why, has to be said.
    kept = "" if compiled is matrix.best() else ", as in the checkpoint"
    return f"; frozen products by matrix.cpp for {compiled.processor}{kept}"


def _expert_products(parts: Parts, dtype: torch.dtype) -> str:
    """What multiplies rows by the experts' weights on a device, in the largest pass."""
    if not parts.foundation.layers:
        return ""
    layer, bank = parts.foundation.layers[0], parts.execution.bank
    held, wide_hidden, wide_model = layer.w13.shape
    # Whole experts of a client are a group for each of its clients.
    groups = held * (bank.expert_clients if GATE_UP in bank else 1)
    by = grouped_by(dtype, parts.runtime.device, (wide_model, wide_hidden, layer.w2.shape[2]), groups)
    return f"; expert products by {by}"


def _trained(parts: Parts) -> str:
    """What is trained without experts: a user who named a dense model alone is told what was chosen."""
    config, same = parts.config, parts.spec.method.without_experts
    adapters = config.adapters
    if parts.spec.expert_layout.num_experts:
        return ""
    if (asked := config.foundation.expand) is not None:
        return f"; {asked.blocks} further layers, trained whole"
    equal = f", where {config.method.name} is {same}" if same else ""
    found = [f"LoRA of rank {adapters.rank} on {', '.join(adapters.projections)}"] if adapters.projections else []
    found += ["the whole head"] if adapters.head == "train" else []
    return f"; {' and '.join(found)} (no experts{equal})"


def _devices(parts: Parts) -> str:
    """What is simulated, where anything is."""
    if parts.clock is None:
        return ""
    facts = parts.clock.facts()
    counts = [f"{count} {name}" for name, count in list(facts["profiles"].items())[:5]]
    more = f" and {len(facts['profiles']) - 5} more kinds" if len(facts["profiles"]) > 5 else ""
    return f"; devices: {', '.join(counts)}{more}, {facts['aggregation']}{too_small(parts.clock)}"


def too_small(clock: VirtualClock) -> str:
    """How many devices could not hold the model's weights, those of all experts. They are simulated all the same: what training
    takes beside them depends on software that nobody simulates."""
    size = clock.spec.size
    weights = (size.dense_parameters + size.pool_parameters) * size.bytes_per_parameter
    few = clock.fleet.with_less_than(weights)
    return f"; {few} of them have less memory than all weights of the model take ({weights / 2**30:.2f} GiB)" if few else ""


def _without_effect(config: Config) -> str:
    idle = idle_keys(config)
    return f"; without effect: {', '.join(idle)}" if idle else ""


def rank_table(parts: Parts) -> list[dict[str, int | str]]:
    topology: Topology = parts.topology
    return topology.layout.table(parts.spec.expert_layout.num_experts, topology.hosts)


def run_facts(parts: Parts) -> dict[str, Any]:
    """The `run` event."""
    config, foundation = parts.config, parts.foundation
    return {
        "name": config.name,
        "method": config.method.name,
        "without_effect": idle_keys(config),
        "world_size": parts.runtime.world_size,
        "launcher": parts.runtime.launch.launcher,
        "clusters": parts.topology.layout.clusters,
        "ep_size": config.topology.ep_size,
        "clients": len(parts.clients),
        "num_experts": parts.spec.expert_layout.num_experts,
        "top_k": parts.spec.expert_layout.top_k,
        "layers": len(parts.spec.expert_layout.layers),
        # Top-k only: readers of earlier versions know this field; `budgets` has the whole tiers.
        "tiers": sorted({members[0].top_k for members in tiers_of(parts.clients).values()}, reverse=True),
        "budgets": budgets(parts),
        "foundation": foundation.fingerprint,
        "foundation_code": foundation.code,
        "foundation_converted": conversion.told(foundation.path),
        **({"start": parts.start.facts} if parts.start is not None else {}),
        **({"devices": parts.clock.facts()} if parts.clock is not None else {}),
        "seed": config.seed,
        "reproducible": "bitwise" if parts.spec.bitwise else "fast",
        "versions": versions(),
        # The name of a CPU says little about its kernels; kernels.instructions in the identity does.
        "device": str(parts.runtime.device) if parts.runtime.device.type == "cpu" else torch.cuda.get_device_name(),
        "topology": rank_table(parts),
        "machines": parts.topology.machines,
        "interface": os.environ.get("GLOO_SOCKET_IFNAME") or None,
        "collectives_timed": "device" if parts.runtime.device.type == "cuda" else "host",
    }


def versions() -> dict[str, str]:
    """The software that a run depends on most."""
    packages = ("torch", "deepspeed", "transformers", "fedmoe-ds")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def budgets(parts: Parts) -> list[dict[str, Any]]:
    """What the clients of every tier have to spend, the largest tier first."""
    return [
        {"tier_label": tier, "top_k": members[0].top_k, "active_experts": members[0].cap, "rank": members[0].rank,
         "experts": members[0].experts, "clients": len(members),
         **({} if members[0].layers is None else {"layers": members[0].layers})}
        for tier, members in tiers_of(parts.clients).items()
    ]  # fmt: skip


def data_facts(parts: Parts) -> dict[str, Any]:
    """The `data` event."""
    data, population = parts.data, parts.clients
    counts = (counts_of(population, what).tolist() for what in _COUNTS)
    clients = [
        # `tokens` is the old name of `targets`: it is an interface.
        {"name": name, "samples": samples, "sequences": sequences, "tokens": targets, "targets": targets, "top_k": tier.top_k,
         "tier_label": tier.label}
        for name, tier, samples, sequences, targets in zip(data.names, population.tiers_N(), *counts, strict=True)
    ]  # fmt: skip
    told = {"distribution": data.distribution, "omissions": data.omissions.as_dict(), "fingerprint": data.fingerprint}
    # Absent for images, and for data that an earlier version has prepared.
    return {"clients": clients, "lengths": length_counts(parts), **told, **({"reading": data.reading} if data.reading else {})}
