"""The ranges of pyproject.toml, for `make test-compat`: `python tests/bounds.py lowest` or `... installed`.

`lowest` prints pip constraints that pin every range to its lower bound; `installed` prints what this environment has of each.
"""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

SERVICES = {"wandb", "comet_ml"}
"""Clients of services that want an account: no test runs them, and docs/versions.md says what somebody has run by hand."""
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def requirements() -> list[Requirement]:
    """What the package requires, what its extras do, and what its tests do; but `SERVICES`."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    found = [Requirement(text) for text in (*project["dependencies"], *extras)]
    # The tests' own extra names the other extras, which are in the list by themselves.
    return [each for each in found if each.name not in {project["name"], *SERVICES}]


def bound(requirement: Requirement, operator: str) -> str:
    """Return the version behind the range's one `operator`.

    Raises:
        ValueError: the range has no such bound.
    """
    (version,) = (each.version for each in requirement.specifier if each.operator == operator)
    return version


if __name__ == "__main__":
    lowest = sys.argv[1:] == ["lowest"]
    for each in requirements():
        print(f"{each.name}=={bound(each, '>=') if lowest else metadata.version(each.name)}")
