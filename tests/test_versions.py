"""Ranges of libraries: each has two ends, and what is installed, documented and measured against agrees with them."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from bounds import bound, requirements
from huggingface_hub.utils import get_session
from packaging.requirements import Requirement
from packaging.version import Version

from fedmoe_ds.config import FoundationConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import foundation

ROOT = Path(__file__).parents[1]
RANGES = {each.name: each for each in requirements()}


@pytest.mark.parametrize("name", RANGES)
def test_every_range_has_two_ends_and_holds_what_runs_here(name: str) -> None:
    found = RANGES[name]
    assert Version(bound(found, ">=")) < Version(bound(found, "<"))
    assert found.specifier.contains(metadata.version(name)), metadata.version(name)


def test_the_table_of_tested_versions_holds_the_ends() -> None:
    """docs/versions.md: the oldest tested is the lower bound, the newest tested the last release line below the upper bound."""
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "docs/versions.md").read_text(), re.MULTILINE)
    assert [name for name, _, _ in rows] == list(RANGES)
    for name, oldest, newest in rows:
        lower, upper = Version(bound(RANGES[name], ">=")), Version(bound(RANGES[name], "<"))
        assert Version(oldest) == lower, name
        last = upper.release[-1]  # <2.15 asks for a tested 2.14, <3 for a tested 2
        assert Version(newest).release[: len(upper.release)] == (*upper.release[:-1], last - 1), name


def test_the_makefile_tests_torch_at_both_ends() -> None:
    ends = dict(re.findall(r"^TORCH_(NEWEST|OLDEST) \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lower, upper = (Version(bound(RANGES["torch"], operator)) for operator in (">=", "<"))
    assert Version(ends["OLDEST"]) == lower
    assert Version(ends["NEWEST"]).release[:2] == (upper.major, upper.minor - 1)


def test_flower_runs_the_same_model_code() -> None:
    """What both environments have is in one range, or the benchmark would compare two models."""
    lines = (ROOT / "fedmoe_ds/bench/baselines/flower/requirements.txt").read_text().splitlines()
    theirs = [Requirement(line) for line in lines if line and not line.startswith("#")]
    shared = [each for each in theirs if each.name in RANGES]
    assert len(shared) >= 5
    for each in shared:
        assert each.specifier == RANGES[each.name].specifier, each.name


def test_an_error_of_the_hubs_own_client_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface-hub 1 speaks through httpx, 2 through httpx2."""

    def unreachable(*_: object, **__: object) -> None:
        get_session().get("http://127.0.0.1:9/")

    monkeypatch.setattr(foundation, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"foundation\.path: nobody/nothing: neither a folder nor a hub model that can be"):
        foundation.resolve_foundation(FoundationConfig(path="nobody/nothing"), 0, print)
