"""What a host reads for a foundation's fingerprint, at its first start and at the next one, with eight ranks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]

from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.foundation import file_sums
from fedmoe_ds.foundation.fingerprint import shared_fingerprint
from fedmoe_ds.foundation.meta_model import CONFIG_FILE
from fedmoe_ds.foundation.weight_files import INDEX_FILE

NAME = "start"
X = "GiB of weights"
POINTS = (1, 4, 16)
WALL = "the second start of a job on the same files: 20 s a host; it reads pages, not files; the first reads each byte once"
_RANKS, _FILE = 8, 256 * 2**20
_SLACK = 0.05
"""Of the weights: what a start may read beside them, or again. Looks at pages are 0.3 %: 256 KiB of a file each."""
_GIB = 2**30
T = TypeVar("T")


def measure(x: int) -> dict[str, float]:
    """Raises what a rank has raised, and RuntimeError where a start has not read what it has to read."""
    with scratch_folder() as scratch:
        model = _written(scratch / "model", x * _GIB // _FILE)
        # As of a model that was there before: what has just been written is read again.
        time.sleep(max(0.0, file_sums.unsettled_s(model.glob("*.safetensors"))))
        first_s, first_gib, found = _start(model, scratch / "sums")
        again_s, again_gib, found_again = _start(model, scratch / "sums")
    # Without these a fingerprint that does nothing would have the best curve.
    if len(found | found_again) != 1:
        raise RuntimeError(f"ranks and starts have {len(found | found_again)} fingerprints of one model")
    if abs(first_gib - x) > _SLACK * x or again_gib > _SLACK * x:
        raise RuntimeError(f"of {x} GiB the first start has read {first_gib:.3f} GiB, and the second one {again_gib:.3f} GiB")
    return {
        "seconds": first_s,
        "read_gib": first_gib,
        "second_start_s": again_s,
        "second_start_read_mib": again_gib * 1024,
    }


def _written(folder: Path, files: int) -> Path:
    """A model folder of holes: they cost no disk, and are read and hashed as any bytes are."""
    folder.mkdir()
    (folder / CONFIG_FILE).write_text("{}", encoding="utf-8")
    names = [f"model-{number:05}.safetensors" for number in range(files)]
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(_FILE)
    index = {"weight_map": {f"tensor {number}": name for number, name in enumerate(names)}}
    (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    return folder


def _start(model: Path, sums: Path) -> tuple[float, float, set[str]]:
    """Seconds, GiB that this process has read, and the fingerprints that its ranks have found."""
    process, world = psutil.Process(), _World(_RANKS)
    before, began = process.io_counters().read_chars, time.perf_counter()
    found = world.run(lambda rank: shared_fingerprint(model, sums, ["host"] * _RANKS, rank))
    return time.perf_counter() - began, (process.io_counters().read_chars - before) / _GIB, set(found)


class _World:
    """Ranks as threads, with what a fingerprint needs of them."""

    def __init__(self, size: int) -> None:
        self._slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=600.0)

    def run(self, action: Callable[[_Rank], T]) -> list[T]:
        """What every rank returns; raises the error of the lowest rank that has one of its own."""

        def work(number: int) -> T:
            try:
                return action(_Rank(self, number))
            except BaseException:
                # The others would wait for this one until their time is up.
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(self._slots), "rank") as pool:
            ranks = [pool.submit(work, number) for number in range(len(self._slots))]
        errors = [error for rank in ranks if (error := rank.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [rank.result() for rank in ranks]

    def exchange(self, number: int, value: Any) -> list[Any]:
        self._slots[number] = value
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found


class _Rank:
    def __init__(self, world: _World, number: int) -> None:
        self.world, self.rank = world, number

    def gather(self, value: Any) -> list[Any]:
        return self.world.exchange(self.rank, value)

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        return action()
