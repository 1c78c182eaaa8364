"""Given data: rows that are scored as they are. Nothing of them is dealt to clients, drawn or held out.

They are read as those of a run: the same sources, templates and rules for columns. Where a column or the source itself says
whose a row is, they are there once more by client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.data import templates
from fedmoe_ds.data.dealing import NOBODY
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.forms import Dealt, formed
from fedmoe_ds.data.groups import group_names
from fedmoe_ds.data.mnist import IMAGE_SETS
from fedmoe_ds.data.omissions import Omissions
from fedmoe_ds.data.progress import told_to
from fedmoe_ds.data.sequences import Sequences
from fedmoe_ds.data.sources import open_sources, source_name
from fedmoe_ds.data.table import Table
from fedmoe_ds.data.templates import Reading, Samples
from fedmoe_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class GivenData:
    """All rows in their order, and those of every client by name. To an evaluation all rows are the global hold-out."""

    everybody: Sequences
    owners: dict[str, Sequences]
    omissions: Omissions
    sequence_length: int
    reading: Reading = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.owners)

    def train(self, client: int) -> Sequences:
        """Nothing: these rows train nobody."""
        return self.everybody.select([])

    def holdout(self, client: int) -> Sequences:
        """The rows of one client (its place in `owners`)."""
        return list(self.owners.values())[client]

    def global_holdout(self) -> Sequences:
        return self.everybody


def given_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    cache: Path,
    code: str | None = None,
    by_client: bool = False,
    note: Callable[[str], None] | None = None,
    seed: int = 0,
) -> GivenData:
    """Read what `data.source` names.

    Args:
        tokenizer: None for an image classifier.
        cache: root of the cache folder.
        code: digest of the tokenizer's own Python code, if it runs any.
        seed: what the form of images draws by (`data.form`).
        by_client: also sort the rows by client: by `data.partition.column`, else as the source says.
    Raises:
        UserError: for whatever is wrong with source, columns or rows; nothing is left of them; no column says whose a row is.
    """
    if tokenizer is None:
        return _images(config, cache, by_client, seed)
    encoder = Encoder(tokenizer, own_code=code is not None)
    source = open_sources(config, cache).train
    owner = (config.partition.column or source.group_column) if by_client else None
    if by_client and owner is None:
        raise _nobody(config)
    table = source.table(templates.candidates(config) | ({owner} if owner is not None else set()))
    config = templates.resolve_template(table, config)
    columns = templates.resolve_columns(table, config)
    templates.check_rows(table, columns, config)
    names = None if owner is None else _names(table, owner)
    with told_to(note):
        samples = templates.encode(table, columns, config, encoder)
    if not samples.rows:
        raise UserError(
            f"data.source: {source_name(config.source)}: all {len(table)} samples are empty or do not fit; raise "
            "data.sequence_length or mend them"
        )
    found = [(kind, None if names is None else names[row]) for row, kind in samples.omissions]
    return GivenData(
        _sequences(samples, range(len(samples.rows)), config),
        _by_owner(samples, names, config),
        Omissions.of(len(table), found),
        config.sequence_length,
        templates.reading_of(table, columns, config, encoder),
    )


def _names(table: Table, column: str) -> list[str]:
    templates.require_column(column, table.names, "data.partition.column")
    return group_names(table[column], column, table.classes.get(column), table.place)


def _by_owner(samples: Samples, names: list[str] | None, config: DataConfig) -> dict[str, Sequences]:
    places: dict[str, list[int]] = {}
    for place, row in enumerate(samples.rows if names is not None else ()):
        assert names is not None
        places.setdefault(names[row], []).append(place)
    # Sorted, as the clients of a run are.
    return {name: _sequences(samples, places[name], config) for name in sorted(places)}


def _sequences(samples: Samples, places: range | list[int], config: DataConfig) -> Sequences:
    """Encoded rows as sequences; documents are packed in their order."""
    if config.template != "text":
        return Sequences([samples.tokens[place] for place in places], [samples.loss_mask[place] for place in places])
    chunks = templates.pack([samples.tokens[place] for place in places], config.sequence_length)
    return Sequences(chunks, [templates.all_but_first(chunk) for chunk in chunks])


def _images(config: DataConfig, cache: Path, by_client: bool, seed: int) -> GivenData:
    images = IMAGE_SETS[str(config.source)].split(cache)[1]
    # A form asks whose an image is. With `by_client` every class is a client; else nobody owns anything here.
    classes, class_N = np.unique(images.labels_N, return_inverse=True)
    client_N = class_N if by_client else np.full(len(images), NOBODY)
    dealt = Dealt(images.pixels_NCHW, images.labels_N, client_N, len(classes) if by_client else 0, seed)
    everybody = formed(Sequences.of_images(images.pixels_NCHW, images.labels_N), dealt, config.form)
    owners: dict[str, Sequences] = {}
    if by_client:
        # Images have no column but their class, and a natural partition makes that the client.
        if config.partition.kind != "natural":
            raise _nobody(config)
        owners = {
            str(label): everybody.select(np.flatnonzero(images.labels_N == label)) for label in np.unique(images.labels_N)
        }
    return GivenData(everybody, owners, Omissions(rows=len(images)), 1)


def _nobody(config: DataConfig) -> UserError:
    return UserError(
        f"--clients: {source_name(config.source)}: nothing says whose a row is; name its column with "
        "data.partition.column=COLUMN, or drop --clients"
    )
