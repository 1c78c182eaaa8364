"""How samples are dealt to clients: flwr-datasets' partitioners, fed with addressed randomness.

A partitioner sees only the label of every sample; it never sees text. Before an IID, Dirichlet or quantity partition
the samples are put in an addressed random order, because those partitioners cut contiguous ranges.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.tree import PartitionConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import address_key, generator

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

# One Dirichlet partitioner redraws ten times before it gives up; we give it this many fresh seeds.
DIRICHLET_SEEDS = 20

Rows = NDArray[np.int64]


def largest_groups(groups: Sequence[str], weights: Sequence[int], clients: int | None, seed: int) -> list[str]:
    """Return the names of the `clients` groups with the largest total weight, sorted; among equals a draw decides."""
    totals: Counter[str] = Counter()
    for group, weight in zip(groups, weights, strict=True):
        totals[group] += weight
    if clients is not None and clients > len(totals):
        raise UserError(
            f"data.partition.clients: {clients}: more than the {len(totals)} groups that the data have; "
            f"use at most {len(totals)} clients or another partition.kind"
        )
    ranked = sorted(totals, key=lambda group: (-totals[group], address_key(seed, "largest-groups", group)))
    return sorted(ranked[:clients])


def deal(labels: Sequence[str], config: PartitionConfig, seed: int) -> dict[str, Rows]:
    """Return client name -> its sample indices (ascending), every sample exactly once, names sorted.

    `labels[i]` is the group (natural) or the label (dirichlet) of sample i. Raises UserError where the wanted number of
    clients cannot be served.
    """
    if config.kind == "natural":
        partitioner = _natural()
        parts = _partition(partitioner, labels, np.arange(len(labels)))
        names = list(partitioner.partition_id_to_natural_id.values())
        return {str(name): parts[index] for index, name in enumerate(names)}
    clients = _client_count(config, len(labels))
    order = generator(seed, "partition-order").permutation(len(labels))
    if config.kind == "dirichlet":
        parts = _dirichlet(labels, order, config, clients, seed)
    elif config.kind == "quantity":
        parts = _partition(_quantity(len(labels), clients, config.alpha), labels, order)
    else:
        parts = _partition(_iid(clients), labels, order)
    width = max(3, len(str(clients - 1)))
    return {f"client-{index:0{width}d}": part for index, part in enumerate(parts)}


def power_law_sizes(samples: int, clients: int, alpha: float) -> list[int]:
    """Return client sizes proportional to rank^-alpha: at least one each, summing to `samples`, largest first."""
    assert samples >= clients >= 1
    share = np.arange(1, clients + 1, dtype=np.float64) ** -alpha
    ideal = share / share.sum() * (samples - clients)
    sizes = np.floor(ideal).astype(np.int64)
    remainder = samples - clients - int(sizes.sum())
    largest_first = np.argsort(-(ideal - sizes), kind="stable")
    sizes[largest_first[:remainder]] += 1
    return sorted((int(size) + 1 for size in sizes), reverse=True)


def _client_count(config: PartitionConfig, samples: int) -> int:
    if config.clients is None:
        raise UserError(f"data.partition.clients: null: needed for partition.kind={config.kind}; give a number")
    if config.clients > samples:
        raise UserError(
            f"data.partition.clients: {config.clients}: more clients than the {samples} samples to deal; "
            f"use at most {samples} clients or more data"
        )
    if config.kind == "dirichlet" and config.clients * config.min_samples > samples:
        raise UserError(
            f"data.partition.min_samples: {config.min_samples}: {config.clients} clients would need "
            f"{config.clients * config.min_samples} samples and there are {samples}; lower min_samples or clients"
        )
    return config.clients


def _natural() -> Any:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    return NaturalIdPartitioner(partition_by="label")


def _iid(clients: int) -> Partitioner:
    from flwr_datasets.partitioner import IidPartitioner

    return IidPartitioner(num_partitions=clients)


def _quantity(samples: int, clients: int, alpha: float) -> Partitioner:
    """SizePartitioner with our own sizes; Linear- and ExponentialPartitioner have no exponent and may empty one."""
    from flwr_datasets.partitioner import SizePartitioner

    return SizePartitioner(power_law_sizes(samples, clients, alpha))


def _dirichlet(labels: Sequence[str], order: Rows, config: PartitionConfig, clients: int, seed: int) -> list[Rows]:
    from flwr_datasets.partitioner import DirichletPartitioner

    for attempt in range(DIRICHLET_SEEDS):
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=config.alpha,
            min_partition_size=config.min_samples,
            self_balancing=False,
            shuffle=False,
            seed=address_key(seed, "partition-dirichlet", attempt),
        )
        # It gives up with a ValueError, its only one here: the counts were checked before.
        with contextlib.suppress(ValueError):
            return _partition(partitioner, labels, order)
    raise UserError(
        f"data.partition.alpha: {config.alpha}: no draw gives each of {clients} clients {config.min_samples} of the "
        f"{len(labels)} samples; use a larger alpha, fewer clients or a smaller min_samples"
    )


def _partition(partitioner: Partitioner, labels: Sequence[str], order: Rows) -> list[Rows]:
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"row": order, "label": [labels[row] for row in order]})
    # The partitioners draw a progress bar and one warning per redraw on standard error.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
        return [
            np.sort(np.asarray(partitioner.load_partition(index)["row"][:], dtype=np.int64))
            for index in range(partitioner.num_partitions)
        ]
