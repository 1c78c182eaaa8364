"""`foundation.dtype: auto`: resolved once, by device and model, for whoever asks a run what it keeps its weights in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import make_config, write_inputs

from fedmoe_ds.config import Config, FoundationConfig
from fedmoe_ds.config.yaml12 import parse_yaml
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.identity import of_settings
from fedmoe_ds.federation.run_spec import check_start, resolve_spec
from fedmoe_ds.foundation.foundation import open_skeleton
from fedmoe_ds.foundation.meta_model import build_on_meta, host_model
from fedmoe_ds.foundation.outline import outline
from fedmoe_ds.foundation.storage_type import resolved
from fedmoe_ds.methods import method_for
from fedmoe_ds.planner.dry_run import describe
from fedmoe_ds.planner.dry_run import resolved as printed_config
from fedmoe_ds.planner.workload import resolve


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Inputs whose model says that it is stored in bfloat16."""
    write_inputs(tmp_path)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    return tmp_path


def config_of(root: Path, *changes: dict[str, Any]) -> Config:
    # As by default: `bitwise`, which `make_config` has, is for CPUs alone.
    return make_config(root, "typed", {"execution": {"reproducible": "auto"}}, *changes)


@pytest.mark.parametrize(
    ("device", "said", "chosen"),
    [("cpu", "auto", "float32"), ("cuda", "auto", "bfloat16"), ("cuda", "float32", "float32"), ("cpu", "bfloat16", "bfloat16")],
)
def test_device_and_model_decide(device: str, said: str, chosen: str, halves: Path) -> None:
    job = resolve(config_of(halves, {"foundation": {"dtype": said}}), assume=False, kind=device)
    assert job.config.foundation.dtype == chosen and job.size.bytes_per_parameter == (4 if chosen == "float32" else 2)
    skeleton = open_skeleton(halves / "model", config_of(halves, {"foundation": {"dtype": said}}).foundation, 1, 0, device)
    assert next(skeleton.model.parameters()).dtype == getattr(torch, chosen)


def test_a_plan_is_for_the_device_of_the_run(halves: Path) -> None:
    """Where there is none, too: what a job would be refused for is told before it is queued, and its memory is that there."""
    gpu = {"topology": {"device": "cuda"}}
    (head,) = [line for line in describe(config_of(halves, gpu), 1) if line.startswith("memory per rank")]
    assert head == "memory per rank (estimate, cuda, frozen weights in bfloat16):"
    (head,) = [line for line in describe(config_of(halves), 1) if line.startswith("memory per rank")]
    assert head == "memory per rank (estimate, cpu, frozen weights in float32):"
    for changes, text in (
        ({"execution": {"reproducible": "bitwise"}}, r"^execution\.reproducible: bitwise: on cuda "),
        ({"method": {"name": "flora"}}, r"^foundation\.dtype: bfloat16: method flora "),
    ):
        with pytest.raises(UserError, match=text):
            describe(config_of(halves, gpu, changes), 1)
        with pytest.raises(UserError, match=text):
            describe(config_of(halves, changes), 1, "cuda")


def test_what_is_printed_has_the_type_where_it_is_known(halves: Path) -> None:
    devices = {"auto": "auto", "cpu": "float32", "cuda": "bfloat16"}
    for device, dtype in devices.items():
        printed = parse_yaml(printed_config(config_of(halves, {"topology": {"device": device}})), "printed")
        assert printed["foundation"]["dtype"] == dtype, device
    hub = {"foundation": {"path": "of/nobody"}, "topology": {"device": "cuda"}}
    assert parse_yaml(printed_config(config_of(halves, hub)), "printed")["foundation"]["dtype"] == "auto"


def test_a_model_in_float32_stays_so(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    assert resolve(config_of(tmp_path), assume=False, kind="cuda").config.foundation.dtype == "float32"


def test_a_hub_id_is_resolved_once_it_is_there(halves: Path) -> None:
    """Before that nobody knows it; then the model itself tells, and the method is asked again."""
    unknown = FoundationConfig(path="of/nobody")
    assert resolved(unknown, "cuda", None).dtype == "auto" and resolved(unknown, "cpu", None).dtype == "float32"
    model = build_on_meta(halves / "model", torch.bfloat16)
    loaded = outline(model, host_model(model, 1, 0))
    hub = {"foundation": {"path": "of/nobody"}}
    spec = resolve_spec(*check_start(config_of(halves, hub), "cuda"), "cuda", loaded)
    assert spec.config.foundation.dtype == "bfloat16"
    flora = config_of(halves, hub, {"method": {"name": "flora"}})
    with pytest.raises(UserError, match=r"foundation\.dtype: bfloat16: method flora adds small products"):
        resolve_spec(flora, method_for(flora), "cuda", loaded)


def test_a_method_sees_what_was_chosen(halves: Path) -> None:
    flora = config_of(halves, {"method": {"name": "flora"}})
    check_start(flora, "cpu")
    with pytest.raises(UserError, match=r"foundation\.dtype: bfloat16: method flora .* use float32"):
        check_start(flora, "cuda")


def test_a_configuration_without_the_key_meant_float32() -> None:
    """Runs save the type itself; a saved configuration that leaves it open is older than `auto`."""
    tree = json.loads(Config().model_dump_json())
    assert tree["foundation"]["dtype"] == "auto" and of_settings(tree)["foundation.dtype"] == "float32"
    tree["foundation"]["dtype"] = "bfloat16"
    assert of_settings(tree)["foundation.dtype"] == "bfloat16"
