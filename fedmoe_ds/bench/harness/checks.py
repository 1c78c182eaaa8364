"""Checks: what is wrong with the value of an option, in one line."""

from __future__ import annotations

from collections.abc import Iterable

from fedmoe_ds.errors import UserError, nearest


def check_least(option: str, given: int | Iterable[int], least: int = 1) -> None:
    """Raises UserError for a number below `least`."""
    for number in [given] if isinstance(given, int) else given:
        if number < least:
            raise UserError(f"{option}: {number}: too small; use {least} or more")


def check_seed(given: int) -> None:
    """Raises UserError for a seed that torch or NumPy does not take."""
    check_least("--seed", given, 0)
    if given >= 2**63:
        raise UserError(f"--seed: {given}: too large; use less than 2^63")


def check_known(option: str, kind: str, given: str | Iterable[str], choices: Iterable[str]) -> None:
    """Raises UserError for a word that is none of the choices."""
    choices = tuple(choices)
    for word in [given] if isinstance(given, str) else given:
        if word not in choices:
            raise UserError(f"{option}: {word}: unknown {kind}{nearest(word, choices)}")
