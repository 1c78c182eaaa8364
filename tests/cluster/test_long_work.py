"""What rank 0 does alone for longer than `topology.timeout_s`: no verdict while it works, one when it hangs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedmoe_ds.distributed.supervisor import Supervisor
from fedmoe_ds.errors import EXIT_LOST

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PROGRAM = Path(__file__).with_name("long_work_program.py")
TIMEOUT_S = 10.0
"""Far longer than a busy machine lets ranks wait that need next to no processor time: a verdict is one on the work."""


@pytest.mark.parametrize("kind", ["works", "hangs"])
def test_a_rank_that_works_alone_is_waited_for(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    seconds = 2 * TIMEOUT_S if kind == "works" else 200.0
    command = [sys.executable, str(PROGRAM), kind, str(seconds), str(TIMEOUT_S)]
    code = Supervisor(command, 2, 0, 60.0, print).run()
    said = capfd.readouterr()
    if kind == "works":
        # Two processes write here at once: a word and the end of its line are two writes.
        assert code == 0 and said.out.count("done") == 2, said.err
    else:
        assert code == EXIT_LOST and "done" not in said.out
        (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert "rank 1 on " in line and "in gather over the world" in line and "not in it: rank 0 on " in line, line
