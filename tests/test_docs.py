"""README.md and docs/ name files, folders, functions and packages that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedmoe_ds"
DESIGN = ROOT / "docs" / "design.md"
# The log tells what was, under the names of its day.
LOG = ROOT / "docs" / "log.md"
PAGES = [ROOT / "README.md", ROOT / "slurm" / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {LOG})]
# `launch/bench.py wave` names a file, `<output>/slurm/<name>.sbatch` a place in a run's folder.
FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|cpp|yaml|md|sbatch))(?: [^`]*)?`")
BARE = re.compile(r"`(\w+\.(?:py|cpp))`")
FOLDER = re.compile(r"`((?:fedmoe_ds|launch|configs|docs|slurm|tests)/(?:[\w-]+/)*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
STEP = re.compile(r"\| \d+(?: \*\*\d\*\*)? \| (.+?) \| (.+?) \| ")
LAYER = re.compile(r"\| \d+ \| ((?:`[\w/.]+`(?:, )?)+) \| .+ \|")


def section(title: str) -> str:
    text = DESIGN.read_text()
    start = text.index(f"\n## {title}\n")
    return text[start : text.index("\n## ", start + 1)]


def missing_paths(page: Path, text: str) -> list[str]:
    """Paths in backticks that are neither below the repository nor below the package, among the programs or beside the page."""
    named = FILE.findall(text) + FOLDER.findall(text) + BARE.findall(text)
    roots = (ROOT, PACKAGE, ROOT / "launch", page.parent)
    return [name for name in named if not any((root / name).exists() for root in roots)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_exists(page: Path) -> None:
    assert missing_paths(page, page.read_text()) == []


def test_paths_are_found_in_text() -> None:
    text = "`model/router.py`, `launch/bench.py wave --json x`, `errors.py`, `tests/`, `<output>/slurm/<name>.sbatch`"
    assert FILE.findall(text) == ["model/router.py", "launch/bench.py"]
    assert missing_paths(DESIGN, text) == []
    assert missing_paths(DESIGN, "`a/b.py`, `fedmoe_ds/old/`, `peers.py`") == ["a/b.py", "fedmoe_ds/old/", "peers.py"]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def names_in(path: Path) -> set[str]:
    """Functions, classes and their methods, as `f`, `C` and `C.f`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("title", "least"), [("Follow one token", 20), ("Follow one client", 22)])
def test_every_function_of_the_walks_is_in_its_file(title: str, least: int) -> None:
    steps = STEP.findall(section(title))
    assert len(steps) >= least
    for files, functions in steps:
        known = set().union(*(names_in(PACKAGE / name) for name in re.findall(r"`([^`]+)`", files)))
        assert set(re.findall(r"`([^`]+)`", functions)) <= known, (files, functions)


def test_every_answer_to_where_to_change_what_names_a_file() -> None:
    rows = [line for line in section("You want to change X: file Y").splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 24
    assert [row for row in rows if not FILE.search(row) and not re.search(r"`(?:errors|randomness)\.py`", row)] == []


def test_the_changelog_has_its_parts() -> None:
    """A part that is cut away by a careless edit takes years of entries along."""
    unreleased = (ROOT / "CHANGELOG.md").read_text().partition("## [Unreleased]\n")[2].partition("\n## [")[0]
    parts = dict(part.split("\n", 1) for part in unreleased.split("\n### ")[1:])
    assert list(parts) == ["Security", "Fixed", "Changed", "Added"]
    assert [name for name, text in parts.items() if text.count("\n- ") < 5] == []


def test_the_order_names_every_package() -> None:
    named = re.findall(r"`([\w/.]+)`", " ".join(LAYER.findall(section("The order of the packages"))))
    folders = {f"fedmoe_ds/{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    loose = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert sorted(named) == sorted(folders | loose)
