"""From a source to every client's sequences: choose groups, encode, hold out, deal, pack, cap, split.

What is dealt is a *unit*: a finished sequence, a labelled image, or, for text files whose documents have no owner yet, a
whole document that is packed once its client is known. Nothing here depends on the number of ranks: only one process
prepares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.data import digits, groups, holdout, partition, templates
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.omissions import LEFT_OUT, Omissions
from fedmoe_ds.data.sources import Source, Sources, source_name
from fedmoe_ds.data.store import Sequences
from fedmoe_ds.data.table import Table
from fedmoe_ds.distributed.stop_points import stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import generator

MAX_LABELS = 30
ALL = "all"


@dataclass(frozen=True)
class Prepared:
    """Everything that is stored; lists run over clients in the order of `names`."""

    names: list[str]
    train: list[Sequences]
    holdout: list[Sequences]
    global_holdout: Sequences
    distribution: dict[str, Any]
    omissions: Omissions
    tiers: list[str] | None = None
    shared: Shared | None = None
    reading: templates.Reading = field(default_factory=dict)


@dataclass(frozen=True)
class Shared:
    """Units that are finished sequences, and which of them each owner has: train and hold-out of every client in the order of
    `names`, then the global hold-out. Another seed deals the same units, so they are stored once."""

    content: Sequences
    rows: list[NDArray[np.int64]]


@dataclass(frozen=True)
class _Units:
    """What is dealt to clients, with the label or group of each, and the row it is; None where several rows are in it."""

    content: Sequences
    labels: list[str]
    packed: bool
    stratified: bool
    rows: list[int] | None = None


@dataclass(frozen=True)
class _Validation:
    """The hold-out that the configuration names: its content, a random order of it, and the rows that were read for it."""

    content: Sequences
    order: NDArray[np.int64]
    rows: int
    omissions: list[tuple[int, str]]

    @property
    def shuffled(self) -> Sequences:
        return self.content.select(self.order)


def assemble(sources: Sources, config: DataConfig, seed: int, encoder: Encoder, tier_column: str | None = None) -> Prepared:
    """Return all clients' data, with what `tier_column` says about each client where it is given.

    Raises UserError for missing columns, malformed rows, too few samples, and clients that would be empty.
    """
    source = sources.train
    group_column, natural = source.group_column, config.partition.kind == "natural"
    grouping = {column for column in (config.partition.column, group_column) if column is not None}
    grouping |= set() if tier_column is None else {tier_column}
    table = source.table(templates.candidates(config) | grouping)
    # From here on the template is the one that the columns say.
    config = templates.resolve_template(table, config)
    columns = templates.resolve_columns(table, config)
    templates.check_rows(table, columns, config)
    # Early: it is small as a rule, and a mistake in it need not wait for the encoding of everything else.
    validation = None if sources.validation is None else _validation(sources.validation, config, seed, encoder)
    labels = _row_labels(table, columns, config, group_column)
    wanted: list[str] = []
    whole, kept = table, list(range(len(table)))
    if natural:
        # Groups are chosen before anything is tokenised: only the rows of the chosen ones are.
        wanted = partition.largest_groups(labels, _weights(table, columns, config), config.partition.clients, seed)
        kept = _rows_in(labels, set(wanted))
        table, labels = table.select(kept), [labels[row] for row in kept]
    # Messages name the rows of the files, which are not those that were chosen.
    tiers = None if tier_column is None else _tiers(table, labels, tier_column, natural, lambda row: whole.place(kept[row]))
    samples = templates.encode(table, columns, config, encoder)
    left_out = sum(kind in LEFT_OUT for _, kind in samples.omissions)
    _check_nothing_vanished(wanted, {labels[row] for row in samples.rows}, left_out)
    units = _units(samples, labels, config, by_group=group_column is not None or natural)
    prepared, owners = _deal(units, config, seed, validation)
    # Natural: the client of a left-out row is known from its label. Else only dealt rows have a client.
    owner_of = dict(enumerate(labels)) if natural else owners
    found = [(kind, owner_of.get(row)) for row, kind in samples.omissions]
    read = len(table)
    if validation is not None:
        found += [(kind, None) for _, kind in validation.omissions]
        read += validation.rows
    named = None if tiers is None else [tiers[name] for name in prepared.names]
    reading = templates.reading_of(table, columns, config, encoder)
    return replace(prepared, omissions=Omissions.of(read, found), reading=reading, tiers=named)


def _validation(source: Source, config: DataConfig, seed: int, encoder: Encoder) -> _Validation:
    """Encode the validation's rows with the template and the columns of everything else."""
    where = f"data.validation: {source_name(config.validation)}"
    table = source.table(templates.candidates(config))
    try:
        columns = templates.resolve_columns(table, config)
        templates.check_rows(table, columns, config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    samples = templates.encode(table, columns, config, encoder)
    if not samples.rows:
        raise UserError(f"{where}: all {len(table)} samples are empty or do not fit; raise sequence_length or mend them")
    units = _Units(Sequences(samples.tokens, samples.loss_mask), [], packed=config.template != "text", stratified=False)
    content = _finished(units, np.arange(len(samples.rows)), config.sequence_length)
    # In random order: an evaluation may take the first sequences only.
    order = generator(seed, "validation-order").permutation(len(content))
    return _Validation(content, order, len(table), samples.omissions)


def assemble_images(images: digits.Images, config: DataConfig, seed: int) -> Prepared:
    """Return all clients' images. The label of an image is its class: a natural partition gives one client per class.

    Raises UserError for too few images and clients that would be empty.
    """
    labels = [str(label) for label in images.labels_N]
    rows = np.arange(len(images))
    natural = config.partition.kind == "natural"
    if natural:
        wanted = set(partition.largest_groups(labels, [1] * len(labels), config.partition.clients, seed))
        rows = np.array(_rows_in(labels, wanted))
    content = Sequences.of_images(images.pixels_NCHW[rows], images.labels_N[rows])
    units = _Units(content, [labels[row] for row in rows], packed=True, stratified=natural)
    return replace(_deal(units, config, seed)[0], omissions=Omissions(rows=len(rows)))


def _deal(
    units: _Units, config: DataConfig, seed: int, validation: _Validation | None = None
) -> tuple[Prepared, dict[int, str]]:
    """Hold out, deal to clients, cap and split; return that, and the client of every dealt row where a unit is one row."""
    strata = units.labels if units.stratified else [ALL] * len(units.labels)
    held = np.empty(0, np.int64) if validation is not None else holdout.draw_global(strata, config.global_holdout, seed)
    # The global hold-out leaves first, so that no client trains on it, however samples are dealt.
    rest = np.setdiff1d(np.arange(len(units.labels)), held)
    dealt = partition.deal([units.labels[row] for row in rest], config.partition, seed)
    train, held_by_client, counts = [], [], []
    owned: list[NDArray[np.int64]] = []
    # Canonical order: that of every per-client array of a run.
    for name in sorted(dealt):
        stop_point()
        rows, sequences, label_count = _client(name, units, rest[dealt[name]], config, seed)
        kept_rows, held_rows = holdout.split_client(len(sequences), config.holdout, seed, name)
        owned += [rows[kept_rows], rows[held_rows]] if units.packed else []
        train.append(sequences.select(kept_rows))
        held_by_client.append(sequences.select(held_rows))
        counts.append(label_count)
    owners = {} if units.rows is None else {units.rows[row]: name for name in dealt for row in rest[dealt[name]]}
    prepared = Prepared(
        names=sorted(dealt),
        train=train,
        holdout=held_by_client,
        global_holdout=_finished(units, held, config.sequence_length) if validation is None else validation.shuffled,
        distribution=_distribution(counts),
        omissions=Omissions(),
        shared=_shared(units, [*owned, held], validation) if units.packed else None,
    )
    return prepared, owners


def _shared(units: _Units, rows: list[NDArray[np.int64]], validation: _Validation | None) -> Shared:
    """Units and what each owner has of them; a validation of its own stands behind the units."""
    if validation is None:
        return Shared(units.content, rows)
    ours, theirs = units.content, validation.content
    content = Sequences(ours.input_ids + theirs.input_ids, ours.loss_mask + theirs.loss_mask)
    return Shared(content, [*rows[:-1], validation.order + len(ours)])


def _row_labels(table: Table, columns: dict[str, str], config: DataConfig, group_column: str | None) -> list[str]:
    """Return the label of each row: the partition column, the class, the source's group, or one label for all."""
    kind, column = config.partition.kind, config.partition.column
    if column is not None:
        templates.require_column(column, table.names, "data.partition.column")
    # A class is what a Dirichlet partition skews; a natural one asks who wrote the text, not what it is about.
    elif "label" in columns and kind != "natural":
        column = columns["label"]
    else:
        column = group_column
    if column is None:
        if kind in ("natural", "dirichlet"):
            raise UserError(
                f"data.partition.column: null: needed for partition.kind={kind} with this source; "
                f"name one of the columns {', '.join(table.names)}"
            )
        return [ALL] * len(table)
    if column == columns.get("label"):
        return groups.group_names(templates.label_words(table, column, config.label_names), column)
    return groups.group_names(table[column], column, table.classes.get(column), table.place)


def _tiers(table: Table, labels: list[str], column: str, natural: bool, place: Callable[[int], str]) -> dict[str, str]:
    """Return what a column says about each client; all rows of a client say the same."""
    where = "federation.tier_column"
    if not natural:
        raise UserError(f"{where}: {column}: needs data.partition.kind=natural: rows that are dealt at random name no client")
    templates.require_column(column, table.names, where)
    tiers: dict[str, str] = {}
    names = groups.group_names(table[column], column, table.classes.get(column), place, where)
    for client, tier in zip(labels, names, strict=True):
        if (other := tiers.setdefault(client, tier)) != tier:
            raise UserError(f"{where}: {column}: client {client} has rows of tiers '{other}' and '{tier}'; give it one of them")
    return tiers


def _weights(table: Table, columns: dict[str, str], config: DataConfig) -> list[int]:
    """Return what a row adds to the size of its group: characters of text (no tokenizer needed), or one sample."""
    return [len(text) for text in table[columns["text"]]] if config.template == "text" else [1] * len(table)


def _rows_in(labels: list[str], wanted: set[str]) -> list[int]:
    return [row for row, label in enumerate(labels) if label in wanted]


def _check_nothing_vanished(wanted: list[str], present: set[str], dropped: int) -> None:
    for name in wanted:
        if name not in present:
            raise _empty_client(name, dropped)
    if not present:
        raise UserError(
            f"data.sequence_length: all {dropped} samples were dropped, as empty or because the answer does not fit; "
            "raise sequence_length or mend the data"
        )


def _empty_client(name: str, dropped: int) -> UserError:
    return UserError(
        f"data.partition: client '{name}': no training sequence is left ({dropped} samples dropped, empty or because "
        "the answer does not fit); raise data.sequence_length or partition.min_samples, or use fewer clients"
    )


def _units(samples: templates.Samples, row_labels: list[str], config: DataConfig, by_group: bool) -> _Units:
    """Return what is dealt; with `by_group`, the documents of a group are packed together before anything is drawn."""
    labels = [row_labels[row] for row in samples.rows]
    if config.template != "text" or not by_group:
        content = Sequences(samples.tokens, samples.loss_mask)
        return _Units(content, labels, packed=config.template != "text", stratified=by_group, rows=samples.rows)
    tokens: list[NDArray[np.int64]] = []
    packed_labels: list[str] = []
    members: dict[str, list[NDArray[np.int64]]] = {}
    for label, document in zip(labels, samples.tokens, strict=True):
        members.setdefault(label, []).append(document)
    # Sorted: the order of packed sequences, and with it every later draw, is that of names and not of rows.
    for label in sorted(members):
        chunks = templates.pack(members[label], config.sequence_length)
        tokens.extend(chunks)
        packed_labels.extend([label] * len(chunks))
    masks = [templates.all_but_first(chunk) for chunk in tokens]
    return _Units(Sequences(tokens, masks), packed_labels, packed=True, stratified=True)


def _finished(units: _Units, rows: NDArray[np.int64], sequence_length: int) -> Sequences:
    """Return the units at `rows` as sequences; documents are packed in the given order."""
    chosen = units.content.select(rows)
    if units.packed:
        return chosen
    chunks = templates.pack(chosen.input_ids, sequence_length)
    return Sequences(chunks, [templates.all_but_first(chunk) for chunk in chunks])


def _client(
    name: str, units: _Units, rows: NDArray[np.int64], config: DataConfig, seed: int
) -> tuple[NDArray[np.int64], Sequences, Counter[str]]:
    """Return one client's units and its sequences after the cap, and how many of its units carry each label."""
    if units.packed:
        # Units that are sequences are capped before they are copied; documents must be packed first.
        rows = rows[holdout.cap(len(rows), config.max_samples, seed, name)]
    counts = Counter(units.labels[row] for row in rows)
    sequences = _finished(units, rows, config.sequence_length)
    if not units.packed:
        sequences = sequences.select(holdout.cap(len(sequences), config.max_samples, seed, name))
    assert len(sequences) > 0, f"client {name} was dealt units but has no sequence"
    return rows, sequences, counts


def _distribution(counts: list[Counter[str]]) -> dict[str, Any]:
    """Return labels by falling total and counts[client][label]; labels beyond `MAX_LABELS` are pooled as "other"."""
    totals: Counter[str] = sum(counts, Counter())
    # By label among equals: the stored distribution is the same in every run.
    ranked = sorted(totals, key=lambda label: (-totals[label], label))
    shown = ranked if len(ranked) <= MAX_LABELS else ranked[: MAX_LABELS - 1]
    table = [[count[label] for label in shown] for count in counts]
    if len(shown) < len(ranked):
        for row, count in zip(table, counts, strict=True):
            row.append(count.total() - sum(row))
        shown = [*shown, "other"]
    return {"labels": shown, "counts": table}
