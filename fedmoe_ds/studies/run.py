"""Run: one run of a study: its configuration, how many ranks train it, and what it has recorded so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds.config import Config, load_config
from fedmoe_ds.config.problems import shown
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.no_experts import as_meant
from fedmoe_ds.foundation import planned_sparse
from fedmoe_ds.methods import load_method, with_defaults
from fedmoe_ds.report import Record
from fedmoe_ds.report.history import History, ending

# Where a run lies says nothing about what it computes: a study may be moved.
PLACE = ("name", "output")


@dataclass(frozen=True)
class Run:
    """One configuration of a study, as the real command will save it.

    Attributes:
        label: the method, or the value of the axis, that it stands for.
        seed: of a comparison; in a scaling study, whose runs share one seed, the number of the repeat.
        ranks: 1 is plain python, more is a launcher.
    """

    label: str
    seed: int
    config: Config
    ranks: int = 1

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def folder(self) -> Path:
        return Path(self.config.output) / self.config.name

    @property
    def metrics(self) -> Path:
        """Where it records its events."""
        return self.folder / "metrics.jsonl"

    def history(self) -> History:
        """What it has recorded so far; empty before its first start."""
        return History.of(Record(self.metrics) if self.metrics.exists() else [])

    @property
    def begun(self) -> bool:
        """Whether it has recorded anything; by then its foundation and its data are in the cache."""
        return self.metrics.exists() and self.metrics.stat().st_size > 0

    @property
    def finished(self) -> bool:
        """Whether its last start ended after the last round; a run that was asked to stop ends before."""
        end = ending(Record(self.metrics)) if self.metrics.exists() else None
        return end is not None and end.get("rounds") == self.config.federation.rounds


def check_saved(runs: Sequence[Run]) -> None:
    """Refuse to continue a folder whose saved configuration is another one. Raises UserError naming the first differing key."""
    for run in runs:
        path = run.folder / "config.yaml"
        if not path.exists():
            continue
        old, new = _compared(load_config(path)), _compared(run.config)
        if new["foundation"]["dtype"] == "auto":  # a run saves the type that its device and its model have made of it
            new["foundation"]["dtype"] = old["foundation"]["dtype"]
        difference = next(differences(old, new), None)
        if difference is not None:
            key, old, new = difference
            raise UserError(
                f"{key}: {shown(new)}: {run.folder} was run with {shown(old)}; set it back, remove that folder, "
                "or use another --output"
            )


def _compared(config: Config) -> dict[str, Any]:
    # As a start resolves it: without experts `adapters.experts` is saved as false.
    config = as_meant(config, planned_sparse(config.foundation))
    # A folder of an older version may lack keys of its method that have got a default since.
    tree = with_defaults(config, load_method(config.method)).model_dump(exclude=set(PLACE))
    if tree["data"]["template"] == "text":  # earlier versions' default; of the same data, what `auto` has always meant
        tree["data"]["template"] = "auto"
    return tree


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every leaf in which two trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*new, *old]):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield path, old, new


def keys_of(overrides: Sequence[str]) -> list[str]:
    """The dotted keys of key=value overrides."""
    return [override.partition("=")[0] for override in overrides]
