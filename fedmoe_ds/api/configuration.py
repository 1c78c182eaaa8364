"""Configuration: what a program may give for one, checked, and what a run of it would do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from fedmoe_ds import config as tree
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError

Given: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | Config
"""A YAML file, the name of a configuration that comes with the package, a tree of sections and keys, or a checked one."""


def load_config(config: Given, *overrides: str) -> Config:
    """Return the checked configuration after `key=value` overrides, whose values are YAML.

    Raises:
        UserError: one line, for the first key that is unknown, of a wrong type or out of range, or a file that is not there.
    """
    check_overrides(overrides)
    if isinstance(config, Config):
        return tree.with_overrides(config, overrides)
    if isinstance(config, Mapping):
        return tree.config_of(config, overrides)
    if isinstance(config, str | os.PathLike):
        return tree.load_config(Path(config), overrides)
    raise UserError(f"config: {config!r}: give a path or a name of a configuration, a dict of its sections, or a Config")


def check_overrides(overrides: Sequence[object]) -> None:
    """Raise UserError for what is no text: a list of overrides is given with a star."""
    for override in overrides:
        if not isinstance(override, str):
            raise UserError(f"override: {override!r}: is no text; write each as its own argument, 'federation.rounds=20'")


def plan(config: Given, *overrides: str, ranks: int = 1) -> str:
    """Return what a run on so many ranks would do: topology, data, schedule of the first round, memory. Trains nothing.

    Raises:
        UserError: for everything that a start would refuse.
    """
    check_ranks(ranks)
    checked = load_config(config, *overrides)
    # Reads tokenizer and data: imports torch and transformers.
    from fedmoe_ds.planner.dry_run import describe

    return "\n".join(describe(checked, ranks))


def check_ranks(ranks: int) -> None:
    """Raise UserError for a number of ranks that there cannot be."""
    if ranks < 1:
        raise UserError(f"ranks: {ranks}: must be at least 1")
