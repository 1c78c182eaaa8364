"""The full-size benchmark: its shards are what transformers writes and reads, and a machine that is too small is told so."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import OlmoeConfig, OlmoeForCausalLM

from fedmoe_ds.bench.fullsize import command, export
from fedmoe_ds.bench.fullsize.weights import full_size, shards, weight_bytes, write_weights
from fedmoe_ds.errors import UserError
from fedmoe_ds.planner import load_hardware

SMALL = {"hidden_size": 32, "intermediate_size": 16, "num_experts": 4, "vocab_size": 64, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}


def test_shards_are_what_transformers_writes_and_reads(tmp_path: Path) -> None:
    config = {**full_size(2), **SMALL}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps(config))
    write_weights(config, 0, ours, lambda text: None)
    model = OlmoeForCausalLM(OlmoeConfig.from_pretrained(ours)).to(torch.bfloat16)
    model.save_pretrained(theirs)
    with safe_open(theirs / "model.safetensors", "pt") as file:
        written = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
    assert {key: shape for shard in shards(config) for key, shape in shard.items()} == written
    loaded, facts = OlmoeForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"] and not facts["mismatched_keys"]
    assert weight_bytes(config) == 2 * sum(value.numel() for value in loaded.parameters())
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(written) and len(set(index["weight_map"].values())) == 3


def test_its_full_size_is_that_of_the_published_model() -> None:
    assert weight_bytes(full_size(command.LAYERS)) == 2 * 6_919_161_856


def test_a_machine_that_is_too_small_is_told_before_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weight_bytes(full_size(command.LAYERS))
    monkeypatch.setattr(command, "available_mib", lambda: 8 * 1024.0)
    with pytest.raises(UserError, match=r"memory: 8\.0 GiB are free, and 2 ranks take 18\.2 by plan and 20\.0 with a margin"):
        command.check_room(18.2 * 2**30, weights, tmp_path)
    monkeypatch.setattr(command, "available_mib", lambda: 64 * 1024.0)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 20 * 2**30}))
    with pytest.raises(UserError, match=r"--folder: .*: 20\.0 GiB of disk are free, and weights and run take up to 27\.8"):
        command.check_room(18.2 * 2**30, weights, tmp_path)


@pytest.mark.cluster
def test_a_run_and_its_second_start_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights mapped; the second start goes on with another round, and what it takes is in the row."""
    small = {**SMALL, "vocab_size": 2048, "num_experts_per_tok": 4}
    monkeypatch.setattr(command, "full_size", lambda layers: {**full_size(layers), **small})
    monkeypatch.setattr(command, "calibrate", lambda note: load_hardware("cpu"))
    given = {"layers": 2, "length": 32, "mapped": "all", "hardware": None, "folder": tmp_path, "keep": False, "seed": 0}
    (row,) = command.run(Namespace(**given), lambda text: None)
    assert row["mapped"] == "all" and 0 < row["restart_s"] < 300
    assert row.keys() > {"restart_read_bytes"} and dict(command.COLUMNS)["read"]({"restart_read_bytes": None}) == ""
    assert row["rounds"] == command.ROUNDS - 1 and next(command.lines([row])).startswith("memory by plan, MiB: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cluster
def test_an_export_is_measured_and_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**SMALL, "vocab_size": 2048, "num_experts_per_tok": 4}
    monkeypatch.setattr(export, "full_size", lambda layers: {**full_size(layers), **small})
    monkeypatch.setattr(export, "_TIER", "2")
    options: Any = type("Options", (), {"layers": 2, "folder": tmp_path, "keep": False, "seed": 0})
    (row,) = export.run(options, lambda text: None)
    assert row["weight_bytes"] < 2**20 and 100 < row["peak_mib"] < 2048 and row["seconds"] > 0 and row["layers"] == 2
    assert list(tmp_path.iterdir()) == []
    assert next(export.lines([row])).endswith("MiB are within the 4096 that an export may take")
    # Scales that are not the run's: what is compared would notice.
    monkeypatch.setattr(export, "export", lambda run, out: _exported(run, out))
    with pytest.raises(export.WrongExportError, match=r"^model\.layers\.0\.mlp\.experts\.3\.down_proj\.weight$"):
        export.run(options, lambda text: None)


def _exported(run: Path, out: Path) -> tuple[float, int]:
    """The base itself with the run's adapters but without its rescaler."""
    from fedmoe_ds.export.command import main
    from fedmoe_ds.export.merge import Learnt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learnt, "rescaler", lambda self, layer: 1.0)
        main([str(run), "--format", "merged", "--tier", "2", "--out", str(out)])
    return 1.0, 2**30
