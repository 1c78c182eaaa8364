"""Run spec: a start and the planner resolve one configuration to one method, sizes, expert layout, tiers, blocks and cost."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from dense_inputs import FAMILIES, dense_config, write_dense
from federations import alone, write_inputs
from method_variants import VARIANTS, variant_config

from fedmoe_ds.config import Config
from fedmoe_ds.federation.build import load_parts
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.planner.workload import resolve
from fedmoe_ds.report import Progress


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("specs")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plan_is_resolved_as_a_start_is(variant: str, root: Path) -> None:
    """And so what one of them refuses the other does; a world of one holds all experts, as a plan does."""
    check(variant_config(root, variant, "spec"))


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_dense_model_too(family: str, tmp_path: Path) -> None:
    write_dense(tmp_path, (family,))
    check(dense_config(tmp_path, family, "spec"))


def check(config: Config) -> None:
    job = resolve(config, assume=False)
    parts = load_parts(config, *alone(), Progress(enabled=False))
    assert {field.name for field in fields(RunSpec)} >= {"method", "size", "expert_layout", "tiers", "blocks", "cost"}
    for field in fields(RunSpec):
        ours, planned = getattr(parts.spec, field.name), getattr(job, field.name)
        if field.name == "method":
            assert (type(ours), ours.params, ours.facts) == (type(planned), planned.params, planned.facts)
        else:
            assert ours == planned, field.name
    assert (parts.spec.bitwise, parts.spec.shares_passes) == (job.bitwise, job.shares_passes)
    assert parts.clients == job.clients
    for round_index in (1, 2):
        assert parts.participants(round_index) == job.participants(round_index)
