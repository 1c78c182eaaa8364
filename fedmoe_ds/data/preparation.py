"""From a source to every client's sequences: choose groups, encode, and deal (`dealing`): hold out, cap, split, pack.

Nothing here depends on the number of ranks: only one process prepares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.data import digits, groups, partition, templates
from fedmoe_ds.data.dealing import ALL, GivenHoldout, Prepared, Units, deal_units
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.forms import Dealt, formed
from fedmoe_ds.data.omissions import LEFT_OUT, Omissions
from fedmoe_ds.data.sequences import Sequences
from fedmoe_ds.data.sources import Source, Sources, source_name
from fedmoe_ds.data.table import Table
from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import generator

Owner = Callable[[int], str | None]
"""The client of a row of the source."""


@dataclass(frozen=True)
class _Validation:
    """The hold-out that the configuration names, and the rows that were read for it."""

    given: GivenHoldout
    rows: int
    omissions: list[tuple[int, str]]


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
    prepared, client_N = deal_units(units, config, seed, None if validation is None else validation.given)
    # Natural: the client of a left-out row is known from its label. Else only dealt rows have a client.
    owner_of: Owner = labels.__getitem__ if natural else _owner_of(units, prepared.names, client_N)
    found = [(kind, owner_of(row)) for row, kind in samples.omissions]
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
    tokens, masks = samples.tokens, samples.loss_mask
    if config.template == "text":
        tokens = templates.pack(tokens, config.sequence_length)
        masks = [templates.all_but_first(chunk) for chunk in tokens]
    content = Sequences(tokens, masks)
    # In random order: an evaluation may take the first sequences only.
    order = generator(seed, "validation-order").permutation(len(content))
    return _Validation(GivenHoldout(content, order), len(table), samples.omissions)


def assemble_images(images: digits.Images, config: DataConfig, seed: int) -> Prepared:
    """Return all clients' images in the form that `data.form` names. The label of an image is its class: a natural partition
    gives one client per class.

    Raises UserError for too few images and clients that would be empty.
    """
    labels = [str(label) for label in images.labels_N]
    rows = np.arange(len(images))
    natural = config.partition.kind == "natural"
    if natural:
        wanted = set(partition.largest_groups(labels, [1] * len(labels), config.partition.clients, seed))
        rows = np.array(_rows_in(labels, wanted))
    content = Sequences.of_images(images.pixels_NCHW[rows], images.labels_N[rows])
    units = Units(content, [labels[row] for row in rows], packed=True, stratified=natural)
    prepared, client_N = deal_units(units, config, seed)
    dealt = Dealt(images.pixels_NCHW[rows], images.labels_N[rows], client_N, len(prepared.names), seed)
    content = formed(content, dealt, config.form)
    if config.labels == "hidden":
        content = _unlabelled(content, prepared)
    return replace(prepared, content=content, omissions=Omissions(rows=len(rows)))


def _unlabelled(content: Sequences, prepared: Prepared) -> Sequences:
    """The images, those that clients train on with class 0 in the place of theirs: whatever is stored, nobody can look up."""
    assert content.labels is not None
    labels_N, train = content.labels.copy(), range(0, 2 * len(prepared.names), 2)
    for own in train:
        labels_N[prepared.owned[own]] = 0
    return replace(content, labels=labels_N)


def _owner_of(units: Units, names: list[str], client_N: NDArray[np.int64]) -> Owner:
    """The client of a row, where a unit is one row; None where it has none."""
    # Of few rows something is told, so they are looked up: all of them by name would be a large dictionary.
    rows = np.array(units.rows or [], np.int64)
    order = np.argsort(rows, kind="stable")

    def owner(row: int) -> str | None:
        place = int(np.searchsorted(rows, row, sorter=order))
        if place == len(rows) or rows[order[place]] != row:
            return None
        client = int(client_N[order[place]])
        return None if client < 0 else names[client]

    return owner


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


def _units(samples: templates.Samples, row_labels: list[str], config: DataConfig, by_group: bool) -> Units:
    """Return what is dealt; with `by_group`, the documents of a group are packed together before anything is drawn."""
    labels = [row_labels[row] for row in samples.rows]
    if config.template != "text" or not by_group:
        content = Sequences(samples.tokens, samples.loss_mask)
        return Units(content, labels, packed=config.template != "text", stratified=by_group, rows=samples.rows)
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
    return Units(Sequences(tokens, masks), packed_labels, packed=True, stratified=True)
