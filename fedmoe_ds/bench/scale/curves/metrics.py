"""One round of the record: rows of all participants, as rank 0 writes them onto the disk, and as a reader gets them back."""

from __future__ import annotations

import time

from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.scale.synthetic_record import client_rows, write_round
from fedmoe_ds.report import MetricsLog, Record
from fedmoe_ds.report.history import History

NAME = "metrics"
X = "participants"
POINTS = (500, 1_000, 10_000, 100_000, 1_000_000)
WALL = "rank 0 writes a round's rows alone: a minute and 4 GiB at most"


def measure(x: int) -> dict[str, float]:
    rows = client_rows(x, 1)
    with scratch_folder() as folder:
        path = folder / "metrics.jsonl"
        with MetricsLog(path) as log:
            began = time.perf_counter()
            write_round(log, rows, 1)
            written = time.perf_counter() - began
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
        began = time.perf_counter()
        history = History.of(Record(path))
        read = time.perf_counter() - began
    assert len(history.trained) == x, "every row came back"
    return {"seconds": written, "read_s": read, "bytes_per_row": sum(sizes) / x}
