"""The five models of configs/models: what their configurations say, and the table of docs/planning.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmoe_ds.commands import plan as plan_command
from fedmoe_ds.config import load_config
from fedmoe_ds.planner import Job, resolve

REPOSITORY = Path(__file__).parents[1]
MODELS = sorted((REPOSITORY / "configs" / "models").iterdir())
CONFIG = REPOSITORY / "configs" / "plan-models.yaml"
# As their authors publish them: parameters in all and active for a token, in units of 10^9.
PUBLISHED = {
    "olmoe-1b-7b": (6.9, 1.3),
    "mixtral-8x7b": (46.7, 12.9),
    "qwen3-30b-a3b": (30.5, 3.3),
    "deepseek-v2-lite": (15.7, 2.4),
    "deepseek-v3": (671.0, 37.0),
}


def job_of(name: str) -> Job:
    return resolve(load_config(CONFIG, [f"foundation.path={REPOSITORY / 'configs' / 'models' / name}"]), kind="cuda")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    job, (total, active) = job_of(name), PUBLISHED[name]
    size, layout = job.size, job.expert_layout
    assert (size.dense_parameters + size.pool_parameters) / 1e9 == pytest.approx(total, rel=0.01)
    used = size.dense_parameters + size.pool_parameters / layout.num_experts * layout.top_k
    assert used / 1e9 == pytest.approx(active, rel=0.12), "authors differ in whether embeddings are counted"


def test_the_table_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """It is what the command prints: `python launch/plan.py --config configs/plan-models.yaml --models configs/models/*`."""
    assert plan_command.main(["--config", str(CONFIG), "--models", *map(str, MODELS)]) == 0
    shown = capsys.readouterr().out.strip()
    page = (REPOSITORY / "docs" / "planning.md").read_text()
    held = page.split("<!-- models -->")[1].split("<!-- /models -->")[0].strip()
    assert shown == held
    assert len({line.split("|")[1] for line in shown.splitlines()[2:] if line.startswith("|")}) == len(MODELS)
