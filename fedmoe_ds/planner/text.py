"""Text: a plan as lines for the terminal, readable at any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

from fedmoe_ds.distributed.open_files import WORK
from fedmoe_ds.planner.exchanges import parts_of
from fedmoe_ds.planner.flops import TierFlops
from fedmoe_ds.planner.hardware import Hardware
from fedmoe_ds.planner.memory import format_bytes
from fedmoe_ds.planner.prediction import Prediction
from fedmoe_ds.planner.search import Choice, Refusal
from fedmoe_ds.planner.verify import Verified
from fedmoe_ds.planner.workload import Job
from fedmoe_ds.planner.world import World
from fedmoe_ds.terminal import visible

MOST_ROWS = 12


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows under a header; the first column to the left."""
    widths = [max(len(str(line[i])) for line in [header, *rows]) for i in range(len(header))]
    lines = []
    for line in [header, *rows]:
        # Names of users may hold control characters.
        cells = [visible(cell).rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = visible(line[0]).ljust(widths[0])
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def summarised(rows: list[list[str]], most: int = MOST_ROWS) -> list[list[str]]:
    """The first and last rows of a long table, with a row of dots between them."""
    if len(rows) <= most:
        return rows
    return [*rows[: most - 4], ["..."] * len(rows[0]), *rows[-3:]]


def format_seconds(seconds: float) -> str:
    """A duration with three digits."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1.0:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 600 else f"{seconds / 3600:.2f} h"


Spread = tuple[float, float]


def format_span(seconds: float, spread: Spread = (1.0, 1.0)) -> str:
    """A duration with three digits, or from where to where it may be with two."""
    if spread == (1.0, 1.0):
        return format_seconds(seconds)
    low, high = (seconds * factor for factor in spread)
    factor, unit = next((f, u) for f, u in _UNITS if high < 600 * f or u == "h")
    return f"{two_digits(low / factor)} to {two_digits(high / factor)} {unit}"


_UNITS = ((1e-6, "us"), (1e-3, "ms"), (1.0, "s"), (3600.0, "h"))


def two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def heading(job: Job, world: World, hardware: Hardware) -> list[str]:
    """World, machine, federation."""
    config, expert_layout, drawn = job.config, job.expert_layout, len(job.participants(1))
    dense, pool = job.size.dense_parameters / 1e6, job.size.pool_parameters / 1e6
    lines = [
        f"world: {world.hosts} hosts x {world.ranks_per_host} = {world.ranks} ranks on {hardware.name} "
        f"({hardware.origin(world.hosts)})",
        f"foundation: {dense:.4g} M dense + {pool:.4g} M expert parameters in {config.foundation.dtype}, "
        + (
            f"{len(expert_layout.layers)} layers x {expert_layout.num_experts} experts, top-{expert_layout.top_k}"
            if expert_layout.layers
            else f"{job.size.layers} layers without experts"
        ),
        f"federation: {len(job.clients)} clients, {drawn} per round, {config.federation.rounds} rounds; method "
        f"{config.method.name}, {'bitwise' if job.bitwise else 'fast'}",
    ]
    return [*lines, *data_lines(job)]


def data_lines(job: Job) -> list[str]:
    """What is to be told about the data: what was assumed, what is left out or cut."""
    return [line for line in (job.data.assumed, job.data.reading, job.data.omissions) if line]


def layout_lines(job: Job, world: World, ep_size: int, prediction: Prediction) -> list[str]:
    """Clusters with their ranks, hosts and work."""
    clusters = world.ranks // ep_size
    alone = f"; {prediction.homeless} of {world.ranks} ranks without a client" if prediction.homeless else ""
    # `or 1.0`: where no cluster has work, nothing is divided by zero.
    mean = sum(prediction.work) / clusters or 1.0
    rows = []
    for cluster, work in enumerate(prediction.work):
        first, last = cluster * ep_size, (cluster + 1) * ep_size - 1
        hosts = sorted({world.host(first), world.host(last)})
        rows.append([str(cluster), _span(first, last), _span(hosts[0], hosts[-1]), f"{work / mean:.3f}"])
    local = job.expert_layout.num_experts // ep_size
    experts = f", {local} experts per rank and layer" if local else ""
    hides = "on a CPU that hides nothing" if job.device == "cpu" else "what that hides is derived, not timed"
    halves = f"; rows travel in two halves: {hides}" if parts_of(job, ep_size) > 1 else ""
    return [
        f"topology: {clusters} clusters x ep_size {ep_size}{experts}; work of the busiest cluster / "
        f"mean: {prediction.balance:.3f}; {prediction.waves} waves{alone}{halves}",
        *aligned(["cluster", "ranks", "hosts", "work / mean"], summarised(rows)),
    ]


def memory_lines(prediction: Prediction, hardware: Hardware, world: World) -> list[str]:
    """Memory of one rank by purpose, and of its host where ranks compute on devices."""
    available = hardware.available(world.ranks_per_host)
    rows = [[name, format_bytes(count)] for name, count in prediction.memory.items()]
    rows += [["total", format_bytes(prediction.memory_total)], ["available", format_bytes(available)]]
    lines = ["memory per rank:", *aligned(["purpose", "bytes"], rows)]
    files = client_files_lines(prediction.client_files, world.ranks_per_host)
    if not prediction.host_memory:
        return lines + files
    rows = [[name, format_bytes(count)] for name, count in prediction.host_memory.items()]
    whole = sum(prediction.host_memory.values()) * world.ranks_per_host
    rows.append([f"all {world.ranks_per_host} ranks of a host", format_bytes(whole)])
    if hardware.host_memory_bytes is not None:
        rows.append(["available", format_bytes(hardware.host_memory_bytes)])
    return [*lines, "host memory per rank:", *aligned(["purpose", "bytes"], rows), *files]


def client_files_lines(size: int, ranks_per_host: int | None = None) -> list[str]:
    """The disk that clients' own state takes beyond a rank's memory; nothing where it takes none."""
    if not size:
        return []
    hosts = (
        "" if ranks_per_host is None else f", {format_bytes(size * ranks_per_host)} for the {ranks_per_host} ranks of a host"
    )
    return [
        f"disk per rank: {format_bytes(size)} of clients' own state beyond execution.client_state_gib, in files below "
        f"foundation.cache{hosts}"
    ]


def round_lines(prediction: Prediction, spread: Spread) -> list[str]:
    """Seconds by phase and cause, traffic by collective."""
    total = prediction.round_seconds
    phases = [[name, format_span(s, spread), f"{100 * s / total:.1f} %"] for name, s in prediction.seconds.items()]
    rates = [f"{prediction.tokens / total / factor:.{2 if factor != 1 else 4}g}" for factor in sorted({*spread}, reverse=True)]
    phases.append(["round", format_span(total, spread), f"{' to '.join(rates)} tokens/s"])
    trained = prediction.seconds["train"] or 1.0
    causes = [[n, format_span(s, spread), f"{100 * s / trained:.1f} %"] for n, s in prediction.train_split.items() if s]
    lines = ["round 1 by phase:", *aligned(["phase", "time", ""], phases)]
    lines += ["of which training:", *aligned(["cause", "time", ""], causes)]
    if not prediction.traffic:
        return [*lines, "network: none, one rank"]
    rows = [[n, f"{t.calls:.0f}", format_bytes(t.bytes), format_span(t.seconds, spread)] for n, t in prediction.traffic.items()]
    return [*lines, "network per rank and round:", *aligned(["collective", "calls", "bytes", "time"], rows)]


def search_lines(choices: list[Choice], refusals: list[Refusal], spread: Spread, shown: int = 8) -> list[str]:
    """The best combinations, and why others are refused."""
    rows = []
    for choice in choices[:shown]:
        p = choice.prediction
        moved = sum(p.bytes.values())
        rows.append(
            [f"{choice.clusters} x {choice.ep_size}", str(choice.in_flight), format_span(p.round_seconds, spread),
             format_bytes(p.memory_total), format_bytes(moved), f"{p.balance:.2f}"]
        )  # fmt: skip
    best = choices[0]
    lines = [
        f"best of {len(choices)} combinations that fit ({len(refusals)} do not): {best.clusters} clusters, "
        f"topology.ep_size={best.ep_size} execution.clients_in_flight={best.in_flight}",
        *aligned(["clusters x ep_size", "in flight", "round", "memory", "sent per rank", "balance"], rows),
    ]
    return [*lines, *[f"  refused: {refusal.reason}" for refusal in refusals[:3]]]


def flops_lines(job: Job, tiers: list[TierFlops]) -> list[str]:
    """FLOPs of the forward pass by budget tier."""
    most = tiers[0].total
    rows = [
        [f"k={t.label}", str(t.cap), str(t.rank), f"{t.total / 1e9:.4g} B", f"{100 * (1 - t.total / most):.1f} %"]
        for t in tiers
    ]
    # That of the largest tier: with a smaller LoRA rank an expert costs less.
    slope = (tiers[0].total - tiers[0].dense) / tiers[0].cap
    experts = f" + {slope / 1e9:.4g} B per active expert" if job.expert_layout.layers else ""
    return [
        f"FLOPs per tier, forward pass of one sequence of {job.length} rows: {tiers[0].dense / 1e9:.4g} B dense{experts}:",
        *aligned(["tier", "active experts", "LoRA rank", "FLOPs", "saved"], rows),
    ]


def study_lines(world: World, hardware: Hardware, seconds: float, rounds: int, seeds: int) -> list[str]:
    """The whole study."""
    unit = "rank-hours" if hardware.kind == "cpu" else "GPU-hours"
    hours = [seconds / 3600 * world.ranks * seeds * factor for factor in sorted({*hardware.spread})]
    paid = f"{hours[0]:.4g}" if len(hours) == 1 else " to ".join(map(two_digits, hours))
    return [
        f"study: {rounds} rounds x {seeds} seeds: {format_span(seconds, hardware.spread)} per seed, "
        f"{paid} {unit} in all with every evaluation (start-up and checkpoints not counted)"
    ]


def verify_lines(found: Verified, world: World) -> list[str]:
    """What the dry run of the groups did."""
    rank0, others = found.files
    return [
        f"verified: as {len(found.ranks)} of {world.ranks} ranks ({', '.join(map(str, found.ranks[:8]))}"
        f"{', ...' if len(found.ranks) > 8 else ''}) all {found.groups} process groups were built and are what the layout says "
        f"({found.seconds:.2f} s per world); experts and ranks partition for all {world.ranks} ranks",
        f"control plane: up to {found.control} groups per rank; open files for the other ranks: {rank0} on rank 0, "
        f"up to {others} on any other (ulimit -n; {WORK} more for a rank's own work)",
    ]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
