"""What a start writes down of all clients, and what it hashes of them for the run's identity; on rank 0."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.scale.synthetic import SEED, clients_of, content_of, store
from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.data.dealing import ALL, Units, deal_units
from fedmoe_ds.federation.start_events import budgets, data_facts
from fedmoe_ds.report import MetricsLog
from fedmoe_ds.report.client_tables import FOLDER
from fedmoe_ds.storage.strict_json import tree_sha256

NAME = "start_events"
X = "clients"
POINTS = (1_000, 10_000, 100_000, 1_000_000)
WALL = "rank 0, once a start: a line of the record and, above 500 clients, a table beside it; a minute and 4 GiB at most"


def measure(x: int) -> dict[str, float]:
    with scratch_folder() as folder:
        return _measured(x, folder)


def _measured(x: int, folder: Path) -> dict[str, float]:
    units = Units(content_of(2 * x), [ALL] * (2 * x), packed=True, stratified=False)
    prepared, _ = deal_units(units, DataConfig(partition=PartitionConfig(kind="iid", clients=x)), SEED)
    data = store(prepared, folder / "data")
    del units, prepared
    parts: Any = SimpleNamespace(data=data, clients=clients_of(data))
    with MetricsLog(folder / "run" / "metrics.jsonl") as log:
        began = time.perf_counter()
        log.write("run", budgets=budgets(parts))
        # As the journal does it on rank 0.
        log.write_data(**data_facts(parts))
        told = time.perf_counter()
        line_bytes = log.position()
    tables = sum(file.stat().st_size for file in (folder / "run" / FOLDER).glob("*"))
    counted = time.perf_counter()
    tree_sha256({"tiers": [tier.label for tier in parts.clients.tiers_N()]})
    hashed = time.perf_counter()
    figures = {
        "event_s": told - began,
        "identity_s": hashed - counted,
        "line_kib": line_bytes / 2**10,
        "table_mib": tables / 2**20,
    }
    return {"seconds": figures["event_s"] + figures["identity_s"], **figures}
