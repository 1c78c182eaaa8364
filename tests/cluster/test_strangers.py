"""Strangers attack a real job on two ranks: it ends with the digest of a calm run, and says how many it has turned away."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from federations import make_config, run_alone, write_inputs
from launching import SCRIPT, read_events
from strangers import WORDS, Crowd, connect, is_closed, open_files
from test_launchers import environment, free_port

LATE = Path(__file__).parent / "late_program.py"
SHORT: dict[str, Any] = {"federation": {"rounds": 2}, "topology": {"silence_s": 15.0, "timeout_s": 60.0}}


class Attacked:
    """A job on two ranks, of which the second one comes late to the watchdog."""

    def __init__(self, root: Path, name: str, tree: dict[str, Any], late_s: float, master: str) -> None:
        self.place, config = root / f"{name}.port", root / f"{name}.yaml"
        config.write_text(json.dumps(make_config(root, name, tree).model_dump(mode="json")))
        self.run = root / "runs" / name
        self._streams = [root / f"{name}.{rank}.{stream}" for rank in range(2) for stream in ("out", "err")]
        port, self.ranks = free_port(), []
        for rank in range(2):
            program = [str(SCRIPT)] if rank == 0 else [str(LATE), str(self.place), str(late_s)]
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": master, "MASTER_PORT": port}
            with self._streams[2 * rank].open("wb") as out, self._streams[2 * rank + 1].open("wb") as err:
                command = [sys.executable, *program, "--config", str(config)]
                self.ranks.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment(**world)))

    def __enter__(self) -> Attacked:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()

    def words(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self._streams)

    def where(self) -> tuple[str, int]:
        """Rank 0's watchdog."""
        deadline = time.monotonic() + 120.0
        while not self.place.exists():
            assert time.monotonic() < deadline and self.alive(), self.words()
            time.sleep(0.01)
        address, port = self.place.read_text().split()
        return address, int(port)

    def alive(self) -> bool:
        return all(rank.poll() is None for rank in self.ranks)

    def digest(self, timeout_s: float) -> str:
        codes = [rank.wait(timeout_s) for rank in self.ranks]
        assert codes == [0, 0], f"{codes}\n{self.words()}"
        (line,) = [line for line in self._streams[0].read_text().splitlines() if line.startswith("digest: ")]
        return line.removeprefix("digest: ")

    def errors(self) -> list[str]:
        return [line for path in self._streams[1::2] for line in path.read_text(errors="replace").splitlines()]


def assert_unharmed(job: Attacked, calm: str, timeout_s: float) -> int:
    """The digest of the calm run, and one line about strangers; how many it counts."""
    assert job.digest(timeout_s) == calm
    lines = job.errors()
    assert not [line for line in lines if line.startswith("error: ") or "Traceback" in line], job.words()
    (warning,) = [line for line in lines if "watchdog" in line]
    assert warning.startswith("warning: watchdog: ") and "connections that were no rank's were turned away" in warning
    return int(warning.split()[2])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("strangers")
    write_inputs(root)
    return root


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_an_attack_changes_nothing_but_a_counted_warning(root: Path) -> None:
    """Over IPv6, for as long as the job lives: from before its second rank is in until after it has ended."""
    calm = run_alone(make_config(root, "calm", SHORT)).digest
    with Attacked(root, "attacked", SHORT, 3.0, "::1") as job:
        address, port = job.where()
        assert address == "::1"
        listening = {c.laddr for c in psutil.Process(job.ranks[0].pid).net_connections("tcp") if c.status == "LISTEN"}
        assert {laddr.ip for laddr in listening if laddr.port == port} == {"::1"}
        for word in WORDS.values():  # all of them while the other rank is missing
            stranger = connect(address, port)
            stranger.sendall(word)
            assert is_closed(stranger)
        with open_files(1024), Crowd(address, port, 300) as crowd:
            assert assert_unharmed(job, calm, 120.0) > 300
        assert crowd.counts["refused"] > 0, crowd.counts  # all ranks are in: nobody listens any more
        print(crowd.counts)


@pytest.mark.sweep
@pytest.mark.timeout(1200)
def test_a_minute_of_two_thousand_connections(root: Path) -> None:
    """Idle ones, slow readers, one byte at a time, floods without an end, garbage, wrong proofs, half-open and reset ones."""
    long = {"federation": {"rounds": 220}, "checkpoint": {"every": 50}, "topology": {"silence_s": 15.0, "timeout_s": 60.0}}
    with Attacked(root, "long-calm", long, 0.0, "127.0.0.1") as job:
        calm = job.digest(400.0)
    with Attacked(root, "minute", long, 18.0, "127.0.0.1") as job:
        place = job.where()
        with open_files(4096), Crowd(*place, 2000, pause_s=0.2) as crowd:
            began = time.monotonic()
            time.sleep(2.0)
            cores = used_cores(job.ranks[0].pid, 14.0)  # while the second rank is missing
            counted = assert_unharmed(job, calm, 400.0)
            seconds = time.monotonic() - began
    rounds = len(read_events(job.run, "round"))
    print(f"{seconds:.0f} s, {rounds} rounds, {dict(crowd.counts)}, counted {counted}, rank 0 took {cores:.2f} cores")
    # How long the rounds take is the machine's: more than a minute on two cores of 2026, with the 18 seconds before them.
    assert rounds == 220 and counted > 2000 and crowd.counts["refused"] > 0
    assert cores < 0.5, "strangers take rank 0's processor"


def used_cores(pid: int, seconds: float) -> float:
    """Processor time of a process in the seconds to come, per second."""
    before = psutil.Process(pid).cpu_times()
    time.sleep(seconds)
    after = psutil.Process(pid).cpu_times()
    return (after.user + after.system - before.user - before.system) / seconds
