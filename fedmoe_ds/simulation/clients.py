"""Clients: synthetic ones as columns, lognormal in their numbers of samples; nothing is read, and nobody is an object.

Legend: N clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.clients.client import Client, make_clients
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.federation.server import check_terms
from fedmoe_ds.planner.lengths import Data, Lengths
from fedmoe_ds.planner.workload import Job
from fedmoe_ds.randomness import generator
from fedmoe_ds.simulation.setting import Setting

Ints = NDArray[np.int64]
MOST_CLIENTS, MOST_PARTICIPANTS = 20_000_000, 250_000
"""What is held at once: columns of the clients, 100 bytes each; objects of a round's participants, some KiB each."""
MOST_SAMPLES = 100_000
"""Of one client: the far end of a lognormal is cut here, and counted."""
MOST_HELD_OUT = 1_000_000
"""Samples of the global hold-out whose batches are counted one by one."""


class Names(Sequence[str]):
    """The names of N clients, each made where it is asked for: ten million strings would be a GiB."""

    def __init__(self, count: int) -> None:
        self._count, self._width = count, len(str(count - 1))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(self._count))]
        # Without it nothing that runs over the names would end.
        if not -self._count <= place < self._count:
            raise IndexError(place)
        return f"client-{place % self._count:0{self._width}d}"


@dataclass(frozen=True)
class _Sizes:
    """Stands in for prepared data."""

    names: Names
    samples: Ints
    train_sequences: Ints
    train_tokens: Ints
    train_rows: Ints
    tiers: None = None


def placeholder(spec: RunSpec) -> tuple[Sequence[Client], Data]:
    """One client, for a job that gets its own with `peopled`."""
    return synthetic(spec, 1, Setting(sigma=0.0))


def samples_of(count: int, setting: Setting, seed: int) -> Ints:
    """Samples of every client, [N]: lognormal with the setting's mean, at least one, at most `MOST_SAMPLES`."""
    if setting.sigma == 0.0:
        return np.full(count, round(setting.samples), dtype=np.int64)
    # The mean of a lognormal is exp(mu + sigma^2 / 2).
    centre = np.log(setting.samples) - setting.sigma**2 / 2.0
    drawn = generator(seed, "simulated samples").lognormal(centre, setting.sigma, count)
    return np.clip(np.rint(drawn), 1, MOST_SAMPLES).astype(np.int64)


def synthetic(spec: RunSpec, count: int, setting: Setting) -> tuple[Sequence[Client], Data]:
    """Clients with full sequences (or with images) and their lengths."""
    config, images = spec.config, spec.images
    samples_N = samples_of(count, setting, config.seed)
    length = config.data.sequence_length if images is None else images.positions
    # Of images the data count classes and images, not their patches; of text every token.
    tokens_N = samples_N * (length if images is None else 1)
    sizes: Any = _Sizes(Names(count), samples_N, samples_N, tokens_N, tokens_N)
    clients = make_clients(sizes, config.federation, spec.tiers, config.seed)
    held_out = max(1, round(float(samples_N.sum()) * config.data.global_holdout))
    if config.evaluation.max_sequences is not None:
        held_out = min(held_out, config.evaluation.max_sequences)
    if held_out > MOST_HELD_OUT:
        raise UserError(
            f"evaluation.max_sequences: null: the global hold-out of {count} clients has {held_out} samples; set it to at most "
            f"{MOST_HELD_OUT}"
        )

    def full(samples: int) -> Lengths:
        return (
            Lengths.full(samples, length) if images is None else Lengths(np.full(samples, length), np.ones(samples, np.int64))
        )

    unit = f"sequences of {length} tokens" if images is None else "images"
    note = f"simulated: {count} clients with {_sizes_in_words(samples_N, setting)} {unit}"
    own = full(config.evaluation.client_sequences)
    return clients, Data(lambda client: full(int(samples_N[client])), lambda _: own, full(held_out), note)


def _sizes_in_words(samples_N: Ints, setting: Setting) -> str:
    if setting.sigma == 0.0:
        return f"{samples_N[0]} each,"
    low, middle, high = np.quantile(samples_N, [0.01, 0.5, 0.99])
    cut = int((samples_N == MOST_SAMPLES).sum())
    told = f" ({cut} cut to {MOST_SAMPLES})" if cut else ""
    spread = f"(1 %, half, 99 %: {low:.0f}, {middle:.0f}, {high:.0f})"
    return f"a mean of {samples_N.mean():.4g}, lognormal with sigma {setting.sigma:g} {spread}{told}"


def peopled(job: Job, setting: Setting) -> Job:
    """The job with the setting's clients and participants.

    Raises:
        UserError: their numbers, or tiers and methods that need real data.
    """
    config = job.config
    count = setting.clients or config.data.partition.clients
    if count is None:
        raise UserError("--clients: missing: data.partition.clients is not set either; say how many clients there are")
    if count > MOST_CLIENTS:
        raise UserError(f"--clients: {count}: must be at most {MOST_CLIENTS}, which are held as columns")
    _check_kind(job)
    federation = config.federation
    if setting.participants is not None:
        if setting.participants > count:
            raise UserError(f"--participants: {setting.participants}: there are {count} clients; use at most as many")
        federation = federation.model_copy(update={"participation": setting.participants / count})
    drawn = max(1, round(federation.participation * count))
    if drawn > MOST_PARTICIPANTS:
        raise UserError(
            f"--participants: {drawn} of a round: must be at most {MOST_PARTICIPANTS}, which are scheduled one by one; "
            "lower it or federation.participation"
        )
    job = replace(job, config=config.model_copy(update={"federation": federation}))
    check_terms(job, count)
    clients, data = synthetic(job, count, setting)
    return replace(job, clients=clients, data=data)


def _check_kind(job: Job) -> None:
    """Refuse what only data could answer."""
    if job.method.pooled:
        raise UserError(f"method.name: {job.config.method.name}: it trains one client on the data of all; use `fedmoe plan`")
    if any(tier.clients for tier in job.tiers):
        raise UserError("federation.tiers: they name their clients, and simulated ones have no names; give every tier a share")
    if (column := job.config.federation.tier_column) is not None:
        raise UserError(f"federation.tier_column: {column}: simulated clients have no data; give every tier a share")
