"""Point: one value of the axis: the world it needs and the run of every repeat.

A run is the same `Run` that a comparison is made of, with the repeat in the place of the seed; all repeats share one seed, so
what they learn is the same and only their times differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds.config import Config, load_config
from fedmoe_ds.config.yaml12 import inline_yaml
from fedmoe_ds.distributed.topology import check_layout
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import method_for, with_defaults
from fedmoe_ds.randomness import generator
from fedmoe_ds.studies.run import Run, check_saved, keys_of
from fedmoe_ds.studies.scaling.study import KEYS, Study


@dataclass(frozen=True)
class Point:
    """One value of the axis; all of its runs are equal but for their place."""

    index: int
    value: int
    label: str
    runs: tuple[Run, ...]

    @property
    def ranks(self) -> int:
        return self.runs[0].ranks

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)


def plan_points(study: Study, path: Path, output: Path, overrides: Sequence[str]) -> list[Point]:
    """All points of the study in `path`.

    A key takes its value from the last of: the base configuration, `set`, `overrides`, what grows, the axis.

    Raises:
        UserError: an override that the study itself decides, or a point whose keys or layout the command would refuse.
    """
    decided = {"name": "the study", "output": "--output", **dict.fromkeys(study.grows, "grows")}
    decided |= {KEYS[study.axis]: "the axis"} if study.axis in KEYS else {}
    for key in keys_of(overrides):
        if key in decided:
            raise UserError(f"override: {key}: is decided by {decided[key]}; leave it out")
    return [_point(study, index, path.parent / study.base, output, overrides) for index in range(len(study.values))]


def in_order(study: Study, points: Sequence[Point]) -> list[Run]:
    """The runs of these points as they are started: repeat by repeat, the values of each in an order of its own.

    In the order of the axis whatever changes on a machine over hours (heat, neighbours) would pass for an effect of the axis.
    """
    runs = []
    for repeat in range(study.repeats):
        order = generator(study.order_seed, "scaling-order", repeat).permutation(len(points))
        runs += [points[place].runs[repeat] for place in order]
    return runs


def _point(study: Study, index: int, base: Path, output: Path, overrides: Sequence[str]) -> Point:
    value = study.values[index]
    label, ranks = f"{study.axis}-{value}", study.world(value)
    given = [*_lines(study.set), *overrides, *_axis(study, value)]
    # Read back from all keys: the base, `set`, an override or the axis may have decided it.
    ep_size = load_config(base, given).topology.ep_size
    grown = {key: amount * (ranks if study.per == "rank" else max(1, ranks // ep_size)) for key, amount in study.grows.items()}

    def run(repeat: int) -> Run:
        place = _lines({"name": f"{label}-r{repeat}", "output": str(output)})
        config = load_config(base, [*given, *_lines(grown), *place])
        return Run(label, repeat, with_defaults(config, method_for(config)), ranks)

    point = Point(index, value, label, tuple(run(repeat) for repeat in range(study.repeats)))
    # Where ep_size does not divide the ranks, what grew above is void, and this refuses it.
    check_layout(point.config.topology, ranks)
    if point.config.federation.rounds < 2:
        raise UserError("federation.rounds: 1: the first round warms up and is not timed; run at least 2")
    return point


def _axis(study: Study, value: int) -> list[str]:
    if study.axis == "ranks":
        return []
    return _lines({KEYS[study.axis]: [{"top_k": value, "share": 1.0}] if study.axis == "k" else value})


def _lines(keys: Mapping[str, Any]) -> list[str]:
    return [f"{key}={inline_yaml(value)}" for key, value in keys.items()]


def check_points(points: Sequence[Point]) -> None:
    """Refuse what a start of any point would refuse, without weights or ranks. Raises UserError."""
    from fedmoe_ds.planner.dry_run import describe  # brings models and data; --points does without

    for point in points:
        describe(point.config, point.ranks)


def check_folders(points: Sequence[Point]) -> None:
    """Refuse folders that another study has filled. Raises UserError naming the first difference."""
    runs = [run for point in points for run in point.runs]
    check_saved(runs)
    for run in runs:
        # The size of the world is in no configuration, so `check_saved` cannot see it.
        before = run.history().run.get("world_size")
        if before is not None and before != run.ranks:
            raise UserError(
                f"ranks: {run.ranks}: {run.folder} was run on {before}; set it back, remove that folder, "
                "or use another --output"
            )


def chosen(points: Sequence[Point], index: int | None) -> list[Point]:
    """The point that --point names, or all of them. Raises UserError for an index that is not there."""
    if index is None:
        return list(points)
    if not 0 <= index < len(points):
        raise UserError(f"--point: {index}: the study has the points 0 to {len(points) - 1}; see --points")
    return [points[index]]
