"""What clients keep for themselves: a round of 100 participants after one of all clients, and its checkpoint."""

from __future__ import annotations

import time

import torch

from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.checkpoint.client_rows import Slabs
from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.checkpoint.reader import Snapshot
from fedmoe_ds.checkpoint.writer import CheckpointWriter
from fedmoe_ds.distributed.control import Alone
from fedmoe_ds.distributed.launcher import Launch
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.model.adapter_bank import BlockSpec

NAME = "personal"
X = "clients"
POINTS = (1_000, 10_000, 50_000)
WALL = "a rank holds the rows of clients / clusters, in memory up to 4 GiB; a checkpoint writes those of the participants"
_PARTICIPANTS, _ROUNDS = 100, 8
_SPEC = BlockSpec("attention.q_proj.lora_B", tuple(range(4)), (128, 8), personal=True)  # 16 KiB for a client
_MIB = 2**20


def measure(x: int) -> dict[str, float]:
    """Seconds of a later round, and MiB that its checkpoint writes (mean of 8), of all files of a checkpoint, and of rows."""
    with scratch_folder() as place:
        root, scratch = place / "checkpoints", place / "scratch"
        personal = Personal([_SPEC], 1, x, slabs=Slabs(_MIB << 10, lambda: scratch))
        runtime = Runtime(Launch("bench", 0, 1, 0), torch.device("cpu"), Alone())
        writer = CheckpointWriter(root, runtime, keep=2, background=False)
        _round(personal, runtime, list(range(x)))
        first = _save(personal, writer, 0)
        seconds, written = 0.0, 0
        for index in range(1, _ROUNDS + 1):
            chosen = [(index * 7919 + i * 31) % x for i in range(_PARTICIPANTS)]
            began = time.perf_counter()
            _round(personal, runtime, chosen)
            written += _save(personal, writer, index)
            seconds += time.perf_counter() - began
        (newest,) = root.glob(f"round-{_ROUNDS:05d}")
        size = sum(path.stat().st_size for path in newest.iterdir())
        return {
            "seconds": seconds / _ROUNDS,
            "written_mib": written / _ROUNDS / _MIB,
            "first_mib": first / _MIB,
            "folder_mib": size / _MIB,
            "rows_mib": x * personal.layout.width * 4 / _MIB,
        }


def _round(personal: Personal, runtime: Runtime, chosen: list[int]) -> None:
    personal.fetch([chosen], runtime)
    for index in chosen:
        personal.store(index, _SPEC.name, personal.state(index)[_SPEC.name] + 1.0)
    personal.share(runtime, runtime.control)


def _save(personal: Personal, writer: CheckpointWriter, round_index: int) -> int:
    """Write a checkpoint; bytes of the files that it does not share."""
    files, plan = personal.to_write()
    folder = writer.begin(Snapshot(round_index, {}, 0), files, {}, kept=plan.keep, source=plan.source)
    writer.finish()
    personal.files.source = folder
    return sum((folder / name).stat().st_size for name in files)
