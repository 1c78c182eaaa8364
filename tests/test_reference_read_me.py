"""The package's Read-ME rounds against the slow float64 reference in `reference_read_me.py`: a turn of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_inputs import write_dense
from federations import alone, build, finish, make_config
from read_me_inputs import ON_READ_ME, write_read_me
from reference import Settings
from reference_inputs import TOLERANCE, check_equal, fresh, initial, tasks
from reference_read_me import ReadMe, ReadMeReference

pytestmark = pytest.mark.timeout(600)

SAMPLES = (7, 6, 5)
LOCAL: dict[str, Any] = {"clip": 0.5, "eps": 1e-4, "lr": 5e-3, "weight_decay": 0.1}


def test_same_rounds(tmp_path: Path) -> None:
    write_dense(tmp_path, ("llama",), SAMPLES)
    folder = write_read_me(tmp_path)
    run = {"foundation": {"path": str(folder)}, "seed": 1, "local": LOCAL, "execution": {"micro_batch_size": 3}}
    run |= {"evaluation": {"max_sequences": 1000, "client_sequences": 0}}
    parts, journal = build(make_config(tmp_path, "reference", ON_READ_ME, run), *alone())
    reference = ReadMeReference(tmp_path / "llama", folder, Settings(1.0, micro=3, **LOCAL))
    expected = ReadMe(reference, initial(parts), [client.index for client in parts.clients])
    for round_index in (1, 2):
        expected.round(tasks(parts, round_index), fresh(parts, round_index))
    assert reference.margin > 1e-6, "routing is too near to a tie for a comparison"
    result = finish(parts, journal)
    check_equal(expected.adapters, {key: torch.from_numpy(value) for key, value in result.adapters.items()})
    held = parts.data.global_holdout()
    (event,) = [e for e in result.events if e["event"] == "eval" and e["round"] == 2 and e["split"] == "global"]
    loss = reference.evaluate(expected.adapters, torch.ones(1, dtype=torch.float64), 1, held)
    assert event["loss"] == pytest.approx(loss, rel=TOLERANCE)
