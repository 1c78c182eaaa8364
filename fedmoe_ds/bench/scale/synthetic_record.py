"""Synthetic record: what a run of many clients writes down, without a run: ten labels, two rounds, scores of everybody."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedmoe_ds.report import MetricsLog
from fedmoe_ds.report.client_tables import MOST_LINES

LABELS, CAPS, SEED = 10, (8, 4, 2, 1), 0


def client_rows(count: int, round_index: int) -> list[dict[str, Any]]:
    """What the reports of a round's `count` clients are."""
    draws = np.random.default_rng((SEED, round_index))
    first, change, seconds = draws.normal(4, 0.5, count).tolist(), draws.random(count).tolist(), draws.random(count).tolist()
    tokens = draws.integers(100, 90_000, count).tolist()
    nothing = {"active_experts": 8, "rank": None, "rescaler": None, "status": "ok"}
    return [
        {**_client(i, "client"), "steps": 20, "tokens": tokens[i], "targets": tokens[i] // 2, "loss_first": first[i],
         "loss_last": first[i] - change[i], "flops": 1e9 * tokens[i], "seconds": seconds[i], **nothing}
        for i in range(count)
    ]  # fmt: skip


def write_round(log: MetricsLog, rows: list[dict[str, Any]], round_index: int) -> None:
    """The events of a round, as the journal writes them."""
    if len(rows) > MOST_LINES:
        log.write_table("client", round_index, rows)
    else:
        for row in rows:
            log.write("client", round=round_index, **row)
    log.write("round", round=round_index, participants=len(rows), dropped=0, tokens=1, seconds=1.0, phases={"train": 1.0})


def write_record(folder: Path, count: int, rounds: int = 2, every_tier: bool = False) -> None:
    """The record of a whole run.

    Args:
        every_tier: every client's hold-out is scored by each tier's model, as without personal models; else by its own alone.
    """
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.write("run", name="synthetic", method="flame", clients=count, tiers=CAPS, num_experts=0, world_size=1)
        holdings = [
            {**_client(i, "name"), "samples": 5 + i % 40, "sequences": 5 + i % 40, "targets": 100 * (5 + i % 40)}
            for i in range(count)
        ]
        counts = np.random.default_rng(SEED).multinomial(20, [1 / LABELS] * LABELS, count).tolist()
        log.write_data(clients=holdings, distribution={"labels": [f"label {i}" for i in range(LABELS)], "counts": counts})
        _write_scores(log, count, 0, every_tier)
        for round_index in range(1, rounds + 1):
            write_round(log, client_rows(count, round_index), round_index)
        _write_scores(log, count, rounds, every_tier)
        log.write("end", rounds=rounds, digest="00" * 32, seconds=1.0)


def _write_scores(log: MetricsLog, count: int, round_index: int, every_tier: bool) -> None:
    for cap in CAPS:
        log.write("eval", round=round_index, tier=cap, split="global", perplexity=30.0, loss=3.4, accuracy=0.2, targets=5000)
    draws = np.random.default_rng((SEED, 1, round_index))

    turns = len(CAPS) if every_tier else 1

    def rows() -> Iterator[dict[str, Any]]:
        for turn in range(turns):
            for i, loss in enumerate(draws.normal(3, 0.2, count).tolist()):
                cap = CAPS[(i + turn) % len(CAPS)]
                yield {"client": _name(i), "tier": cap, "tier_label": str(cap), "loss": loss, "perplexity": math.exp(loss),
                       "accuracy": 0.3, "targets": 80}  # fmt: skip

    if count * turns > MOST_LINES:
        log.write_table("eval", round_index, rows())
    else:
        for row in rows():
            log.write("eval", round=round_index, split="client", **row)


def _client(place: int, key: str) -> dict[str, Any]:
    cap = CAPS[place % len(CAPS)]
    return {key: _name(place), "top_k": cap, "tier_label": str(cap)}


def _name(place: int) -> str:
    return f"client-{place:07d}"
