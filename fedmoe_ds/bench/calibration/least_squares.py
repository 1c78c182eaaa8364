"""Calibrate fit: seconds per unit of work from timed passes, by non-negative least squares on relative errors."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, fields

import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]

from fedmoe_ds.bench.calibration.waves import Sample
from fedmoe_ds.planner.work import Work

KINDS = tuple(part.name for part in fields(Work))


def fit(samples: list[Sample], known: dict[str, float] | None = None) -> dict[str, float]:
    """Seconds of one unit of every kind of work, at least zero; `known` ones were measured by themselves and stay."""
    known = known or {}
    open_kinds = [kind for kind in KINDS if kind not in known]
    amounts = np.array([[float(getattr(sample.work, kind)) for kind in open_kinds] for sample in samples])
    seconds = np.array([sample.seconds for sample in samples])
    left = np.array([s.seconds - sum(float(getattr(s.work, kind)) * unit for kind, unit in known.items()) for s in samples])
    scale = np.maximum(amounts.max(0), 1e-30)
    found, _ = nnls(amounts / scale / seconds[:, None], left / seconds)
    return {**known, **dict(zip(open_kinds, (found / scale).tolist(), strict=True))}


def errors(samples: list[Sample], units: dict[str, float]) -> list[float]:
    """Predicted over measured seconds, minus one, of every sample."""
    return [_work_seconds(s, units) / s.seconds - 1.0 for s in samples]


def spread(values: list[float]) -> float:
    """Root mean square."""
    return math.sqrt(sum(value * value for value in values) / len(values))


def fit_stage(samples: list[tuple[int, int, float]]) -> tuple[float, float]:
    """(seconds per block, seconds per number) through a small and a large sample."""
    (blocks, few, little), (_, many, much) = samples
    number = max((much - little) / (many - few), 0.0)
    return max(little - number * few, 0.0) / blocks, number


@dataclass(frozen=True)
class Together:
    """Several ranks of one host: a factor on the work of each, and alpha and beta of their all-to-alls inside passes."""

    crowding: float
    alpha_s: float
    bytes_per_s: float


def fit_together(apart: list[Sample], together: list[Sample], units: dict[str, float], ranks: int, sharing: float) -> Together:
    """From passes of `ranks` ranks, `sharing` of them to a core: side by side, and in lockstep as one cluster.

    What a pass in lockstep takes beyond the work is laid on its exchanges and their bytes: waking up and waiting included.
    """
    crowding = max(1.0, statistics.median(s.seconds / (sharing * _work_seconds(s, units)) for s in apart))
    seconds = np.array([s.seconds for s in together])
    left = np.maximum(seconds - np.array([crowding * sharing * _work_seconds(s, units) for s in together]), 0.0)
    columns = np.array([[s.exchanges, s.bytes * (ranks - 1) / ranks] for s in together])
    scale = columns.max(0)
    found, _ = nnls(columns / scale / seconds[:, None], left / seconds)
    alpha, per_byte = found / scale
    return Together(crowding, alpha, 1.0 / max(per_byte, 1e-12))


def _work_seconds(sample: Sample, units: dict[str, float]) -> float:
    return sum(float(getattr(sample.work, kind)) * units[kind] for kind in KINDS)


def fit_link(rows: list[tuple[int, float]], size: int) -> tuple[float, float]:
    """(alpha, bytes per second) of a collective of `size` ranks from (bytes handed over, seconds)."""
    (_, fixed), (most, slow) = rows[0], rows[-1]
    moved = most * (size - 1) / size
    return fixed, moved / max(slow - fixed, 1e-9)
