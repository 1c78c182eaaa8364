"""docs/methods.md: generated, complete, and its example is the method that the tests install and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from every import every

from fedmoe_ds.config import load_config
from fedmoe_ds.methods import method_for, method_names
from fedmoe_ds.methods.reference import methods_markdown

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"
CONFIGS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))


def test_the_page_is_what_the_package_prints() -> None:
    assert PAGE.read_text() == methods_markdown(), "run python -m fedmoe_ds.methods > docs/methods.md"


def test_the_examples_are_those_that_are_tested() -> None:
    assert every(
        (ROOT / "tests" / "third_party" / f"{name}.py").read_text() in PAGE.read_text() for name in ("tempered", "struggling")
    )


def test_every_method_has_a_row_and_a_configuration() -> None:
    assert every(f"| `{name}` |" in PAGE.read_text() for name in method_names())
    assert {load_config(path, []).method.name for path in CONFIGS} == set(method_names())
    section = (ROOT / "README.md").read_text().split("\n## Methods\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} >= set(method_names())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_are_accepted(path: Path) -> None:
    config = load_config(path, [])
    assert config.name == path.stem
    method_for(config)
