"""Preparation: what a start does before its first round, done before the job by one process.

The same functions as of a start (`build.py`), into the same cache, so that a start with the same keys finds all of it. Nothing
is loaded: neither the model's weights nor a process group are needed for what is prepared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from fedmoe_ds.config import Config
from fedmoe_ds.data import FederatedData
from fedmoe_ds.data import prepare as prepare_data
from fedmoe_ds.distributed.stop_points import run_waiting, stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.run_spec import RunSpec, check_promise, check_start, resolve_spec
from fedmoe_ds.federation.sequence_checks import check_packed_samples
from fedmoe_ds.foundation import file_sums, host_sharing, resolve_foundation
from fedmoe_ds.foundation.fingerprint import fingerprint_of, unnamed_files
from fedmoe_ds.foundation.foundation import cache_folder, open_skeleton
from fedmoe_ds.foundation.loading import Skeleton
from fedmoe_ds.foundation.outline import outline
from fedmoe_ds.foundation.own_code import running
from fedmoe_ds.foundation.tokenizer import load_tokenizer
from fedmoe_ds.foundation.weight_files import WeightFiles
from fedmoe_ds.storage import cache

T = TypeVar("T")
Note = Callable[[str], None]
_THREADS = 8
"""That read at once: one alone is slower than most network file systems."""
_LOOK_S = 0.5
_LONGEST_WAIT_S = 90.0
"""More than that only a clock that runs ahead asks for."""


def prepare(config: Config, ranks: int, note: Note) -> Iterator[str]:
    """Fill the cache for a configuration; yields a line about each thing with its size and seconds.

    Args:
        ranks: of each host of a job on CPUs; from two on they map common weights, which are written here.
        note: takes lines of progress.
    Raises:
        UserError: whatever a start would refuse on the way to what is prepared.
        StopError: asked to stop between two steps.
    """
    began, kind = time.monotonic(), "cuda" if config.topology.device == "cuda" else "cpu"
    check_promise(config, kind)
    host_sharing.check_mapped(config.foundation, kind)
    config, method = check_start(config, kind)
    if ranks > 1 and kind != "cpu":
        raise UserError(f"--ranks: {ranks}: ranks share no weights in the memory of GPUs; drop it")
    foundation = config.foundation
    folder, told = _made(cache_folder(foundation, "foundations"), lambda: resolve_foundation(foundation, config.seed, note))
    skeleton = open_skeleton(folder, foundation, 1, 0, kind)
    files = WeightFiles(folder).paths
    yield f"foundation: {folder}: {len(files)} weight files, {_mib(files)}: {told}"
    spec = resolve_spec(config, method, kind, outline(skeleton.model, skeleton.layers, foundation.expand))
    data, told = _made(cache_folder(foundation, "data"), lambda: _prepared(spec, folder, note))
    yield f"data: {len(data)} clients, {int(data.train_sequences.sum()):,} sequences in {data.path}: {told}"
    fingerprint, told = _summed(folder, cache_folder(foundation, file_sums.KIND), note)
    yield f"sums of the model's files: {told}"
    if ranks > 1 or foundation.mapped == "all":
        yield _weights(config, skeleton, fingerprint)
    yield f"prepared in {time.monotonic() - began:.1f} s; a start with the same keys finds it in {cache.root(foundation.cache)}"
    if (ignored := cache.line([cache.passed_over()])) is not None:
        yield ignored


def _made(place: Path, action: Callable[[], T]) -> tuple[T, str]:
    """The result of an action that fills a folder of the cache, and in words what it has cost."""
    before, began = _entries(place), time.monotonic()
    result = action()
    new = [file for entry in _entries(place) - before for file in entry.rglob("*") if file.is_file()]
    return result, f"{f'made, {_mib(new)}' if new else 'found'}, {time.monotonic() - began:.1f} s"


def _entries(place: Path) -> set[Path]:
    return set(place.iterdir()) if place.is_dir() else set()


def _mib(files: list[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB"


def _prepared(spec: RunSpec, folder: Path, note: Note) -> FederatedData:
    config, trust = spec.config, spec.config.foundation.trust_remote_code
    tokenizer = load_tokenizer(folder, spec.size.vocabulary, trust) if spec.images is None else None
    place, column = cache_folder(config.foundation, "data"), config.federation.tier_column
    data = prepare_data(config.data, config.seed, tokenizer, place, running(folder, trust), note, column)
    check_packed_samples(config, data.reading.get("template"))
    return data


def _summed(folder: Path, place: Path, note: Note) -> tuple[str, str]:
    """The fingerprint, and in words what was read for it."""
    began, files = time.monotonic(), unnamed_files(folder)
    read = [file for file in files if not file_sums.is_remembered(file, place)]
    _wait_until_settled(read, note)
    threads = min(_THREADS, os.cpu_count() or 1)
    found = run_waiting(lambda: file_sums.file_sums(files, place, threads))
    kept = [file for file in read if file_sums.is_remembered(file, place)]
    alone = kept and file_sums.network_view(kept) is None
    where = "; on a disk of this machine: another one reads them for itself, once" if alone else ""
    said = f"{len(read)} read, {_mib(read)}, {len(files) - len(read)} known, {time.monotonic() - began:.1f} s{where}"
    return fingerprint_of(folder, found), said


def _wait_until_settled(files: list[Path], note: Note) -> None:
    """Until files that have just been written are old enough for their sums to be remembered."""
    wait = file_sums.unsettled_s(files)
    if not 0 < wait <= _LONGEST_WAIT_S:
        return
    note(f"waiting for {wait:.0f} s: the sum of a file that has just been written cannot be remembered")
    end = time.monotonic() + wait
    while time.monotonic() < end:
        time.sleep(_LOOK_S)
        stop_point()


def _weights(config: Config, skeleton: Skeleton, fingerprint: str) -> str:
    """Write what ranks of a host map."""
    section, began, whole = config.foundation, time.monotonic(), config.topology.ep_size == 1
    root, sums = cache_folder(section, host_sharing.FOLDER), cache_folder(section, file_sums.KIND)
    before = _entries(root)
    used = host_sharing.write_shared(skeleton, fingerprint, whole, root, sums)
    new = len(used.keys() - before)
    said = f"{new} written, {len(used) - new} found, {time.monotonic() - began:.1f} s"
    # A shard needs the process groups of a job.
    rest = "" if whole else f"; shards of experts are written by the first start (topology.ep_size {config.topology.ep_size})"
    return f"weights that ranks of a host map: {len(used)} files, {sum(used.values()) / 2**20:,.1f} MiB: {said}{rest}"
