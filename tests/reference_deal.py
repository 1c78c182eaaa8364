"""Dealing as it was first written: client by client, plain and slow. The product must give the same, row for row.

What is drawn comes from the product's own addressed generators; everything that is done with the draws is here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_section import PartitionConfig
from fedmoe_ds.data.holdout import allocate
from fedmoe_ds.data.sequences import Sequences
from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import address_key, generator

Rows = NDArray[np.int64]


def draw_global(strata: Sequence[str], share: float, seed: int) -> Rows:
    names, stratum = np.unique(np.asarray(strata), return_inverse=True)
    sizes = np.bincount(stratum, minlength=len(names))
    quotas = allocate(sizes, share, generator(seed, "global-holdout-rounding"))
    drawn = [
        generator(seed, "global-holdout", str(name)).permutation(np.flatnonzero(stratum == index))[: quotas[index]]
        for index, name in enumerate(names)
    ]
    return generator(seed, "global-holdout-order").permutation(np.concatenate(drawn)).astype(np.int64)


def split_client(samples: int, share: float, seed: int, name: str) -> tuple[Rows, Rows]:
    held = min(max(round(share * samples), 1), samples - 1)
    order = generator(seed, "client-holdout", name).permutation(samples)
    return np.sort(order[held:]), order[:held]


def cap(samples: int, limit: int | None, seed: int, name: str) -> Rows:
    if limit is None or samples <= limit:
        return np.arange(samples)
    rows: Rows = np.sort(generator(seed, "max-samples", name).permutation(samples)[:limit])
    return rows


def deal(labels: Sequence[str], config: PartitionConfig, seed: int) -> dict[str, Rows]:
    if config.kind == "natural":
        rows: dict[str, list[int]] = {}
        for row, label in enumerate(labels):
            rows.setdefault(label, []).append(row)
        return {label: np.asarray(rows[label], dtype=np.int64) for label in sorted(rows)}
    assert config.clients is not None
    order = generator(seed, "partition-order").permutation(len(labels))
    if config.kind == "dirichlet":
        parts = _dirichlet(labels, order, config, config.clients, seed)
    elif config.kind == "quantity":
        parts = np.split(order, np.cumsum(_power_law_sizes(len(labels), config.clients, config.alpha))[:-1])
    else:
        parts = np.array_split(order, config.clients)
    width = max(3, len(str(config.clients - 1)))
    return {f"client-{index:0{width}d}": np.sort(part) for index, part in enumerate(parts)}


def _power_law_sizes(samples: int, clients: int, alpha: float) -> list[int]:
    share = np.arange(1, clients + 1, dtype=np.float64) ** -alpha
    ideal = share / share.sum() * (samples - clients)
    sizes = np.floor(ideal).astype(np.int64)
    largest_first = np.argsort(-(ideal - sizes), kind="stable")
    sizes[largest_first[: samples - clients - int(sizes.sum())]] += 1
    return sorted((int(size) + 1 for size in sizes), reverse=True)


def _dirichlet(labels: Sequence[str], order: Rows, config: PartitionConfig, clients: int, seed: int) -> list[Rows]:
    codes = {label: code for code, label in enumerate(sorted(set(labels)))}
    code_N = np.asarray([codes[labels[row]] for row in order])
    rows_of_label = [order[code_N == code] for code in range(len(codes))]
    for attempt in range(20):
        draws = np.random.default_rng(address_key(seed, "partition-dirichlet", attempt))
        for _ in range(11):
            share_LC = draws.dirichlet(np.full(clients, config.alpha), size=len(codes))
            cuts_LC = (np.cumsum(share_LC, axis=1) * np.bincount(code_N)[:, None]).astype(np.int64)
            pieces = [np.split(rows, cuts[:-1]) for rows, cuts in zip(rows_of_label, cuts_LC, strict=True)]
            parts = [np.concatenate(of_client) for of_client in zip(*pieces, strict=True)]
            if min(map(len, parts)) >= config.min_samples:
                return parts
    raise UserError("data.partition.alpha: no draw")


def distribution(counts: list[Counter[str]], most: int) -> dict[str, Any]:
    totals: Counter[str] = sum(counts, Counter())
    ranked = sorted(totals, key=lambda label: (-totals[label], label))
    shown = ranked if len(ranked) <= most else ranked[: most - 1]
    table = [[count[label] for label in shown] for count in counts]
    if len(shown) < len(ranked):
        for row, count in zip(table, counts, strict=True):
            row.append(count.total() - sum(row))
        shown = [*shown, "other"]
    return {"labels": shown, "counts": table}


def fingerprint(owners: Iterable[Sequences]) -> str:
    content = hashlib.sha256()
    for owner in owners:
        if owner.pixels is not None and owner.labels is not None:
            content.update(np.array(owner.pixels.shape, dtype="<i8").tobytes())
            content.update(owner.pixels.astype("<f4", copy=False).tobytes())
            content.update(owner.labels.astype("<i8", copy=False).tobytes())
            continue
        content.update(np.array([len(owner), *map(len, owner.input_ids)], dtype="<i8").tobytes())
        for ids, mask in zip(owner.input_ids, owner.loss_mask, strict=True):
            content.update(ids.astype("<i8", copy=False).tobytes())
            content.update(mask.tobytes())
    return content.hexdigest()
