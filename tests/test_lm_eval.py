"""lm-evaluation-harness on an exported model counts what we count, to the last digit.

`make test-lm-eval`: the harness lives in an environment of its own (.venv-lm-eval), whose Python runs it here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_inputs import TEXT, dense_config
from federations import make_config, run_alone
from test_evaluate_command import write_rows
from test_task_metrics import LABELS, write_labels
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from fedmoe_ds.export.command import main as export
from fedmoe_ds.results.evaluate_command import main as evaluate

pytestmark = [pytest.mark.lm_eval, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "docs" / "lm-eval"
PYTHON = Path(os.environ.get("FEDMOE_LM_EVAL", ROOT / ".venv-lm-eval" / "bin" / "python"))
"""Of an environment with lm-eval."""


def harness(model: Path, folder: Path, trust: str = "") -> dict[str, float]:
    """What `lm_eval` says about a model folder, by task; test.jsonl lies in `folder`, as the tasks want it."""
    options = ["--tasks", "choice,exact", "--include_path", str(TASKS), "--batch_size", "1", "--device", "cpu"]
    command = [
        str(PYTHON),
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32{trust}",
        *options,
    ]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "--output_path", str(folder / "out")], cwd=folder, env=os.environ | quiet, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (file,) = (folder / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    return {"ranked_choice": found["choice"]["acc,none"], "exact_match": found["exact"]["exact_match,none"]}


def test_the_same_shares_at_every_tier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_labels(tmp_path)
    run_alone(make_config(tmp_path, "labels", LABELS, {"evaluation": {"generations": 0}}))
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    test, run = write_rows(tmp_path / "test.jsonl", rows), tmp_path / "runs" / "labels"
    seen: list[dict[str, Any]] = []
    for tier in ("8", "2"):
        capsys.readouterr()
        assert evaluate([str(run), "--data", str(test), "--tier", tier, "--lines"]) == 0
        (ours,) = map(json.loads, capsys.readouterr().out.splitlines())
        out = tmp_path / f"tier-{tier}"
        assert export([str(run), "--format", "merged", "--tier", tier, "--out", str(out)]) == 0
        theirs = harness(out, tmp_path)
        assert {name: ours[name] for name in theirs} == theirs
        assert ours["samples"] == len(rows) and 0 < ours["exact_match"] <= ours["ranked_choice"] < 1
        seen.append(theirs)
        shutil.rmtree(tmp_path / "out")
    assert seen[0] != seen[1], "a tier has a model of its own"


def test_adapter_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same of a model with code of its own, which the harness runs where it is told to."""
    write_labels(tmp_path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**TEXT)).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "llama")
    tiers = {"federation": {"tiers": [{"top_k": 4, "share": 1.0}, {"top_k": 1, "share": 1.0}]}, "local": {"steps": 60}}
    kept = {key: value for key, value in LABELS.items() if key != "adapters"}
    run_alone(dense_config(tmp_path, "llama", "labels", kept, tiers, {"evaluation": {"generations": 0}}))
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    test, run, out = write_rows(tmp_path / "test.jsonl", rows), tmp_path / "runs" / "llama-labels", tmp_path / "exported"
    capsys.readouterr()
    assert evaluate([str(run), "--data", str(test), "--tier", "1", "--lines"]) == 0
    (ours,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert export([str(run), "--format", "merged", "--tier", "1", "--out", str(out)]) == 0
    theirs = harness(out, tmp_path, ",trust_remote_code=True")
    assert {name: ours[name] for name in theirs} == theirs and 0 < ours["exact_match"] <= ours["ranked_choice"] < 1
