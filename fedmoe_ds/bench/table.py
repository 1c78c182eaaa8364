"""Table: rows of a result as aligned text, and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.system import PEER_PREFIX
from fedmoe_ds.errors import UserError

Row = dict[str, Any]
"""One measurement. Every row has shape, system, tokens_per_s, peak_mib and floor_share (null where it has no meaning)."""

Column = tuple[str, Callable[[Row], str]]

_WAVE: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("system", lambda row: row["system"]),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:.0f}"),
    ("time / ours", lambda row: f"{row['ratio']:.2f}"),
    ("CPU / ours", lambda row: f"{row['cpu_ratio']:.2f}"),
    ("peak MiB", lambda row: f"{row['peak_mib']:.0f}"),
    ("floor share", lambda row: f"{100 * row['floor_share']:.0f} %"),
]
_LOAD: list[Column] = [
    ("ep_size", lambda row: str(row["ep_size"])),
    ("rank", lambda row: str(row["rank"])),
    ("peak MiB", lambda row: f"{row['peak_mib']:.0f}"),
    ("growth", lambda row: f"{row['growth_mib']:.0f}"),
    ("dense", lambda row: f"{row['dense_mib']:.0f}"),
    ("own experts", lambda row: f"{row['own_experts_mib']:.0f}"),
    ("whole model", lambda row: f"{row['model_mib']:.0f}"),
]

_POOL: list[Column] = [
    ("system", lambda row: row["system"]),
    ("ms / step", lambda row: f"{1000 * row['step_seconds']:.0f}"),
    ("/ fewest", lambda row: f"{row['to_first']:.2f}"),
    ("/ dense", lambda row: f"{row['to_dense']:.2f}"),
    ("passes", lambda row: _percent(row["passes_share"])),
    ("optimizer", lambda row: _percent(row["optimizer_share"])),
    ("set-up", lambda row: _percent(row["setup_share"])),
    ("adapters MiB", lambda row: _whole(row["adapter_mib"])),
    ("optimizer MiB", lambda row: _whole(row["optimizer_mib"])),
    ("peak MiB", lambda row: _whole(row["peak_mib"])),
]

_AGGREGATE: list[Column] = [
    ("sums", lambda row: row["shape"]),
    ("ranks", lambda row: str(row["ranks"])),
    ("backend", lambda row: row["system"]),
    ("sum ms", lambda row: f"{1000 * row['sum_s']:.1f}"),
    ("with packing ms", lambda row: f"{1000 * row['reduce_s']:.1f}"),
    ("GB/s moved", lambda row: f"{row['moved_bytes_per_s'] / 1e9:.2f}"),
    ("copying alone ms", lambda row: f"{1000 * row['floor_s']:.1f}"),
    ("floor share", lambda row: _percent(row["floor_share"])),
]


def wave_table(rows: list[Row]) -> str:
    """Systems by shape, and for every shape how many times the best peer we are."""
    lines = [_aligned(rows, _WAVE)]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        peers = [row for row in mine if row["system"].startswith(PEER_PREFIX)]
        if peers:
            best = max(peers, key=lambda row: row["tokens_per_s"])
            lines.append(f"{shape}: {mine[0]['system']} runs {best['ratio']:.2f} times as fast as {best['system']}")
    return "\n".join(lines)


def load_table(rows: list[Row]) -> str:
    """Memory by rank, in MiB; growth is what loading added to the imported program."""
    return _aligned(rows, _LOAD)


def pool_table(rows: list[Row]) -> str:
    """Pool sizes: a step of all clients against the smallest pool and the foundation alone, its parts, and memory."""
    return _aligned(rows, _POOL)


def aggregate_table(rows: list[Row]) -> str:
    """Backends by size: the sum alone, the whole reduction of a round's statistics, and the floor of copying."""
    return _aligned(rows, _AGGREGATE)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _whole(number: float | None) -> str:
    return "" if number is None else f"{number:.0f}"


def _aligned(rows: list[Row], columns: list[Column]) -> str:
    cells = [[name for name, _ in columns], *[[show(row) for _, show in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def check_writable(path: Path | None) -> None:
    """Find out before the measurement whether its result can be stored. Raises UserError."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise UserError(f"--json: {path}: cannot be written; give a file in an existing folder")


def write_json(rows: list[Row], path: Path) -> None:
    """Store all rows. Raises UserError when the file cannot be written."""
    try:
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json: {path}: cannot be written: {error.strerror or error}") from error
