"""Encoded samples to clients, stored, and opened as every rank opens them: two samples a client on average, from groups of a
column (natural) and from a power law (quantity)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.scale.synthetic import SEED, content_of, store
from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.data.dealing import Units, deal_units
from fedmoe_ds.data.federated import FederatedData
from fedmoe_ds.data.groups import group_names
from fedmoe_ds.data.sequences import Sequences

NAME = "partition"
X = "clients"
POINTS = (1_000, 10_000, 100_000, 1_000_000)
WALL = "one process, before the first round: a minute and 4 GiB at most, reading and tokenizing apart"
Kind = Literal["natural", "quantity"]
_SAMPLES = 2


def measure(x: int) -> dict[str, float]:
    content = content_of(x * _SAMPLES)
    spent, figures = 0.0, dict[str, float]()
    kinds: tuple[Kind, ...] = ("natural", "quantity")
    for kind in kinds:
        with scratch_folder() as folder:
            found = _dealt(content, kind, x, folder / "data")
        spent = max(spent, found.pop("whole"))
        figures |= {f"{kind}_{name}": value for name, value in found.items()}
    return {"seconds": spent, **figures}


def _dealt(content: Sequences, kind: Kind, clients: int, cache: Path) -> dict[str, float]:
    count = len(content)
    config = DataConfig(partition=PartitionConfig(kind=kind, clients=None if kind == "natural" else clients, alpha=1.1))
    began = time.perf_counter()
    labels = group_names((f"user {row % clients}" for row in range(count)), "who") if kind == "natural" else ["all"] * count
    units = Units(content, labels, packed=True, stratified=kind == "natural", rows=list(range(count)))
    prepared, _ = deal_units(units, config, SEED)
    dealt = time.perf_counter()
    data = store(prepared, cache)
    stored = time.perf_counter()
    again = FederatedData.open(data.path)
    opened = time.perf_counter()
    assert len(again) == clients and len(again.train(clients - 1)) >= 1
    sizes = [path.stat().st_size for path in data.path.iterdir()]
    figures = {"deal_s": dealt - began, "store_s": stored - dealt, "open_s": opened - stored, "deal_mib": sum(sizes) / 2**20}
    return {"whole": stored - began, **figures}
