"""DeepSpeed's monitors, comms logger, FLOPs profiler and checkpointing do their work and change no bit of the result. A log
and another amount of words change none, either."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import deepspeed.comm as ds_comm
import pytest
import torch
from deepspeed.utils.comms_logging import CommsLogger
from launching import Result, changed, run
from torch import Tensor

from fedmoe_ds.distributed.collectives import Exchange


@pytest.mark.timeout(600)
def test_tools_write_their_files_and_change_nothing(nano: dict[str, Any], tmp_path: Path) -> None:
    quiet = ("--quiet", "--log", str(tmp_path / "quiet.log"))
    plain = run(changed(nano, output=str(tmp_path / "plain")), tmp_path, options=quiet)
    section = {
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "nano"},
        "comms_logger": {"enabled": True},
        "flops_profiler": {"enabled": True, "profile_step": 2, "module_depth": 1, "detailed": False},
        "activation_checkpointing": {"cpu_checkpointing": False},
    }
    watched = changed(
        nano,
        output=str(tmp_path / "watched"),
        topology={"ep_size": 2},
        execution={"activation_checkpointing": True},
        deepspeed=section,
    )
    result = run(watched, tmp_path, ranks=2, options=("--verbose", "--log", str(tmp_path / "logs" / "run-%r.log")))
    assert plain.code == result.code == 0, result.stderr
    assert result.digest == plain.digest
    perplexities = (tmp_path / "csv" / "nano" / "perplexity_global_k4.csv").read_text().splitlines()
    assert len(perplexities) == 1 + 3, "a header, the foundation and two rounds"
    for rank in (0, 1):
        rows = (result.folder / f"comms-rank{rank}.csv").read_text()
        assert "all_to_all_single" in rows and "all_reduce" in rows
    assert "Flops Profiler" in (result.folder / "flops.txt").read_text()
    check_words(plain, result, tmp_path)


class SlowBackend:
    """Of DeepSpeed: rows to peers take a fifth of a second, in the call or until they are waited for."""

    using_mpi = False

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self, group: Any = None) -> int:
        return 2

    def all_to_all_single(self, output: Tensor, input: Tensor, async_op: bool, **parts: Any) -> SlowBackend | None:
        return self if async_op else self.wait()

    def wait(self) -> None:
        time.sleep(0.2)


def test_the_log_times_rows_that_travel_until_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = CommsLogger()
    logger.enabled = logger.prof_all = True
    for name, value in {"cdb": SlowBackend(), "comms_logger": logger}.items():
        monkeypatch.setattr(ds_comm.comm, name, value)
    rows = torch.ones(4, 2)
    assert Exchange(rows, None, [2, 2], [2, 2]).wait().shape == rows.shape
    ((_, (count, (milliseconds,), *_)),) = logger.comms_dict["all_to_all_single"].items()
    assert count == 1 and milliseconds >= 200.0


def check_words(plain: Result, result: Result, folder: Path) -> None:
    """The quiet run shows its last two lines alone and has logged the rest; the wordy one has a log for each rank."""
    assert plain.stdout.splitlines() == [f"digest: {plain.digest}", f"run: {plain.folder}"]
    assert "perplexity" not in plain.stderr
    logged = (folder / "quiet.log").read_text()
    assert "round 2/2  " in logged and "perplexity before" in logged and f" run: {plain.folder}\n" in logged
    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    assert logs.keys() == {"run-0.log", "run-1.log"}
    for text in logs.values():
        for words in ("versions: python ", "cache: ", "round 1: schedule ", "collectives ", "round 2/2  "):
            assert words in text, words
    assert "digest: " in logs["run-0.log"] and "digest: " not in logs["run-1.log"]
    assert "[rank 1] round 2/2  " in result.stderr and "[rank 0]" not in result.stderr
