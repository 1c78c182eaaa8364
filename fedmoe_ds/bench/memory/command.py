"""`launch/bench.py memory`: bytes of a client in flight, of two hundred rounds, and of a foundation held by two ranks.

Every figure comes from real processes, seen from the system's side: resident, proportional (PSS: a page that n processes map
counts 1 / n in each) and private memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from fedmoe_ds.bench.harness.checks import check_known
from fedmoe_ds.bench.harness.command import SEED, Command, Note, option
from fedmoe_ds.bench.harness.repeats import ONCE
from fedmoe_ds.bench.harness.shapes import find_shape
from fedmoe_ds.bench.harness.system import HALF_MOMENTS, OURS, system_names
from fedmoe_ds.bench.harness.table import Column, Row, whole
from fedmoe_ds.bench.memory import clients, host, rounds

PARTS = (clients.PART, rounds.PART, host.PART)
OPTIONS = (
    option("--parts", list(PARTS), "what to measure (default: all)"),
    option("--shape", "e32", "of the clients in flight: e32, e64 or tiny"),
    option("--clients", [1, 2, 4, 8], "in flight, a process for each number"),
    option("--mode", "both", "ours: fast, bitwise or both"),
    option("--peers", ["eager", "grouped_mm"], "experts implementations of transformers", nargs="*"),
    option("--sequences", 1, "sequences per client and step"),
    option("--length", 128, "tokens per sequence"),
    option("--rounds", 200, "rounds of the long run"),
    option("--host-shape", "load", "of the foundation that two ranks hold: load or load-tiny"),
    SEED,
)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    """Rows of all parts that are asked for. Raises UserError for whatever the user can fix, before anything is started."""
    check_known("--parts", "part", args.parts, PARTS)
    shape, host_shape = find_shape(args.shape), find_shape(args.host_shape)
    ours, peers = system_names(args.mode, []), system_names(args.mode, args.peers)
    clients.check(args.clients)
    rounds.check(args.rounds)
    rows: list[Row] = []
    if clients.PART in args.parts:
        systems = [*ours, HALF_MOMENTS, *peers[len(ours) :]]
        counts = sorted(set(args.clients))
        rows += clients.measure_clients(shape, systems, counts, args.sequences, args.length, args.seed, note)
    if rounds.PART in args.parts:
        rows += rounds.measure_rounds(args.rounds, args.seed, note)
    if host.PART in args.parts:
        rows += host.measure_host(host_shape, args.seed, note)
    return rows


def _setting(row: Row) -> str:
    if row["part"] == clients.PART:
        return f"{row['clients']} in flight"
    if row["part"] == rounds.PART:
        return f"{row['rounds']} rounds"
    return f"{row['start']}, rank {row['rank']} of {row['ranks']}"


COLUMNS: list[Column] = [
    ("part", lambda row: row["part"]),
    ("shape", lambda row: row["shape"]),
    ("system", lambda row: row["system"]),
    ("setting", _setting),
    ("peak MiB", lambda row: whole(row["peak_mib"])),
    ("resident MiB", lambda row: whole(row["resident_mib"])),
    ("proportional growth MiB", lambda row: whole(row.get("pss_growth_mib"))),
    ("private growth MiB", lambda row: whole(row.get("uss_growth_mib"))),
]


def lines(rows: list[Row]) -> Iterator[str]:
    """What a client costs, whether memory is flat, and how often weights are in memory."""
    yield from _clients(rows)
    yield from _rounds(rows)
    yield from _host(rows)


def _clients(rows: list[Row]) -> Iterator[str]:
    mine = {row["system"]: row for row in rows if row["part"] == clients.PART}
    for system, row in mine.items():
        head = f"{row['shape']}: {system}"
        if row["slope_mib"] is None:
            yield f"{head}: {row['peak_mib'] - row['loaded_mib']:.1f} MiB for one client beyond the loaded model"
            continue
        parts, total = row["counted_mib"], sum(row["counted_mib"].values())
        named = ", ".join(f"{name} {mib:.1f}" for name, mib in parts.items() if mib)
        yield (
            f"{head}: {row['slope_mib']:.1f} MiB per client in flight; by count {total:.1f} ({named}), "
            f"{100 * parts['moments'] / total:.0f} % of it moments"
        )


def _rounds(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if row["part"] == rounds.PART:
            first, last = row["settled_mib"], row["resident_mib"]
            yield (
                f"{row['shape']}: {first:.1f} MiB after round {row['settled_round']}, {last:.1f} after round {row['rounds']}: "
                f"{row['kib_per_round']:.2f} KiB per round; {'flat' if row['flat'] else 'not flat'}"
            )


def _host(rows: list[Row]) -> Iterator[str]:
    for start in (host.SHARED, host.AGAIN, host.COPIES):
        mine = [row for row in rows if row["part"] == host.PART and row["start"] == start]
        if mine:
            weights, added = mine[0]["weights_mib"], sum(row["pss_growth_mib"] for row in mine)
            mapped, seconds = sum(row["mapped_pss_mib"] for row in mine), max(row["load_s"] for row in mine)
            yield (
                f"{mine[0]['shape']}, {start}: {len(mine)} ranks with {weights:.0f} MiB of weights each add {added:.0f} MiB to "
                f"the host, {mapped:.0f} of them mapped; loading takes {seconds:.1f} s {ONCE}"
            )


ABOUT = (
    "Real processes, seen by the system. What a client in flight adds is compared with its adapters, gradients, moments and "
    f"activations by count; {OURS} maps a foundation that several ranks of a host hold from one file, so that it is there "
    "once. Every figure is one measurement; the growth per client is a slope over four of them."
)
HELP = "a client in flight, two hundred rounds, and a foundation on one host, in MiB"
COMMAND = Command("memory", HELP, OPTIONS, run, COLUMNS, words=("part", "shape", "system", "setting"), lines=lines, about=ABOUT)
