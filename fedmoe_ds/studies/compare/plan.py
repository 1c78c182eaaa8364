"""Study: every run of a comparison, with the configuration that the real command will save for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds.config import Config, load_config
from fedmoe_ds.config.problems import shown
from fedmoe_ds.config.yaml12 import inline_yaml
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import load_method, method_for, with_defaults
from fedmoe_ds.report import read_metrics
from fedmoe_ds.report.history import History
from fedmoe_ds.studies.compare.variant import Variant, keys_of

OURS = {"name": "the label and the seed", "output": "--output", "seed": "--seeds", "method": "--methods"}
# Where a run lies says nothing about what it computes: a study may be moved.
PLACE = ("name", "output")


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    label: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def folder(self) -> Path:
        return Path(self.config.output) / self.config.name

    def history(self) -> History:
        """What it has recorded so far; empty before its first start."""
        path = self.folder / "metrics.jsonl"
        return History.of(read_metrics(path) if path.exists() else [])

    @property
    def begun(self) -> bool:
        """Whether it has recorded anything; by then its foundation and its data are in the cache."""
        path = self.folder / "metrics.jsonl"
        return path.exists() and path.stat().st_size > 0

    @property
    def finished(self) -> bool:
        """Whether its last start ended after the last round; a run that was asked to stop ends before."""
        end = self.history().end
        return end is not None and end.get("rounds") == self.config.federation.rounds


def plan_runs(base: Path, variants: Sequence[Variant], seeds: int, output: Path, overrides: Sequence[str]) -> list[Run]:
    """All runs, method by method, each with its seeds 0, 1, ....

    A key takes its value from the last of: the base configuration, the method's own keys, `overrides`, the entry in --methods.

    Raises:
        UserError: no seeds, an override that the study itself decides, or anything that the command would refuse.
    """
    if seeds < 1:
        raise UserError(f"--seeds: {seeds}: there is nothing to run; give 1 or more")
    given = [*overrides, *(override for variant in variants for override in variant.inline)]
    for key in keys_of(given):
        if key in OURS or key == "method.name":
            raise UserError(f"override: {key}: is decided by {OURS[key.partition('.')[0]]}; leave it out")
    return [
        Run(variant.label, seed, _config(base, variant, seed, output, overrides))
        for variant in variants
        for seed in range(seeds)
    ]


def _config(base: Path, variant: Variant, seed: int, output: Path, overrides: Sequence[str]) -> Config:
    place = [f"name={inline_yaml(f'{variant.label}-seed{seed}')}", f"output={inline_yaml(str(output))}", f"seed={seed}"]
    config = load_config(base, [*variant.own, *overrides, *variant.inline, *place])
    return with_defaults(config, method_for(config))


def check_saved(runs: Sequence[Run]) -> None:
    """Refuse to continue a folder whose saved configuration is another one. Raises UserError naming the first differing key."""
    for run in runs:
        path = run.folder / "config.yaml"
        if not path.exists():
            continue
        difference = next(differences(_compared(load_config(path)), _compared(run.config)), None)
        if difference is not None:
            key, old, new = difference
            raise UserError(
                f"{key}: {shown(new)}: {run.folder} was run with {shown(old)}; set it back, remove that folder, "
                "or use another --output"
            )


def _compared(config: Config) -> dict[str, Any]:
    return with_defaults(config, load_method(config.method)).model_dump(exclude=set(PLACE))


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every leaf in which two trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*new, *old]):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield path, old, new
