"""Two ranks: rank 0 does alone what has no stop points, the other one waits; then both say that they are done.

Arguments: `works` or `hangs`, seconds of the work, and `topology.timeout_s`.
"""

from __future__ import annotations

import sys
import time
from tempfile import TemporaryFile

from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed import signs_of_work
from fedmoe_ds.distributed.launcher import detect_launch
from fedmoe_ds.distributed.long_work import LongWork
from fedmoe_ds.distributed.runtime import init_runtime, run_entry
from fedmoe_ds.distributed.stop_points import run_waiting
from fedmoe_ds.distributed.stop_request import StopRequest


def main() -> int:
    kind, seconds, timeout = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    signs_of_work.STANDSTILL_S = 3.0
    # The system counts in steps of 10 ms, and threads that serve the exchanges take one now and then: too coarse for a share of
    # so short a time. The bytes that this work writes are its signs.
    signs_of_work._LEAST_SHARE = 0.5
    runtime = init_runtime(detect_launch(), TopologyConfig(device="cpu", timeout_s=timeout))

    def work() -> str:
        if kind == "hangs":
            time.sleep(seconds)
            return "done"
        end = time.monotonic() + seconds
        with TemporaryFile(buffering=0) as file:
            while time.monotonic() < end:
                # A sign of work that competes with no rank for a core.
                file.write(bytes(1 << 20))
                file.seek(0)
                time.sleep(0.05)
        return "done"

    print(LongWork(runtime, StopRequest()).run_on_rank0(lambda: run_waiting(work)), flush=True)
    runtime.barrier()
    return 0


if __name__ == "__main__":
    run_entry(main)
