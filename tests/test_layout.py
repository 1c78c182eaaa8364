"""Layout: packages import downwards, no modules import each other in a circle, and no file is long."""

from __future__ import annotations

import ast
import statistics
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fedmoe_ds"
FILES = sorted(PACKAGE.rglob("*.py"))
LOOSE, LONGEST, COMMENTS = 5, 320, 3.0
"""Modules at the package's top; lines of a file; comments in 100 lines of the package."""


def linted(project: Path) -> int:
    return int(lint_imports(config_filename=str(project), no_cache=True))


def test_imports_run_downwards() -> None:
    assert linted(ROOT / "pyproject.toml") == 0, "`lint-imports` names the imports"


def test_the_linter_would_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert text.count('    "errors",\n') == text.count('    "config",\n') == 1
    (tmp_path / "pyproject.toml").write_text(
        text.replace('    "errors",\n', "").replace('    "config",\n', '    "config",\n    "errors",\n')
    )
    assert linted(tmp_path / "pyproject.toml") == 1
    assert "fedmoe_ds.storage is not allowed to import fedmoe_ds.errors" in capsys.readouterr().out


def test_no_circle_of_modules() -> None:
    graph = grimp.build_graph("fedmoe_ds", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) == len(FILES) and sum(map(len, imports.values())) > 1000
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_few_loose_modules() -> None:
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert 0 < len(loose) <= LOOSE, loose


def test_files_are_of_one_idea() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in FILES if path.name != "__init__.py"}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}
    assert 100 <= statistics.median(lengths.values()) <= 240


def test_functions_are_short() -> None:
    lines = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node, clean=False) else node.body
                lines.append(node.end_lineno - body[0].lineno + 1 if body else 1)  # type: ignore[operator]
    lines.sort()
    assert statistics.median(lines) <= 6 and lines[int(0.9 * len(lines))] <= 18 and lines[-1] <= 60


def test_comments_say_why() -> None:
    """That they say it, a reader must judge; here is only that they are there."""
    marks, lines = ("type: ignore", "noqa", "fmt:", "mypy:"), sum(len(path.read_text().splitlines()) for path in FILES)
    found = 0
    for path in FILES:
        with path.open() as file:
            tokens = [token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT]
        found += sum(not any(mark in text for mark in marks) for text in tokens)
    assert 100 * found / lines >= COMMENTS
