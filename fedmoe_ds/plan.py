"""Plan: topology, schedule and memory of a configuration, without weights, training or a process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedmoe_ds.adapters.layout import adapter_blocks
from fedmoe_ds.clients.client import Capacity, Client, make_clients, resolve_tiers
from fedmoe_ds.clients.pooled import pooled_client
from fedmoe_ds.clients.schedule import CostModel, Wave, home_clients, participants, schedule
from fedmoe_ds.clients.steps import step_count
from fedmoe_ds.config import Config, TopologyConfig, dump_config
from fedmoe_ds.data import prepare
from fedmoe_ds.fit import check_plan, facts_of, find_places, positions
from fedmoe_ds.foundation import resolve_foundation
from fedmoe_ds.foundation.dense import feed_forward_sites, image_input
from fedmoe_ds.foundation.foundation import cache_folder, load_tokenizer
from fedmoe_ds.foundation.loading import build_on_meta, host_model
from fedmoe_ds.foundation.size import model_size
from fedmoe_ds.memory import estimate, format_bytes, outlasting
from fedmoe_ds.methods import load_method, method_for, with_defaults
from fedmoe_ds.report import Progress
from fedmoe_ds.topology import check_layout, format_table


def resolved(config: Config) -> str:
    """The configuration with the method's own defaults filled in, as YAML."""
    return dump_config(with_defaults(config, load_method(config.method))).rstrip()


def describe(config: Config, world_size: int) -> list[str]:
    """Describe the run on `world_size` ranks. Raises UserError for everything that a real start would refuse."""
    method = method_for(config)
    layout = check_layout(config.topology, world_size)
    check_plan(config, config.execution.reproducible != "fast")
    folder = _untrained_foundation(config)
    model = build_on_meta(folder, {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.foundation.dtype])
    layers = host_model(model, 1, 0)
    size = model_size(model, layers)
    sites = [] if layers else feed_forward_sites(model)
    find_places(config, layers, sites, 0)  # refuses what a start on these ranks would refuse
    places = find_places(config.model_copy(update={"topology": TopologyConfig()}), layers, sites, 0)
    table = layout.table(places.num_experts, ["?"] * world_size)
    full = Capacity(places.top_k, config.adapters.rank, places.num_experts)
    method.facts = facts_of(config, places)
    method.check(method.facts)
    images = None if size.vocabulary else image_input(model.config)
    tokenizer = load_tokenizer(folder, size.vocabulary) if size.vocabulary else None
    data = prepare(config.data, config.seed, tokenizer, cache_folder(config.foundation) / "data")
    tiers = resolve_tiers(config.federation, full, method.spends)
    clients = make_clients(data, config.federation, tiers, config.seed)
    chosen = participants(clients, config.federation.participation, config.seed, 1, config.federation.sampling)
    if method.pooled:
        chosen = [pooled_client(clients, config.local)]
    blocks = method.blocks(adapter_blocks(model, places, config.adapters, method.rescaler))
    cost = CostModel.of(size, places, blocks, positions(images))
    plan = schedule(chosen, cost, config.local, layout.clusters, layout.ep_size, config.execution.clients_in_flight)
    bitwise = config.execution.reproducible != "fast"
    home = home_clients(config.execution.clients_in_flight, len(chosen), layout.ep_size)
    length = config.data.sequence_length if images is None else images.positions
    memory = estimate(config, size, places, blocks, home, length, bitwise)
    memory |= outlasting(config, method, places, blocks, len(clients), len(chosen))
    return [
        f"topology: {layout.clusters} clusters x ep_size {layout.ep_size} = {world_size} ranks",
        format_table([{key: value for key, value in row.items() if key != "host"} for row in table]),
        "",
        _federation_line(config, clients, tiers),
        *_schedule_lines(plan, cost, config),
        "",
        "memory per rank (estimate):",
        *[f"  {name:<22} {format_bytes(count):>11}" for name, count in memory.items()],
        f"  {'total':<22} {format_bytes(sum(memory.values())):>11}",
    ]


def _untrained_foundation(config: Config) -> Path:
    """The model folder; a built-in foundation is taken without its pre-training, which shapes and tokenizer do not need."""
    untrained = config.foundation.model_copy(update={"pretrain": config.foundation.pretrain.model_copy(update={"steps": 0})})
    with Progress() as progress:
        return resolve_foundation(untrained, config.seed, progress.note)


def _federation_line(config: Config, clients: list[Client], tiers: list[Any]) -> str:
    counts = {tier.top_k: sum(client.top_k == tier.top_k for client in clients) for tier in tiers}
    dealt = ", ".join(f"k={cap}: {count}" for cap, count in counts.items())
    return f"federation: {len(clients)} clients ({dealt}), {config.federation.rounds} rounds"


def _schedule_lines(plan: list[list[Wave]], cost: CostModel, config: Config) -> list[str]:
    lines = ["schedule of round 1:"]
    for cluster, waves in enumerate(plan):
        everyone = [client for wave in waves for home in wave for client in home]
        work = sum(cost.client(client, config.local) for client in everyone)
        steps = [max((step_count(c, config.local) for home in wave for c in home), default=0) for wave in waves]
        lines.append(
            f"  cluster {cluster}: {len(everyone)} clients in {len(waves)} waves, steps per wave {steps}, "
            f"{3 * work / 1e12:.3g} TFLOP forward and backward"
        )
    return lines
