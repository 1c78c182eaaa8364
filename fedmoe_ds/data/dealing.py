"""Dealing: units to a global hold-out and to clients, each client's capped and split.

A *unit* is a finished sequence, a labelled image, or, for text files whose documents have no owner yet, a whole document that
is packed once its client is known. Clients are numbers here, and what they have are rows of one content: a million clients are
a few arrays.

Legend: N units, C clients, S labels that are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.data import holdout, partition
from fedmoe_ds.data.groups import coded
from fedmoe_ds.data.omissions import Omissions
from fedmoe_ds.data.ragged import Ragged
from fedmoe_ds.data.sequences import Sequences
from fedmoe_ds.data.templates.samples import all_but_first, pack
from fedmoe_ds.distributed.stop_points import stop_point

Ints = NDArray[np.int64]
MAX_LABELS = 30
ALL = "all"
NOBODY, SERVER = -1, -2
"""In the place of a client: of the global hold-out, of the public split."""


@dataclass(frozen=True)
class Units:
    """What is dealt to clients, with the label or group of each, and the row it is; None where several rows are in it.

    `packed`: units are finished sequences or images, and no documents. `stratified`: labels are groups, of which each gives
    its part to the global hold-out.
    """

    content: Sequences
    labels: list[str]
    packed: bool
    stratified: bool
    rows: list[int] | None = None


@dataclass(frozen=True)
class Prepared:
    """Everything that is stored.

    Attributes:
        names: the clients, sorted; the order of everything that is said of each of them.
        content: sequences or images; not all of them have an owner.
        owned: rows of it: training set and hold-out of every client in turn, then the global hold-out (2 C + 1 parts). With a
            public split that lies before the global hold-out like another client's, without a hold-out of its own.
        labels: what `counts_CS` counts, by falling total: units dealt to a client, its hold-out included.
        shared: another seed deals the same content, so it is stored once.
        tiers: of every client, where the data say it.
        public: whether there is a public split.
    """

    names: list[str]
    content: Sequences
    owned: Ragged
    labels: list[str]
    counts_CS: Ints
    omissions: Omissions = field(default_factory=Omissions)
    shared: bool = False
    tiers: list[str] | None = None
    reading: dict[str, Any] = field(default_factory=dict)
    public: bool = False


@dataclass(frozen=True)
class GivenHoldout:
    """The global hold-out that the configuration names: its content, and a random order of it."""

    content: Sequences
    order: Ints


def deal_units(units: Units, config: DataConfig, seed: int, given: GivenHoldout | None = None) -> tuple[Prepared, Ints]:
    """Hold out, deal to server and clients, cap and split; return that, and the client of every unit [N], NOBODY or SERVER.

    Raises UserError for too few units, and a number of clients that cannot be served.
    """
    strata = units.labels if units.stratified else [ALL] * len(units.labels)
    held = np.empty(0, np.int64) if given is not None else holdout.draw_global(strata, config.global_holdout, seed)
    # The global hold-out leaves first, so that no client trains on it, however samples are dealt.
    rest = np.setdiff1d(np.arange(len(units.labels)), held)
    # So does what is public: the server alone learns from it.
    public = rest[holdout.draw_public([strata[row] for row in rest.tolist()], config.public, seed)]
    rest = np.setdiff1d(rest, public)
    names, dealt = partition.deal([units.labels[row] for row in rest.tolist()], config.partition, seed)
    rows = Ragged(rest[dealt.values_N], dealt.bounds)
    client_N = np.full(len(units.labels), NOBODY)
    client_N[rows.values_N], client_N[public] = rows.owner_N, SERVER
    content = units.content
    if units.packed:
        # Units that are sequences are capped before they are counted; documents must be packed first.
        rows = sequences = holdout.cap_clients(rows, config.max_samples, seed, names)
    else:
        content, sequences, public, held = _packed(content, rows, public, held, config.sequence_length)
        sequences = holdout.cap_clients(sequences, config.max_samples, seed, names)
    empty = np.flatnonzero(sequences.sizes_P == 0)
    assert not len(empty), f"client {names[empty[0]]} was dealt units but has no sequence"
    if given is not None:
        content, held = content.followed_by(given.content), given.order + len(content)
    split = holdout.split_clients(sequences, config.holdout, seed, names)
    more = [public, public[:0], held] if len(public) else [held]
    # Not joined part by part: a million clients have two parts each.
    owned = Ragged.of(np.concatenate([split.values_N, *more]), np.append(split.sizes_P, [len(part) for part in more]))
    labels, counts_CS = distribution(units.labels, rows)
    return Prepared(names, content, owned, labels, counts_CS, shared=units.packed, public=len(more) > 1), client_N


def _packed(
    documents: Sequences, rows: Ragged, public: Ints, held: Ints, sequence_length: int
) -> tuple[Sequences, Ragged, Ints, Ints]:
    """Pack every client's documents, the public ones, and those of the global hold-out, in the given order: all sequences, and
    who has which."""
    tokens: list[NDArray[np.int64]] = []
    ends = [0]
    for own in (*rows, public, held):
        stop_point()
        tokens += pack([documents.input_ids[row] for row in own.tolist()], sequence_length) if len(own) else []
        ends.append(len(tokens))
    every, bounds = np.arange(len(tokens)), np.array(ends, np.int64)
    content = Sequences(tokens, [all_but_first(chunk) for chunk in tokens])
    clients = Ragged(every[: bounds[-3]], bounds[:-2])
    return content, clients, every[bounds[-3] : bounds[-2]], every[bounds[-2] :]


def distribution(labels: list[str], rows: Ragged) -> tuple[list[str], Ints]:
    """Return labels by falling total, and how many units of each a client has [C, S]; labels beyond `MAX_LABELS` are pooled as
    "other"."""
    names, code_N = coded(labels)
    code_N = code_N[rows.values_N]
    totals = np.bincount(code_N, minlength=len(names))
    # Codes ascend with the labels: among equals the first label, in every run.
    ranked = np.argsort(-totals, kind="stable")[: np.count_nonzero(totals)]
    shown = ranked if len(ranked) <= MAX_LABELS else ranked[: MAX_LABELS - 1]
    told = [names[code] for code in shown.tolist()] + (["other"] if len(shown) < len(ranked) else [])
    place = np.full(len(names), len(told) - 1)
    place[shown] = np.arange(len(shown))
    cells = rows.owner_N * len(told) + place[code_N]
    return told, np.bincount(cells, minlength=len(rows) * len(told)).reshape(len(rows), len(told))
