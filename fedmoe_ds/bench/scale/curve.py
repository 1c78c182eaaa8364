"""Curve: a cost over x, found as a module of `curves/`."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedmoe_ds.bench.scale import curves

SECONDS = "seconds"
Measure = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True)
class Curve:
    """A curve, see `curves/__init__.py`. `measure` starts no ranks, and its figures depend on x alone but for the machine."""

    name: str
    x: str
    points: tuple[int, ...]
    wall: str
    measure: Measure


def curve_names() -> list[str]:
    """The modules of `curves/`, by name; none of them is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(curves.__path__))


def load_curve(name: str) -> Curve:
    """Import a curve. Raises whatever its import raises, and ValueError for a module that is no curve."""
    module = importlib.import_module(f"{curves.__name__}.{name}")
    missing = [part for part in ("NAME", "X", "POINTS", "WALL", "measure") if not hasattr(module, part)]
    if missing:
        raise ValueError(f"curves/{name}.py has no {', '.join(missing)}")
    points = tuple(module.POINTS)
    # One name for the file, the option and the table; and a growth needs points that grow.
    if name != module.NAME or not points or list(points) != sorted(set(points)) or points[0] < 1:
        raise ValueError(f"curves/{name}.py: NAME must be '{name}' and POINTS whole numbers >= 1 that ascend")
    return Curve(name, module.X, points, module.WALL, module.measure)


def growth(before: tuple[int, float], after: tuple[int, float]) -> float | None:
    """By what factor a cost grows when x doubles, from two (x, cost): 1 where it is constant, 2 where it is linear, 4 where it
    is quadratic. None where a cost is nothing."""
    (x0, y0), (x1, y1) = before, after
    # The geometric mean over the doublings between the two.
    return None if min(y0, y1) <= 0 else float((y1 / y0) ** (1.0 / math.log2(x1 / x0)))
