"""Shipped: the configurations that come with the package, found by name from any folder.

`--config quickstart` is a file of that name in the current folder, where there is one; else the package's `quickstart.yaml`.
They lie as in `configs/` of the repository: `methods/flame` is `configs/methods/flame.yaml`.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from pathlib import Path
from typing import Any

from fedmoe_ds.errors import UserError

FOLDER = (Path(__file__).parents[1] / "configs").resolve()
"""In the repository a link to `configs/`; a wheel holds the files."""
_REPOSITORY = "configs/"
"""How a shipped file names another one: by its path in the repository."""


def shipped_names() -> list[str]:
    """All of them: the runs and studies at the top first, then folder by folder."""
    names = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")]
    return sorted(names, key=lambda name: (name.count("/"), name))


def summary(name: str) -> str:
    """The first sentence of what a shipped file says about itself."""
    with (FOLDER / f"{name}.yaml").open(encoding="utf-8") as file:
        lines = [line[1:].strip() for line in itertools.takewhile(lambda line: line.startswith("#"), file)]
    # A full stop within a number or a name is followed by neither.
    return re.split(r"(?<=\.)\s", " ".join(lines), maxsplit=1)[0]


def find_config(given: Path) -> Path:
    """The file that `given` names: itself, or where there is none and it has no suffix, the shipped one of that name.

    Raises:
        UserError: it has no suffix, and neither is there; with the nearest name.
    """
    # A folder is no configuration: one that a run of the same name has made does not hide it.
    if given.suffix or given.is_absolute() or (os.path.exists(given) and not os.path.isdir(given)):
        return given
    name = given.as_posix()
    names = shipped_names()
    if name in names:
        return FOLDER / f"{name}.yaml"
    # A whole list would be forty names long.
    close = [meant] if (meant := shipped_like(given)) else difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    way = f"did you mean '{close[0]}'?" if close else "`fedmoe configs` lists the configurations of the package"
    raise UserError(f"config: {name}: neither a file here nor a configuration of the package; {way}")


def shipped_like(given: Path) -> str | None:
    """The package's configuration that differs in place or suffix alone: `flame`, or configs/methods/flame.yaml."""
    name = given.as_posix().removesuffix(given.suffix).removeprefix(_REPOSITORY)
    names = shipped_names()
    ends = [known for known in names if known.rpartition("/")[2] == name.rpartition("/")[2]]
    return name if name in names else next(iter(ends), None)


def find_shipped_model(raw: dict[str, Any], file: Path) -> None:
    """Let `foundation.path` of a shipped file be found from any folder, where it names a shipped model by configs/..."""
    foundation = raw.get("foundation") if file.is_relative_to(FOLDER) else None
    path = foundation.get("path") if isinstance(foundation, dict) else None
    if isinstance(foundation, dict) and isinstance(path, str) and path.startswith(_REPOSITORY):
        foundation["path"] = str(FOLDER / path.removeprefix(_REPOSITORY))
