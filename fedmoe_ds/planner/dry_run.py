"""Dry run: topology, schedule and memory of a configuration, without weights, training or a process group."""

from __future__ import annotations

import math

from fedmoe_ds.clients.batches import step_count
from fedmoe_ds.clients.client import tiers_of
from fedmoe_ds.clients.local_training import Wave
from fedmoe_ds.config import Config, dump_config
from fedmoe_ds.distributed.devices import uses_cuda
from fedmoe_ds.distributed.topology import check_layout, format_table
from fedmoe_ds.federation.best_round import check_best_tier
from fedmoe_ds.federation.monitors import check_monitors
from fedmoe_ds.federation.privacy_account import account, check_budget
from fedmoe_ds.federation.run_spec import of_known_type
from fedmoe_ds.federation.schedule import largest_wave, schedule
from fedmoe_ds.federation.server import check_terms
from fedmoe_ds.methods import load_method, with_defaults
from fedmoe_ds.planner.client_state import client_state
from fedmoe_ds.planner.legality import check_ep_size
from fedmoe_ds.planner.memory import estimate, format_bytes, outlasting
from fedmoe_ds.planner.rank_memory import ON_HOST, trained_here
from fedmoe_ds.planner.text import client_files_lines, data_lines, summarised
from fedmoe_ds.planner.workload import Job, resolve

_MOST_RANKS = 64
"""Rows of the rank table before its middle is left out."""


def resolved(config: Config) -> str:
    """The configuration as YAML, with the method's own defaults, and with the type of the frozen weights where it is known."""
    device = config.topology.device
    # With `auto` and no GPU here nobody knows where the text will be used: a login node's answer would hold on a GPU, too.
    if device != "auto" or uses_cuda(device):
        config = of_known_type(config, kind_here(device))
    return dump_config(with_defaults(config, load_method(config.method))).rstrip()


def kind_here(device: str) -> str:
    """The kind of device that `topology.device` means where this process is."""
    return "cuda" if uses_cuda(device) else "cpu"


def describe(config: Config, world_size: int, kind: str | None = None) -> list[str]:
    """Describe the run on `world_size` ranks.

    Args:
        kind: of their devices, `cpu` or `cuda`; None: what `topology.device` means here.
    Raises:
        UserError: for everything that a real start would refuse.
    """
    kind = kind_here(config.topology.device) if kind is None else kind
    job = checked(config, world_size, kind)
    config, layout = job.config, check_layout(config.topology, world_size)
    rows = layout.table(job.expert_layout.num_experts, ["?"] * world_size)
    ranks = [{key: value for key, value in row.items() if key != "host"} for row in rows]
    # Host names are known to a started job only.
    shown = summarised([[str(value) for value in row.values()] for row in ranks], _MOST_RANKS)
    chosen = job.participants(1)
    plan = schedule(chosen, job.cost, config.local, layout.clusters, layout.ep_size, config.execution.clients_in_flight)
    most, here = largest_wave(plan), trained_here(plan)
    home = max(1, math.ceil(most / layout.ep_size))
    # Full sequences of the largest budget: an upper bound, before any batch is drawn.
    memory = estimate(job, home, job.length, together=home if job.shares_passes else 1, in_flight=most)
    memory |= outlasting(job, len(job.clients), len(chosen), layout.clusters, here, most)
    files = client_state(job, len(job.clients), len(chosen), layout.clusters, here).files
    beside = {name: memory.pop(name) for name in ON_HOST if kind == "cuda" and name in memory}
    return [
        f"topology: {layout.clusters} clusters x ep_size {layout.ep_size} = {world_size} ranks",
        format_table([dict(zip(ranks[0], row, strict=True)) for row in shown]),
        "",
        _federation_line(job),
        *data_lines(job),
        *_schedule_lines(job, plan),
        "",
        f"memory per rank (estimate, {kind}, frozen weights in {config.foundation.dtype}):",
        *[f"  {name:<22} {format_bytes(count):>11}" for name, count in memory.items()],
        f"  {'total':<22} {format_bytes(sum(memory.values())):>11}",
        *[f"  on the host: {name:<9} {format_bytes(count):>11}" for name, count in beside.items()],
        *client_files_lines(files),
    ]


def checked(config: Config, world_size: int, kind: str, counted: bool = True) -> Job:
    """The job of a run on `world_size` ranks with devices of a kind; with `counted` its data are read and encoded.

    Raises:
        UserError: for everything that a real start would refuse; without `counted`, but for what only the data's rows show.
    """
    layout = check_layout(config.topology, world_size)
    # A start would load the tokenizer, so a folder without one is refused here, too.
    job = resolve(config, assume=False, kind=kind, counted=counted)
    check_ep_size(world_size, layout.ep_size, job.expert_layout.num_experts)
    check_monitors(job.config.deepspeed)
    # The tiers of a column are known from its rows alone.
    if counted or job.config.federation.tier_column is None:
        check_best_tier(job.config.checkpoint, tiers_of(job.clients))
    check_terms(job, len(job.clients))
    check_budget(job.config, len(job.clients))
    return job


def _federation_line(job: Job) -> str:
    members = tiers_of(job.clients)
    counts = {tier.label: len(members.get(tier.label, ())) for tier in job.tiers}
    dealt = ", ".join(f"k={label}: {count}" for label, count in counts.items())
    private = account(job.config, len(job.clients))
    return f"federation: {len(job.clients)} clients ({dealt}), {job.config.federation.rounds} rounds{private}"


def _schedule_lines(job: Job, plan: list[list[Wave]]) -> list[str]:
    lines, local = ["schedule of round 1:"], job.config.local
    for cluster, waves in enumerate(plan):
        everyone = [client for wave in waves for home in wave for client in home]
        work = sum(job.cost.client(client, local) for client in everyone)
        steps = [max((step_count(c, local) for home in wave for c in home), default=0) for wave in waves]
        lines.append(
            f"  cluster {cluster}: {len(everyone)} clients in {len(waves)} waves, steps per wave {steps}, "
            f"{work / 1e12:.3g} TFLOP forward and backward"
        )
    return lines
