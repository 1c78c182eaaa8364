"""The report page of a run of two rounds in which every client takes part, and is evaluated before and after."""

from __future__ import annotations

import time

from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.scale.synthetic_record import write_record
from fedmoe_ds.report import write_report

NAME = "report"
X = "clients"
POINTS = (500, 1_000, 10_000, 100_000, 1_000_000)
WALL = "a browser opens a few MiB: above 500 clients the page stays as it is; a minute and 4 GiB at most"


def measure(x: int) -> dict[str, float]:
    with scratch_folder() as folder:
        write_record(folder, x)
        began = time.perf_counter()
        page = write_report(folder)
        return {"seconds": time.perf_counter() - began, "page_mib": page.stat().st_size / 2**20}
