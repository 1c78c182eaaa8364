"""DeepSpeed's monitors, comms logger, FLOPs profiler and checkpointing do their work and change no bit of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import changed, run


@pytest.mark.timeout(600)
def test_tools_write_their_files_and_change_nothing(nano: dict[str, Any], tmp_path: Path) -> None:
    plain = run(changed(nano, output=str(tmp_path / "plain")), tmp_path)
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
    result = run(watched, tmp_path, ranks=2)
    assert plain.code == result.code == 0, result.stderr
    assert result.digest == plain.digest
    perplexities = (tmp_path / "csv" / "nano" / "perplexity_global_k4.csv").read_text().splitlines()
    assert len(perplexities) == 1 + 3, "a header, the foundation and two rounds"
    for rank in (0, 1):
        rows = (result.folder / f"comms-rank{rank}.csv").read_text()
        assert "all_to_all_single" in rows and "all_reduce" in rows
    assert "Flops Profiler" in (result.folder / "flops.txt").read_text()
