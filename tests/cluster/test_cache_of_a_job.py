"""The cache under the real command: in doubt, and cut short while ranks have it mapped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from launching import Job, changed

from fedmoe_ds.config import Config
from fedmoe_ds.errors import EXIT_LOST
from fedmoe_ds.foundation import resolve_foundation

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_cache_in_doubt_is_told_once_and_a_cut_file_ends_the_job(nano: dict[str, Any], tmp_path: Path) -> None:
    """Two ranks find a folder where a group may write and use one of their own; then a file there is cut under them."""
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(0o775)
    config = Config.model_validate(nano)
    model = resolve_foundation(config.foundation, config.seed, print)  # there already; other tests keep more of them there
    foundation = {"preset": None, "path": str(model), "cache": str(root)}
    tree = changed(nano, output=str(tmp_path / "runs"), foundation=foundation, federation={"rounds": 500})
    own = root / f"user-{os.geteuid()}"
    with Job(tree, tmp_path, ranks=2) as job:
        assert job.wait_until(lambda: job.events("round"))
        # What the rounds read; the rows of every seed ("units-") were closed when the partition had been drawn.
        (file,) = [path for path in (own / "data").rglob("sequences.arrow") if not path.parent.name.startswith("units-")]
        os.truncate(file, 0)
        result = job.finish()
    lines = [line for line in result.stderr.splitlines() if "foundation.cache" in line]
    assert len(lines) == 1 and f"entries are kept in {own}" in lines[0], result.stderr
    # Kept there: rows, what ranks compare, and the sums of the model's files.
    assert sorted(path.name for path in own.iterdir()) == ["data", "shared", "sums"] and list(root.iterdir()) == [own]
    assert result.code == EXIT_LOST and "Traceback" not in result.stderr, result.stderr
    assert any(line.startswith("error: rank ") and f"{file} was mapped" in line for line in result.errors), result.stderr
