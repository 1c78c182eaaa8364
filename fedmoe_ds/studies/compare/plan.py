"""Plan: the runs of a comparison: every method that takes part, with the keys that are its own, and every seed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds.config import Config, load_config
from fedmoe_ds.config.yaml12 import inline_yaml
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import method_for, with_defaults
from fedmoe_ds.studies.compare.protocol import MethodEntry, Protocol
from fedmoe_ds.studies.run import Run, keys_of

OURS = {"name": "the label and the seed", "output": "--output", "seed": "--seeds", "method": "--methods"}


@dataclass(frozen=True)
class Variant:
    """A label and its `key=value` lists: `own` comes before the overrides for every run, `inline` after them.

    `origin` says where the `method` section comes from.
    """

    label: str
    name: str
    own: tuple[str, ...]
    inline: tuple[str, ...]
    origin: str


def parse_variants(text: str, protocol: Protocol, methods: Path) -> list[Variant]:
    """The variants of `--methods`: `label` or `label:key=value+key=value`, separated by commas.

    Args:
        methods: the folder of the methods' own files, `<name>.yaml`, each a whole configuration of which only the `method`
            section and the keys under `take` are used. A method without a file runs with its defaults.

    Raises:
        UserError: nothing is listed, a label is given twice, or an entry is malformed.
    """
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise UserError(f"--methods: {text or 'empty'}: lists no method; give names separated by commas, e.g. flame,fedit")
    variants = [_variant(entry, protocol, methods) for entry in entries]
    labels = [variant.label for variant in variants]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"--methods: {label}: listed twice; give every label once")
    return variants


def _variant(entry: str, protocol: Protocol, methods: Path) -> Variant:
    base, colon, rest = entry.partition(":")
    inline = tuple(rest.split("+")) if colon else ()
    for override in inline:
        # Neither `key=` nor `=value` will do.
        if "=" not in override.strip("="):
            raise UserError(f"--methods: {entry}: '{override}' is no key=value; write label:key=value+key=value")
    described = protocol.methods.get(base, MethodEntry())
    name = described.name or base
    own, origin = _own_keys(name, described, methods)
    label = "-".join([base, *(_short(override) for override in inline)])
    return Variant(label, name, tuple(own), inline, origin)


def _short(override: str) -> str:
    """What an inline override adds to the label: method.temperature=0 -> temperature-0, fit for a folder's name."""
    key, _, value = override.partition("=")
    return re.sub(r"[^A-Za-z0-9._]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-")


def _own_keys(name: str, described: MethodEntry, methods: Path) -> tuple[list[str], str]:
    path = methods / f"{name}.yaml"
    if not path.exists():
        if described.take:
            raise UserError(f"--study: {described.take[0]}: is to be taken from {path}, which is not there; use set")
        own, origin = [f"method={inline_yaml({'name': name})}"], "the method's defaults"
    else:
        config = load_config(path)
        if config.method.name != name:
            raise UserError(f"method.name: {config.method.name}: {path} is the file of {name}; set method.name: {name}")
        own, origin = [f"method={inline_yaml(config.method.model_dump())}"], str(path)
        own += [f"{key}={inline_yaml(_at(config, key, path))}" for key in described.take]
    # `set` comes last: it may replace what was taken.
    return own + [f"{key}={inline_yaml(value)}" for key, value in described.set.items()], origin


def _at(config: Config, dotted: str, path: Path) -> Any:
    """The value of a dotted key."""
    here: Any = config.model_dump()
    for key in dotted.split("."):
        if not isinstance(here, dict) or key not in here:
            raise UserError(f"--study: take: {dotted}: {path} has no such key; see docs/configuration.md")
        here = here[key]
    return here


def plan_runs(
    base: Path, variants: Sequence[Variant], seeds: int, output: Path, overrides: Sequence[str], ranks: int = 1
) -> list[Run]:
    """All runs, method by method, each with its seeds 0, 1, ....

    A key takes its value from the last of: the base configuration, the method's own keys, `overrides`, the entry in --methods.

    Raises:
        UserError: no seeds, an override that the study itself decides, or anything that the command would refuse.
    """
    if seeds < 1:
        raise UserError(f"--seeds: {seeds}: there is nothing to run; give 1 or more")
    given = [*overrides, *(override for variant in variants for override in variant.inline)]
    for key in keys_of(given):
        # The label would promise another method than the one that runs.
        if key in OURS or key == "method.name":
            raise UserError(f"override: {key}: is decided by {OURS[key.partition('.')[0]]}; leave it out")
    return [
        Run(variant.label, seed, _config(base, variant, seed, output, overrides), ranks)
        for variant in variants
        for seed in range(seeds)
    ]


def _config(base: Path, variant: Variant, seed: int, output: Path, overrides: Sequence[str]) -> Config:
    place = [f"name={inline_yaml(f'{variant.label}-seed{seed}')}", f"output={inline_yaml(str(output))}", f"seed={seed}"]
    config = load_config(base, [*variant.own, *overrides, *variant.inline, *place])
    return with_defaults(config, method_for(config))
