"""Peak memory does not grow with the number of clients: 8, 64 and 256 of them, eight in flight."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from every import every
from federations import make_config, run_alone, write_inputs

pytestmark = pytest.mark.timeout(600)

# With this rank a client in flight costs 1.8 MiB of adapters, gradients and moments; 256 of them would be most of a process.
CHANGE: dict[str, Any] = {
    "adapters": {"rank": 32},
    "federation": {"rounds": 1},
    "local": {"steps": 1, "batch_size": 1},
    "evaluation": {"client_sequences": 0},
    "execution": {"clients_in_flight": 8},
}
COUNTS = (8, 64, 256)


def config_of(root: Path, clients: int) -> Any:
    partition = {"kind": "iid", "clients": clients, "column": None}
    return make_config(root, f"clients-{clients}", CHANGE, {"data": {"partition": partition}})


def peak_kib() -> int:
    """The largest resident size of this process (not of the one that started it, which getrusage would count)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1])


def main(root: Path, clients: int) -> None:
    result = run_alone(config_of(root, clients))
    (event,) = [event for event in result.events if event["event"] == "round"]
    assert (event["participants"], event["waves"]) == (clients, clients // 8)
    sys.stdout.write(f"{peak_kib()} {result.parts.execution.bank.nbytes()}\n")


def test_peak_memory(tmp_path: Path) -> None:
    write_inputs(tmp_path, (640,))
    commands = [[sys.executable, __file__, str(tmp_path), str(clients)] for clients in COUNTS]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands]
    outputs = [process.communicate(timeout=540) for process in processes]
    assert every(process.returncode == 0 for process in processes), "\n".join(error for _, error in outputs)
    peaks, banks = zip(*(map(int, out.split()) for out, _ in outputs), strict=True)
    assert len(set(banks)) == 1, "the bank is as large as the clients in flight"
    assert max(peaks) <= 1.05 * min(peaks), dict(zip(COUNTS, peaks, strict=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
