"""A method of somebody else: a module, an entry point, a configuration, and not a line of the package changed."""

from __future__ import annotations

import ast
import json
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import Result, make_config, run_alone, write_inputs

from fedmoe_ds import methods
from fedmoe_ds.config import load_config
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import method_for, method_names, registry
from fedmoe_ds.randomness import generator

FOLDER = Path(__file__).parent / "third_party"
SOURCE = (FOLDER / "tempered.py").read_text()


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str = "tempered") -> None:
    """What `pip install` leaves behind: the module, and a folder that names its entry points."""
    site = tmp_path / "site"
    info = site / f"{name}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[fedmoe_ds.methods]\n{name} = {name}:{name.title()}\n")
    (site / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, SOURCE)


def run(tmp_path: Path, name: str, method: str, **federation: Any) -> Result:
    """From a file, as the command does it."""
    tree = make_config(tmp_path, name, {"federation": {"rounds": 1, **federation}}).model_dump()
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


def test_one_that_plans_its_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom it chooses, out of losses that it has memorised: recomputed here from what the record says of them."""
    install(tmp_path, monkeypatch, (FOLDER / "struggling.py").read_text(), "struggling")
    write_inputs(tmp_path)
    rounds, count = 4, 3
    result = run(tmp_path, "planned", "{name: struggling, power: 8.0}", rounds=rounds, participation=0.5)
    rows = [event for event in result.events if event["event"] == "client"]
    names = [client.name for client in result.parts.clients]
    losses: dict[int, float] = {}
    for index in range(1, rounds + 1):
        usual = float(np.mean([losses[client] for client in sorted(losses)])) if losses else 1.0
        chances = np.array([losses.get(client, usual) ** 8.0 for client in range(len(names))])
        draw = generator(result.parts.config.seed, "struggling", index)
        chosen = draw.choice(len(names), size=count, replace=False, p=chances / chances.sum())
        here = [row for row in rows if row["round"] == index]
        assert sorted(names.index(row["client"]) for row in here) == sorted(int(client) for client in chosen)
        losses |= {names.index(row["client"]): row["loss_last"] for row in here}
    known = {client: float(memory["loss"]) for client, memory in result.parts.state.personal.memories.items()}
    assert known == pytest.approx(losses)
    assert {name for name, _ in imported(FOLDER / "struggling.py")} == {"fedmoe_ds.methods"}


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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_module_that_is_not_there\n", "cannot be imported from tempered:Tempered: No module named 'a_module_"),
        (
            "from fedmoe_ds.methods import Situation\n",
            "cannot be imported from tempered:Tempered: cannot import name 'Situation'",
        ),
        ("raise SystemError('two\\nlines')\n", "cannot be imported from tempered:Tempered: two lines"),
        (f"{SOURCE}\n    def watch(self, *given): ...\n", "tempered:Tempered defines `watch`, which is called `observer` now"),
        (
            f"{SOURCE}\n    def memory(self, specs): ...\n",
            "tempered:Tempered defines `memory`, which is called `client_state` now",
        ),
        ("class Tempered: ...\n", r"tempered:Tempered is no subclass of fedmoe_ds\.methods\.Method"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    """Above all a hook with a former name: the engine would never call it, and the run would be FedAvg in silence."""
    install(tmp_path, monkeypatch, source)
    with pytest.raises(UserError, match=f"^method.name: tempered: {message}") as error:
        method_for(make_config(tmp_path, "wrong", {"method": {"name": "tempered"}}))
    assert len(str(error.value).splitlines()) == 1


def imported(path: Path) -> set[tuple[str, str]]:
    """(module, name) of everything that a file takes from the package."""
    tree = ast.parse(path.read_text())
    plain = {(alias.name, "") for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named = {
        (node.module or "", alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    return {(module, name) for module, name in plain | named if module.split(".")[0] == "fedmoe_ds"}


def test_our_own_methods_need_no_more_than_the_face() -> None:
    """What 13 methods live by is enough for the next; and it holds when the package moves around them."""
    folder = Path(methods.__file__).parent
    # Where each is found, and not its own name: Split-Mix and SHEFL are one file.
    points = {point.name: point for point in entry_points(group=registry.GROUP)}
    files = {folder / f"{points[name].module.rpartition('.')[2]}.py" for name in method_names()}
    assert len(files) >= len(method_names()) - 1 >= 13
    for path in files:
        assert imported(path) <= {("fedmoe_ds.methods", name) for name in methods.__all__}, path.name
        assert imported(path), path.name
