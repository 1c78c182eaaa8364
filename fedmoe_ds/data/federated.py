"""The federated data set: prepared once, by one process, then opened memory-mapped by every rank.

if rank == 0:
    data = prepare(config.data, config.seed, tokenizer, cache_dir)      # finds or makes cache_dir/<content hash>
...                                                                     # broadcast str(data.path)
data = FederatedData.open(path)                                         # reads only the clients it is asked for
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.data import digits
from fedmoe_ds.data.dealing import Prepared
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.forms import formed_shape
from fedmoe_ds.data.mnist import IMAGE_SETS
from fedmoe_ds.data.omissions import Omissions
from fedmoe_ds.data.preparation import assemble, assemble_images
from fedmoe_ds.data.progress import told_to
from fedmoe_ds.data.sequences import Sequences
from fedmoe_ds.data.sources import Source, Sources, open_sources
from fedmoe_ds.data.store import IMAGE_SHAPE, PUBLIC, Store, storage_error, usable, write_store, write_units
from fedmoe_ds.data.task import check_task
from fedmoe_ds.data.templates.chat_template import template_text
from fedmoe_ds.data.templates.reading import Reading
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.cleaning import MADE_FROM
from fedmoe_ds.storage.strict_json import tree_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["FederatedData", "Sequences", "prepare"]

# Part of the cache key: raise it whenever equal inputs would give other sequences or another layout.
FORMAT = 3
READING = "reading"
_FIRST_KEYS = frozenset(
    {"template", "columns", "label_names", "sequence_length", "max_samples", "holdout", "global_holdout", "partition"}
)
"""Keys that are part of every content key, whatever their value."""
_BY_CONTENT = ("source", "split", "validation", "chat_template", "show_samples")
"""Keys that name something whose content is in the key, or that change no sequence."""


@dataclass(frozen=True)
class FederatedData:
    """All clients' sequences, and the sizes that scheduling and aggregation need without reading any of them.

    `names` are in canonical (sorted) order, which is the order of every per-client array. `samples`, int64 [n_clients],
    is |D_i| after hold-outs (a sample of packed text is one sequence, so it equals `train_sequences`). `train_tokens`
    counts the targets of one epoch: target tokens, or images; `train_rows` all of its tokens, or images. `sequence_length` is 1
    for images, because how many rows an image has is the foundation's to say; `image_shape` is [C, H, W], None for text.
    `omissions` counts samples that were left out or cut. `tiers` are the labels of the clients' tiers, None where the data do
    not say them.
    `public` says whether the server has a labelled split of its own: then it is what `train` gives for the index behind the
    clients'. `fingerprint` is a sha256 over all tokens and targets, or pixels and labels. `reading` says how rows became
    tokens: template, columns, and the text of a prompt or a chat template.
    """

    names: list[str]
    samples: NDArray[np.int64]
    train_sequences: NDArray[np.int64]
    train_tokens: NDArray[np.int64]
    train_rows: NDArray[np.int64]
    sequence_length: int
    fingerprint: str
    omissions: Omissions
    path: Path
    _store: Store = field(repr=False, compare=False)
    image_shape: tuple[int, int, int] | None = None
    tiers: list[str] | None = None
    reading: Reading = field(default_factory=dict)
    public: bool = False

    @classmethod
    def open(cls, path: Path | str) -> FederatedData:
        """Open what `prepare` left at `path`; raises UserError where this machine cannot see it."""
        path = Path(path)
        try:
            store = Store(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"foundation.cache: {path}: no readable prepared data ({error}); on several machines, "
                "the cache must be on a file system that all of them share"
            ) from error
        header, clients = store.header, store.clients
        shape = header.get(IMAGE_SHAPE)
        return cls(
            names=clients.names,
            samples=clients.samples,
            # A sample of packed text is one sequence.
            train_sequences=clients.samples,
            train_tokens=clients.train_tokens,
            train_rows=clients.train_rows,
            sequence_length=header["sequence_length"],
            fingerprint=header["fingerprint"],
            omissions=Omissions(**header["omissions"]),
            path=path,
            _store=store,
            image_shape=None if shape is None else tuple(shape),
            tiers=clients.tiers,
            # Data that an earlier version prepared do not say it.
            reading=header.get(READING, {}),
            public=header.get(PUBLIC, False),
        )

    @property
    def distribution(self) -> dict[str, Any]:
        """{"labels": [...], "counts": [client][label]}, in units dealt to the client, its hold-out included."""
        return self._store.clients.distribution

    def label_counts(self) -> NDArray[np.int64]:
        """The same as one array, [clients, labels]."""
        return self._store.clients.counts_CS

    def __len__(self) -> int:
        return len(self.names)

    def train(self, client: int) -> Sequences:
        """Return the training sequences (or images) of one client (its index in `names`), or of the server."""
        # Owners lie in pairs, train then hold-out; the global hold-out is the last one.
        return self._store.read(2 * self._checked(client, self.public))

    def train_lengths(self, client: int) -> NDArray[np.int64]:
        """Return the tokens of each training sequence of one client; nothing else of them is read."""
        return self._store.lengths(2 * self._checked(client, self.public))

    def train_lengths_of(self, clients: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of some clients, which ascend, one after the other."""
        return self._store.lengths_of_owners(2 * clients)

    def holdout(self, client: int) -> Sequences:
        """Return the hold-out of one client, in random order; empty where the client has a single sample."""
        return self._store.read(2 * self._checked(client) + 1)

    def global_holdout(self) -> Sequences:
        """Return the hold-out of everybody, in random order, so that any prefix is representative.

        It is drawn before partitioning, or what `data.validation` names.
        """
        return self._store.read(2 * (len(self.names) + self.public))

    def _checked(self, client: int, more: int = 0) -> int:
        assert 0 <= client < len(self.names) + more, f"client {client} of {len(self.names)}"
        return client


