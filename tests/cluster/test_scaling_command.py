"""launch/scaling.py for real: a weak study that is stopped and continued, a strong one whose digest must not change."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from launching import REPOSITORY, changed, read_events

SCRIPT = REPOSITORY / "launch" / "scaling.py"
TIMEOUT_S = 240.0


class Study:
    """A study file on the nano federation, and the command on it."""

    def __init__(self, folder: Path, nano: dict[str, Any], **keys: Any) -> None:
        tree = changed(
            nano,
            federation={"rounds": 6, "participation": 1.0},
            local={"steps": 4},
            data={"partition": {"kind": "iid", "clients": 4}},
            evaluation={"client_sequences": 0},
        )
        tree.pop("name")
        self.file, self.output = folder / "study.yaml", folder / "runs"
        (folder / "base.yaml").write_text(json.dumps(tree))
        self.file.write_text(json.dumps({"base": "base.yaml", "axis": "ranks", "values": [1, 2], "repeats": 1} | keys))

    def run(self, *options: str, meanwhile: Callable[[subprocess.Popen[str]], None] | None = None) -> tuple[int, str, str]:
        """Exit code, standard output and standard error; `meanwhile` is called while it runs."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        command = [sys.executable, str(SCRIPT), "--config", str(self.file), "--output", str(self.output), *options]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        )
        try:
            if meanwhile is not None:
                meanwhile(process)
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            if process.poll() is None:  # twice: the second one kills the ranks
                process.terminate()
                process.terminate()
                process.communicate()
        return process.returncode, out, err

    def rows(self) -> list[dict[str, str]]:
        with (self.output / "scaling.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.output.glob("*.log")))


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_weak_study_is_stopped_continued_and_collected(nano: dict[str, Any], tmp_path: Path) -> None:
    study = Study(tmp_path, nano, scaling="weak", grows={"data.partition.clients": 2})
    first = study.output / "ranks-1-r0"

    def stop_in_the_middle(process: subprocess.Popen[str]) -> None:
        while process.poll() is None and not read_events(first, "round"):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)

    code, _, err = study.run(meanwhile=stop_in_the_middle)
    assert code == 75, err + study.logs()
    done = len(read_events(first, "round"))
    assert 1 <= done < 6 and not (study.output / "ranks-2-r0.log").exists()
    assert "| ranks-1-r0 | not finished |" in (study.output / "scaling.md").read_text()

    code, out, err = study.run()
    assert code == 0, err + study.logs()
    assert [event["round"] for event in read_events(first, "resume")] == [done]
    one, two = study.rows()
    assert (one["ranks"], two["ranks"], one["clients"], two["clients"]) == ("1", "2", "2", "4")
    rounds = read_events(study.output / "ranks-2-r0", "round")
    seconds = (rounds[-1]["time"] - rounds[0]["time"]) / 5
    assert two["timed_rounds"] == "5" and float(two["s_per_round"]) == pytest.approx(seconds, rel=1e-4)
    assert float(two["tokens_per_s"]) == pytest.approx(rounds[-1]["tokens"] / seconds, rel=1e-4)
    assert float(two["efficiency"]) == pytest.approx(float(two["tokens_per_s"]) / float(one["tokens_per_s"]) / 2, rel=1e-4)
    parts = [float(two[name]) for name in ("train_s", "aggregate_s", "evaluate_s", "other_s")]
    assert sum(parts) == pytest.approx(seconds, rel=0.02) and all(part > 0 for part in parts)
    trained = [float(row["train_tokens_per_s"]) for row in (one, two)]
    assert float(two["train_efficiency"]) == pytest.approx(trained[1] / trained[0] / 2, rel=1e-4)
    assert (two["device"], two["dtype"], two["method"]) == ("cpu", "float32", "flame") and two["nodes"]
    (machine,) = read_events(study.output / "ranks-2-r0", "run")[0]["machines"]
    assert machine["host"] == two["nodes"] and machine["cores"] and machine["memory_gib"] > 0
    report = (study.output / "scaling.md").read_text()
    assert "## Where the time goes" in report and out.splitlines()[-1] == f"report: {study.output / 'scaling.md'}"
    ElementTree.fromstring((study.output / "scaling.svg").read_text())


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_strong_study_runs_point_by_point_to_one_digest(nano: dict[str, Any], tmp_path: Path) -> None:
    study = Study(tmp_path, nano, scaling="strong")
    code, out, err = study.run("--point", "1")
    assert (code, out) == (0, "") and "[1/1] ranks-2-r0: " in err, err + study.logs()
    assert not (study.output / "ranks-1-r0").exists() and not (study.output / "scaling.csv").exists()
    code, out, err = study.run()
    assert code == 0 and "1 of 2 runs are finished already" in err, err + study.logs()
    digests = {event["digest"] for name in ("ranks-1-r0", "ranks-2-r0") for event in read_events(study.output / name, "end")}
    assert len(digests) == 1 and f"All 2 runs ended with one digest: {digests.pop()}." in out
    assert [(row["ranks"], row["clusters"], row["clients"]) for row in study.rows()] == [("1", "1", "4"), ("2", "2", "4")]
