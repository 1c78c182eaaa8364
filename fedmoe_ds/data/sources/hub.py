"""Data sets of the `datasets` library as sources: on the Hugging Face hub, or saved in a local folder by `save_to_disk`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedmoe_ds.data.readers import in_one_line
from fedmoe_ds.data.sources.source import with_rows
from fedmoe_ds.data.table import Table
from fedmoe_ds.distributed.stop_points import file_sha256, run_waiting, stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.strict_json import tree_sha256

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class HubSource:
    """One split of a data set on the hub, or in the hub's local cache; `key` is the configuration's key that names it."""

    name: str
    split: str
    group_column: str | None = None
    key: str = "data.source"

    @cached_property
    def _rows(self) -> Dataset:
        import datasets

        with quiet_datasets():
            try:
                return run_waiting(lambda: datasets.load_dataset(self.name, split=self.split), cached(self.name))
            except Exception as error:  # network, permission, spelling, script: one line serves the user for all of them
                raise UserError(
                    f"{self.key}: {self.name} (split {self.split}): cannot be loaded from the hub: "
                    f"{in_one_line(root_cause(error))}; "
                    "check the id, the split and the network, or give a local file"
                ) from error

    def digest(self) -> str:
        # The features belong to it: the words of a ClassLabel are labels that no row shows.
        content = hashlib.sha256(repr(self._rows.features).encode())
        for batch in self._rows.with_format("arrow").iter(batch_size=1000):
            stop_point()
            # Values and not Arrow's buffers: their padding and offsets differ between equal tables.
            content.update(json.dumps(batch.to_pydict(), default=repr, sort_keys=True).encode())
        return content.hexdigest()

    def table(self, wanted: Collection[str]) -> Table:
        return _table(self._rows, wanted, self.key, self.name)


def cached(name: str) -> list[Path]:
    """Where a data set of the hub goes: as downloaded, and as the library prepares it. There need not be anything."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    *owner, last = name.split("/")
    prepared = "___".join([*owner, camelcase_to_snakecase(last)])
    return [
        Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset")),
        Path(datasets.config.HF_DATASETS_CACHE, prepared),
    ]


@dataclass(frozen=True)
class SavedSource:
    """A folder that `save_to_disk` has written: a data set, or the split of a DatasetDict.

    `split` is None where the configuration names none.
    """

    folder: Path
    split: str | None
    group_column: str | None = None
    key: str = "data.source"

    @classmethod
    def is_one(cls, folder: Path) -> bool:
        """Whether a folder looks like it."""
        there = {name for name in ("dataset_dict.json", "state.json", "dataset_info.json") if os.path.isfile(folder / name)}
        return "dataset_dict.json" in there or len(there) == 2

    @cached_property
    def _rows(self) -> Dataset:
        import datasets

        with quiet_datasets():
            try:
                # Mapped, whatever the environment says of small data: the digest is that of its files.
                found = datasets.load_from_disk(str(self.folder), keep_in_memory=False)
            except Exception as error:  # whatever of it is missing or damaged, writing it again helps
                raise UserError(
                    f"{self.key}: {self.folder}: cannot be loaded: {in_one_line(root_cause(error))}; save it again with "
                    "save_to_disk"
                ) from error
        if isinstance(found, datasets.Dataset):
            if self.split is not None:
                raise UserError(
                    f"data.split: {self.split}: {self.folder} holds one data set without splits; drop the key, or give the "
                    "folder of a DatasetDict"
                )
            return found
        split = self.split or "train"
        if split not in found:
            key = "data.split" if self.key == "data.source" else self.key
            raise UserError(f"{key}: {split}: no such split in {self.folder}; use one of {', '.join(found)}")
        return found[split]

    def digest(self) -> str:
        # What is saved again has another state.json, and the same rows in the same files.
        files = sorted(Path(entry["filename"]) for entry in self._rows.cache_files)
        assert files or not len(self._rows), "rows without files would all have one digest"
        try:
            return tree_sha256([repr(self._rows.features), [file_sha256(path) for path in files]])
        except OSError as error:
            raise UserError(
                f"{self.key}: {self.folder}: cannot be read: {error.strerror or error}; mend its permissions"
            ) from error

    def table(self, wanted: Collection[str]) -> Table:
        return _table(self._rows, wanted, self.key, str(self.folder))


def _table(rows: Dataset, wanted: Collection[str], key: str, name: str) -> Table:
    try:
        table = Table.of_dataset(rows, wanted)
    except ValueError as error:
        raise UserError(f"{key}: {name}: {in_one_line(error)}; use another data set or a local file") from error
    return with_rows(table, key, name)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide what `datasets` prints inside, progress and log lines; afterwards both are as they were."""
    import datasets

    shown, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL + 1)  # its errors are raised too, and then told in one line
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        # Only what was on is switched on again: the user may have disabled the bars.
        if shown:
            datasets.enable_progress_bars()


def root_cause(error: BaseException) -> BaseException:
    """Return what went wrong at first: `datasets` wraps it in what it was doing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