def prepare(
    config: DataConfig,
    seed: int,
    tokenizer: PreTrainedTokenizerFast | None,
    cache_dir: Path,
    code: str | None = None,
    note: Callable[[str], None] | None = None,
    tier_column: str | None = None,
) -> FederatedData:
    """Return the federated data of a run, from `cache_dir/<content hash>` or made now; call it on one rank only.

    The result is a function of (config, seed, tokenizer, content of the source); `tokenizer` is None for an image
    foundation, and `code` the digest of Python code of its own that it runs. A damaged cache entry is reported and made again.
    `note` takes lines of progress, every few seconds; `tier_column` is the column that says of which tier a client is.
    Raises UserError for whatever is wrong with the source, its columns, its rows, the partition or the cache folder, and for
    data of another task than the foundation's.
    """
    if tokenizer is None:
        check_task("image_classification", config)
        if config.show_samples:
            raise UserError(f"data.show_samples: {config.show_samples}: images have no text; drop the key")
        if tier_column is not None:
            raise UserError(f"federation.tier_column: {tier_column}: images have no columns; name clients in federation.tiers")
        return _prepare_images(config, seed, cache_dir)
    check_task("causal_lm", config)
    # The encoder first: a tokenizer that does not serve is told before a large source is read.
    encoder = Encoder(tokenizer, own_code=code is not None)
    sources = open_sources(config, cache_dir.parent)
    folder = cache_dir / _content_key(config, seed, tokenizer, sources, code, tier_column)

    def prepared() -> Prepared:
        with told_to(note):
            return assemble(sources, config, seed, encoder, tier_column)

    header = {"sequence_length": config.sequence_length, MADE_FROM: f"{config.source} as {config.template}"}
    return _found_or_made(folder, prepared, header)


def _prepare_images(config: DataConfig, seed: int, cache_dir: Path) -> FederatedData:
    given = IMAGE_SETS[str(config.source)]
    images = given.split(cache_dir.parent)[1]
    folder = cache_dir / _image_key(config, seed, images)
    shape = formed_shape(config.form, given.shape)
    header = {"sequence_length": 1, IMAGE_SHAPE: list(shape), MADE_FROM: str(config.source)}
    return _found_or_made(folder, lambda: assemble_images(images, config, seed), header)


def _found_or_made(folder: Path, prepared: Callable[[], Prepared], header: dict[str, Any]) -> FederatedData:
    try:
        if not usable(folder):
            _write(folder, prepared(), header)
    except OSError as error:
        raise storage_error(folder.parent, error) from error
    return FederatedData.open(folder)


def _content_key(
    config: DataConfig,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    sources: Sources,
    code: str | None,
    tier_column: str | None,
) -> str:
    parts = {
        "format": FORMAT,
        # The digest stands for the source: the same file under another path is the same data.
        "config": config.model_dump(mode="json", exclude={*_BY_CONTENT, *_at_default(config)}),
        "kind": type(sources.train).__name__,
        "source": sources.train.digest(),
        "seed": seed,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        # Absent where there is no code, so that caches of earlier versions are still found.
        **({} if code is None else {"code": code}),
        **({} if tier_column is None else {"tier_column": tier_column}),
        # What the file or the tokenizer holds, not where it lies.
        **({"chat": template_text(config, tokenizer)} if config.template in ("auto", "chat") else {}),
        **({} if sources.validation is None else {"validation": _named(sources.validation)}),
    }
    return tree_sha256(parts)[:32]


def _named(source: Source) -> list[str]:
    return [type(source).__name__, source.digest()]


def _at_default(config: DataConfig) -> set[str]:
    """Later keys that say what was always done: they are no part of a content key, so that older caches are still found."""
    plain = DataConfig()
    later = type(config).model_fields.keys() - _FIRST_KEYS
    return {name for name in later if getattr(config, name) == getattr(plain, name)}


def _image_key(config: DataConfig, seed: int, images: digits.Images) -> str:
    """What decides the images of every client; settings of text are no part of it."""
    sections = {"max_samples", "holdout", "global_holdout", "partition"}
    parts = {
        "format": FORMAT,
        "config": config.model_dump(mode="json", include=sections),
        "kind": config.source,
        "source": images.digest(),
        "seed": seed,
        # Absent where images stay as they are, so that caches of earlier versions are still found.
        **({} if config.form.kind == "plain" else {"form": config.form.model_dump(mode="json")}),
        **({} if config.public == 0 else {"public": config.public}),
        **({} if config.labels == "shown" else {"labels": config.labels}),
    }
    return tree_sha256(parts)[:32]


def _write(folder: Path, prepared: Prepared, extra: dict[str, Any]) -> None:
    header = {**extra, "omissions": prepared.omissions.as_dict(), READING: prepared.reading}
    content, used = prepared.content, len(prepared.owned.values_N)
    # Of few of many (max_samples), a copy is smaller than the whole; images are few, and have one deal for all.
    if not prepared.shared or content.labels is not None or used * 2 < len(content):
        write_store(folder, prepared, header)
        return
    name = write_units(folder.parent, content, extra)
    dealt = f"{extra.get(MADE_FROM, '')}, dealt to {len(prepared.names)} clients out of {name}"
    write_store(folder, prepared, {**header, MADE_FROM: dealt}, name)
