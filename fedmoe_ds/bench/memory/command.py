"""`launch/bench.py memory`: a client in flight, two hundred rounds, and a foundation on one host, in MiB."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from fedmoe_ds.bench.harness.command import Command, Note, add_seed
from fedmoe_ds.bench.harness.repeats import ONCE
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Column, Row, Table, whole
from fedmoe_ds.bench.memory import clients as memory_clients
from fedmoe_ds.bench.memory import host as memory_host
from fedmoe_ds.bench.memory import measure as memory
from fedmoe_ds.bench.memory import rounds as memory_rounds


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", default=list(memory.PARTS), help="what to measure (default: all)")
    parser.add_argument("--shape", default="e32", help="of the clients in flight: e32, e64 or tiny")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8], help="in flight, a process for each number")
    parser.add_argument("--mode", default="both", help="ours: fast, bitwise or both")
    parser.add_argument("--peers", nargs="*", default=["eager", "grouped_mm"], help="experts implementations of transformers")
    parser.add_argument("--sequences", type=int, default=1, help="sequences per client and step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of the long run")
    parser.add_argument("--host-shape", default="load", help="of the foundation that two ranks hold: load or load-tiny")
    add_seed(parser)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    names = ("parts", "shape", "mode", "peers", "clients", "sequences", "length", "rounds", "host_shape", "seed")
    return memory.run_memory(memory.Asked(**{name: getattr(args, name) for name in names}), note)


def _setting(row: Row) -> str:
    if row["part"] == memory_clients.PART:
        return f"{row['clients']} in flight"
    if row["part"] == memory_rounds.PART:
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


def show(rows: list[Row]) -> Table:
    """Peak and resident memory; below, what a client costs, whether memory is flat, and how often weights are in memory."""
    table = Table.of(rows, COLUMNS, [*_clients(rows), *_rounds(rows), *_host(rows)])
    return Table(table.header, table.cells, table.lines, words=("part", "shape", "system", "setting"))


def _clients(rows: list[Row]) -> Iterator[str]:
    mine = {row["system"]: row for row in rows if row["part"] == memory_clients.PART}
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
        if row["part"] == memory_rounds.PART:
            first, last = row["settled_mib"], row["resident_mib"]
            yield (
                f"{row['shape']}: {first:.1f} MiB after round {row['settled_round']}, {last:.1f} after round {row['rounds']}: "
                f"{row['kib_per_round']:.2f} KiB per round; {'flat' if row['flat'] else 'not flat'}"
            )


def _host(rows: list[Row]) -> Iterator[str]:
    for start in (memory_host.SHARED, memory_host.AGAIN, memory_host.COPIES):
        mine = [row for row in rows if row["part"] == memory_host.PART and row["start"] == start]
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
COMMAND = Command(
    "memory", "a client in flight, two hundred rounds, and a foundation on one host, in MiB", options, run, show, about=ABOUT
)
