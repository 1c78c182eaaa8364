"""Text: a simulation as lines for the terminal; what was assumed comes last, and all of it."""

from __future__ import annotations

import math

import numpy as np

from fedmoe_ds.distributed.gloo_control import gather_hops
from fedmoe_ds.planner import text
from fedmoe_ds.planner.memory import format_bytes
from fedmoe_ds.planner.text import aligned, format_seconds, format_span
from fedmoe_ds.simulation.curve import days, format_size, links, per_hour
from fedmoe_ds.simulation.federation import SCORED, Simulated
from fedmoe_ds.simulation.setting import MTBF_HOURS
from fedmoe_ds.simulation.walls import OPEN_FILES, SHARE, Wall, walls


def lines(simulated: Simulated) -> list[str]:
    """Everything about one federation."""
    parts = [
        text.heading(simulated.job, simulated.world, simulated.hardware),
        _rounds(simulated),
        _links(simulated),
        _memory(simulated),
        _rank_0(simulated),
        _failures(simulated),
        [f"run: {simulated.total_rounds} rounds in {days(simulated)} with checkpoints and failures"],
        _walls(simulated),
        ["assumed:", *[f"  {line}" for line in assumptions(simulated)]],
    ]
    return [line for part in parts for line in [*part, ""]][:-1]


def _rounds(simulated: Simulated) -> list[str]:
    spread, sampled = simulated.hardware.spread, simulated.round_seconds
    mean = float(np.mean(sampled))
    off = [f"{100 * (edge(sampled) / mean - 1):+.1f}" for edge in (min, max)]
    names = [name for name in simulated.first.seconds if name != "evaluate"]
    means = {name: float(np.mean([one.seconds[name] for one in simulated.rounds.values()])) for name in names}
    rows = [
        [name, format_span(seconds, spread), f"{100 * seconds / simulated.mean_round:.1f} %"] for name, seconds in means.items()
    ]
    share = simulated.evaluation_s / simulated.total_rounds
    rows.append(["evaluation, per round", format_span(share, spread), f"{100 * share / simulated.mean_round:.1f} %"])
    idle = simulated.first.homeless
    told = f"; {idle} of {simulated.world.ranks} ranks have no client of their own" if idle else ""
    return [
        f"rounds per hour: {per_hour(simulated)}, without failures",
        f"round: {format_span(mean, spread)} (mean of {len(sampled)} sampled rounds of {simulated.total_rounds}: "
        f"{', '.join(map(str, simulated.rounds))}; {' to '.join(off)} % from round to round)",
        f"balance: the busiest cluster has {simulated.first.balance:.3f} of the mean; {simulated.first.waves} waves{told}",
        *aligned(["phase", "time", ""], rows),
    ]


def _links(simulated: Simulated) -> list[str]:
    ranks = simulated.world.ranks
    rows = [[name, format_size(size), format_size(size / ranks)] for name, size in links(simulated).items()]
    return ["bytes of a round by class of links:", *aligned(["links", "whole job", "per rank"], rows)]


def _memory(simulated: Simulated) -> list[str]:
    world, hardware = simulated.world, simulated.hardware
    rows = [[name, format_bytes(size)] for name, size in simulated.memory.items()]
    rows += [
        ["total", format_bytes(simulated.device_bytes)],
        ["available", format_bytes(hardware.available(world.ranks_per_host))],
    ]
    found = ["memory per rank:", *aligned(["purpose", "bytes"], rows)]
    rows = [[name, format_bytes(size)] for name, size in simulated.host_memory.items()]
    rows.append([f"all {world.ranks_per_host} ranks of a host", format_bytes(simulated.host_bytes)])
    if simulated.host_available is not None:
        rows.append(["available", format_bytes(simulated.host_available)])
    if simulated.spilled:
        rows.append(["in mapped files, per rank", format_bytes(simulated.spilled)])
    return [*found, "memory of a host:", *aligned(["purpose, per rank", "bytes"], rows)]


