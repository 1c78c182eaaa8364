"""`launch/bench.py data`: seconds from a large instruction file to every client's sequences, first start and later ones.

The file is made here: words of the standard library, so that a tokenizer meets them as often as in real text. Seconds on the
clock depend on what else the machine does; seconds of processor time, of all threads, hardly do.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedmoe_ds.bench.harness.command import SEED, Command, Note, option
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.repeats import make_row
from fedmoe_ds.bench.harness.system import OURS
from fedmoe_ds.bench.harness.table import Column, Row, whole
from fedmoe_ds.config.schema import DataConfig, PartitionConfig
from fedmoe_ds.data import prepare, stdlib
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FIRST, SECOND, OTHER = "first", "second", "another seed"
WORDS = re.compile(r"[A-Za-z]{2,12}")
COLUMNS: list[Column] = [
    ("rows", lambda row: f"{row['rows']:,}"),
    ("clients", lambda row: str(row["clients"])),
    ("vocabulary", lambda row: f"{row['vocabulary']:,}"),
    ("start", lambda row: row["start"]),
    ("seconds", lambda row: f"{row['seconds']:.1f}"),
    ("processor s", lambda row: f"{row['cpu_s']:.1f}"),
    ("tokens", lambda row: f"{row['tokens']:,}"),
    ("new MiB in the cache", lambda row: whole(row["new_mib"])),
]
OPTIONS = (
    option("--rows", 200_000, "rows of the file"),
    option("--clients", 100, "clients that they are dealt to"),
    option("--words", 60, "words of a row, on average"),
    option("--vocabulary", [2048, 32_768], "sizes of the tokenizers, trained here on the standard library"),
    SEED,
)
ABOUT = (
    "Preparation of one JSON Lines file of instructions: read, tokenized, dealt to clients and stored, by one process; then "
    "found again; then dealt with another seed, which stores row numbers alone. Every figure is one measurement."
)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    """Three rows per tokenizer. Raises UserError for sizes that leave a client without data."""
    if not 1 <= args.clients <= args.rows // 4:
        raise UserError(f"--clients: {args.clients}: must be 1 to a quarter of the {args.rows} rows")
    if min(args.vocabulary) < 300 or args.words < 4:
        raise UserError("--vocabulary, --words: must be at least 300 and 4")
    rows: list[Row] = []
    documents = [document.text for document in stdlib.documents()]
    with scratch_folder() as folder:
        note(f"writing {args.rows:,} rows")
        source = write_rows(folder / "rows.jsonl", documents, args.rows, args.clients, args.words, args.seed)
        for size in args.vocabulary:
            note(f"training a tokenizer of {size:,} entries")
            tokenizer = train_tokenizer(documents, size)
            rows += _starts(source, tokenizer, args.clients, args.seed, folder / f"cache-{size}", note)
    return rows


def write_rows(path: Path, documents: list[str], rows: int, clients: int, words: int, seed: int) -> Path:
    """A file of instruction rows of about so many words, dealt to `clients` in turn; equal arguments give equal bytes."""
    found = np.array([word for text in documents for word in WORDS.findall(text)], dtype=object)
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            chosen = found[rng.integers(0, len(found), size=int(rng.integers(words // 2, words * 3 // 2 + 1)))]
            ask, answer = chosen[: len(chosen) // 3], chosen[len(chosen) // 3 :]
            fields = {"client": f"client-{row % clients:05d}", "instruction": " ".join(ask), "output": " ".join(answer)}
            file.write(json.dumps(fields) + "\n")
    return path


def _starts(source: Path, tokenizer: PreTrainedTokenizerFast, clients: int, seed: int, cache: Path, note: Note) -> list[Row]:
    config = DataConfig(
        source=str(source),
        template="instruction",
        sequence_length=256,
        partition=PartitionConfig(kind="natural", column="client", clients=clients),
    )
    rows, kept = [], 0
    for start, used in ((FIRST, seed), (SECOND, seed), (OTHER, seed + 1)):
        began, spent = time.monotonic(), time.process_time()
        data = prepare(config, used, tokenizer, cache, note=note)
        seconds, cpu = time.monotonic() - began, time.process_time() - spent
        stored = _bytes(cache)
        lengths = sum(sum(map(len, data.train(client).input_ids)) for client in range(len(data)))
        facts = {"rows": data.omissions.rows, "clients": len(data), "vocabulary": len(tokenizer), "start": start}
        figures = {"seconds": seconds, "cpu_s": cpu, "tokens": lengths, "new_mib": (stored - kept) / 2**20}
        rows.append(make_row("instructions", OURS, None, None, **facts, **figures))
        note(f"{start} start with {len(tokenizer):,} entries: {seconds:.1f} s, {cpu:.1f} s of processor time")
        kept = stored
    return rows


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


HELP = "preparing a large data set: first start, second start, another seed"
COMMAND = Command("data", HELP, OPTIONS, run, COLUMNS, words=("start",), about=ABOUT)
