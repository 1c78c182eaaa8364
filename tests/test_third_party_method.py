"""A method of somebody else: a module, an entry point, a configuration, and not a line of the package changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from federations import Result, make_config, run_alone, write_inputs

from fedmoe_ds.config import load_config
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import method_for, method_names

THIRD_PARTY = Path(__file__).parent / "third_party"
DISTRIBUTION = {
    "METADATA": "Metadata-Version: 2.1\nName: tempered\nVersion: 0.1\n",
    "entry_points.txt": "[fedmoe_ds.methods]\ntempered = tempered:Tempered\n",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip install` leaves behind: the module, and a folder that names its entry points."""
    site = tmp_path / "site"
    info = site / "tempered-0.1.dist-info"
    info.mkdir(parents=True)
    for name, text in DISTRIBUTION.items():
        (info / name).write_text(text)
    (site / "tempered.py").write_text((THIRD_PARTY / "tempered.py").read_text())
    monkeypatch.syspath_prepend(site)


def run(tmp_path: Path, name: str, method: str) -> Result:
    """From a file, as the command does it."""
    tree = make_config(tmp_path, name, {"federation": {"rounds": 1}}).model_dump()
    path = tmp_path / f"{name}.yaml"
    path.write_text(json.dumps(tree | {"method": {"name": "fedit"}}))
    return run_alone(load_config(path, [f"method={method}"]))


def test_a_run_with_it(installed: None, tmp_path: Path) -> None:
    assert "tempered" in method_names()
    write_inputs(tmp_path)
    fedit = run(tmp_path, "fedit", "{name: fedit}")
    assert run(tmp_path, "one", "{name: tempered, exponent: 1.0}").digest == fedit.digest
    half, default = run(tmp_path, "half", "{name: tempered, exponent: 0.5}"), run(tmp_path, "default", "{name: tempered}")
    assert half.digest == default.digest != fedit.digest
    assert run(tmp_path, "equal", "{name: tempered, exponent: 0.0}").digest not in (half.digest, fedit.digest)
    assert "exponent: 0.5" in default.parts.config_text, "its own defaults are saved with the run"
    assert default.parts.identity["method"] == {"name": "tempered", "exponent": 0.5}


def test_its_parameters_are_checked_like_everybodys(installed: None, tmp_path: Path) -> None:
    for key, value, message in (
        ("exponent", 2.0, r"^method.exponent: 2.0: Input should be less than or equal to 1"),
        ("exponnt", 1.0, r"^method.exponnt: unknown key for method 'tempered'; did you mean 'exponent'\?"),
    ):
        with pytest.raises(UserError, match=message):
            method_for(make_config(tmp_path, "wrong", {"method": {"name": "tempered", key: value}}))


def test_it_is_gone_where_it_is_not_installed(tmp_path: Path) -> None:
    assert "tempered" not in method_names()
    with pytest.raises(UserError, match=r"^method.name: tempered: there is no such method"):
        method_for(make_config(tmp_path, "gone", {"method": {"name": "tempered"}}))