def _rank_0(simulated: Simulated) -> list[str]:
    rows = [
        ["draw the round", format_seconds(simulated.drawing_s), "measured here; every rank does it"],
        ["schedule it", format_seconds(simulated.scheduling_s), "measured here; every rank does it"],
        ["write its figures", format_seconds(simulated.record_s), "docs/log.md; rank 0 alone"],
        ["open files", str(simulated.open_files), f"of {OPEN_FILES}"],
    ]
    return ["rank 0's own work in a round:", *[f"  {name:<20} {value:>10}  {note}" for name, value, note in rows]]


def _failures(simulated: Simulated) -> list[str]:
    failures, checkpointing = simulated.failures, simulated.checkpointing()
    every = simulated.job.config.checkpoint.every
    lost = float(checkpointing.slowdown(failures, every))
    cost = "without end" if math.isinf(lost) else f"{100 * (lost - 1):.2g} % more time"
    best = checkpointing.best(failures, simulated.total_rounds)
    better = float(checkpointing.slowdown(failures, best))
    kind = "in the background" if checkpointing.background else "waited for"
    ends = 100 * failures.completes(checkpointing.round_s)
    size, young, daly = simulated.storage.checkpoint, failures.young(simulated.write_s), failures.daly(simulated.write_s)
    return [
        f"failures: {failures.per_day:.3g} per day of the job, one in {format_seconds(failures.between)}; a restart takes "
        f"{format_seconds(failures.restart)}; {ends:.4g} % of rounds end without one",
        f"checkpoints: {format_size(size)} in {format_seconds(simulated.write_s)}, {kind}; training waits "
        f"{format_seconds(checkpointing.blocking)} for each",
        f"checkpoint.every={every}: failures, lost work, restarts and checkpoints cost {cost}",
        f"recommended: checkpoint.every={best} ({100 * (better - 1):.2g} % more time); if training waited for the disk, "
        f"Young's interval would be {format_seconds(young)}, Daly's {format_seconds(daly)}",
    ]


def _walls(simulated: Simulated) -> list[str]:
    rows = [[wall.name, f"{100 * wall.used:.3g} %", _stands(wall), wall.moves] for wall in walls(simulated)]
    widths = [max(len(row[i]) for row in [["wall", "used", "stands at", ""], *rows]) for i in range(3)]
    head = f"  {'wall':<{widths[0]}}  {'used':>{widths[1]}}  {'stands at':<{widths[2]}}  moved by"
    shown = [f"  {n:<{widths[0]}}  {u:>{widths[1]}}  {s:<{widths[2]}}  {m}" for n, u, s, m in rows]
    return ["the next walls, nearest first (by the model, everything else as it is):", head, *shown]


def _stands(wall: Wall) -> str:
    # No model is right a hundred times further out.
    return f"{wall.stands:.2g} {wall.x}" if wall.stands < 100 * wall.at else f"beyond 100 x the {wall.x}"


def assumptions(simulated: Simulated) -> list[str]:
    """What neither the configuration nor a measurement says."""
    setting, hardware = simulated.setting, simulated.hardware
    source = (
        " (419 interruptions of 2 048 hosts in 54 days: The Llama 3 Herd of Models)" if setting.mtbf_hours == MTBF_HOURS else ""
    )
    low, high = hardware.spread
    told = [
        f"{simulated.job.data.assumed}; --samples, --sigma",
        f"hardware {hardware.name}: {hardware.origin(simulated.world.hosts)}"
        + (f"; times from {low:g} to {high:g} of the model's" if low != high else ""),
        f"a host fails every {setting.mtbf_hours:g} h{source}, at random and alone, and the job ends with it; --mtbf-hours",
        f"storage: {setting.storage_gb_per_s:g} GB/s for the whole job; --storage-gb-per-s",
        f"a restart: {setting.restart_minutes:g} minutes, and {format_size(simulated.storage.start)} read; --restart-minutes",
        "every cluster sends what the slowest one sends, and rings go host by host; a message of the control plane "
        f"takes {gather_hops(simulated.world.ranks)} hops",
        "evaluation's time counts, its messages do not; sampled rounds stand for all; clients' samples stay what they are",
        f"what all ranks wait for may take {100 * SHARE:.0f} % of a round, and rank 0 may open {OPEN_FILES} files",
    ]
    if simulated.job.config.evaluation.client_sequences and len(simulated.job.clients) > SCORED:
        told.append(f"clients' own hold-outs cost in proportion to those of {SCORED} clients")
    return told
