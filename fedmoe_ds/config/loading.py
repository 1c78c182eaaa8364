"""From a YAML file and dotted overrides to a checked `Config`, and back to YAML.

    config = load_config(Path("configs/quickstart.yaml"), ["federation.rounds=20", "method.temperature=2"])

Precedence: defaults of the tree < file < overrides, later overrides over earlier ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedmoe_ds.config.deepspeed_section import deepspeed_problems, without_effect
from fedmoe_ds.config.problems import explained, first_of, shown
from fedmoe_ds.config.schema import Config
from fedmoe_ds.config.shipped import find_config, find_shipped_model, shipped_like
from fedmoe_ds.config.type_names import expected_at
from fedmoe_ds.config.yaml12 import DEEPEST, LARGEST, dump_yaml, parse_yaml
from fedmoe_ds.errors import UserError, nearest


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a YAML file after `key=value` overrides, whose values are YAML.

    A name without a suffix that is no file here is one of the package's own (`shipped.py`).

    Raises UserError, one line, for a missing or malformed file and for the first key that is unknown, given twice, of a
    wrong type or out of range. The keys of `method` other than `name` are left to the method.
    """
    found = find_config(path)
    raw = _read(found)
    # Before the overrides: those are the user's, and relative to where the user is.
    find_shipped_model(raw, found)
    return config_of(raw, overrides)


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return a configuration after further `key=value` overrides. Raises UserError as `load_config` does."""
    return config_of(config.model_dump(), overrides)


def config_of(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a tree of sections and keys, as `load_config` does of the one in a file.

    The tree is left as it is. Paths count as their text and tuples as lists. Raises UserError as `load_config` does.
    """
    raw: dict[str, Any] = _as_read(tree)
    for override in overrides:
        _apply(raw, override)
    return _checked(raw)


def _as_read(value: Any) -> Any:
    """A copy of a tree, of what a YAML file can hold: overrides are set in place."""
    if isinstance(value, Mapping):
        return {key: _as_read(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_read(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def dump_config(config: Config) -> str:
    """Return the whole configuration as YAML, in the order of the tree; `load_config` reads it back unchanged."""
    return dump_yaml(config.model_dump())


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:  # a device has no end
            # LARGEST counts characters; UTF-8 has at most four bytes for one. One byte more tells that there is more.
            text = file.read(4 * LARGEST + 1).decode("utf-8")
    except FileNotFoundError:
        # The folder's own files are the likely spellings.
        names = [other.name for other in path.parent.glob("*.y*ml")]
        meant = shipped_like(path)
        way = f"; the package has one: did you mean '{meant}'?" if meant else nearest(path.name, names)
        raise UserError(f"config: {path}: no such file{way}") from None
    except OSError as error:
        raise UserError(f"config: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"config: {path}: is not UTF-8 text; give a YAML file") from None
    # An empty file is null: a run with all defaults.
    raw = parse_yaml(text, str(path))
    if raw is not None and not isinstance(raw, dict):
        raise UserError(f"config: {path}: holds {shown(raw)}; expected a mapping of {', '.join(Config.model_fields)}")
    return raw or {}


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key in place; sections on the way are created, items of lists are addressed by their index."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override: {override}: is no override; write key=value, e.g. federation.rounds=20")
    value = parse_yaml(text, f"override: {override}")
    keys = dotted.split(".")
    # Bounded like a file: each part of a dotted key would make one more level.
    if len(keys) > DEEPEST or not dotted.isprintable():
        raise UserError(f"override: {override}: is no key of the configuration; write key=value, e.g. federation.rounds=20")
    here: Any = raw
    for depth, key in enumerate(keys[:-1]):
        inner = here[_slot(here, key, override, keys[:depth])]
        if inner is None:
            inner = here[_slot(here, key, override, keys[:depth])] = {}
        here = inner
    here[_slot(here, keys[-1], override, keys[:-1])] = value


def _slot(container: Any, key: str, override: str, above: Sequence[str]) -> Any:
    """Return the index of `key` in a mapping (where a missing key becomes null) or a list."""
    if isinstance(container, dict):
        # An unknown key is set all the same: the check of the whole tree names it, with the nearest spelling.
        container.setdefault(key, None)
        return key
    dotted = ".".join(above)
    if not isinstance(container, list):
        raise UserError(f"override: {override}: {dotted} holds {shown(container)}, not a section; set {dotted} itself")
    # str.isdigit also takes digits that int refuses, and int raises for very long ones.
    if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(container)):
        raise UserError(f"override: {override}: {dotted} has items 0 to {len(container) - 1}, not '{key}'")
    return int(key)


def _is_section(key: str) -> bool:
    return expected_at([key]).startswith(("section", "mapping"))


def _checked(raw: dict[str, Any]) -> Config:
    # A section whose lines are all commented out is null in YAML; it means the defaults.
    filled = {key: {} if value is None and _is_section(key) else value for key, value in raw.items()}
    section = filled.get("deepspeed")
    problems = deepspeed_problems(section) if isinstance(section, dict) else []
    try:
        # After all overrides: one of them may mend what the file has wrong.
        config = Config.model_validate(filled)
    except ValidationError as error:
        raise first_of(explained(error, Config) + problems) from None
    # Needs a valid tree, so it comes after the problems of the section alone.
    problems = problems or without_effect(config.deepspeed, config.execution.activation_checkpointing)
    if problems:
        raise first_of(problems)
    return config
