"""How numbers are written for people; what is missing or not finite (`None`, a sum beyond all numbers) is always an en dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

MISSING = "–"
NARROW_SPACE = "\u202f"


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, never an exponent between 1e-3 and 1e6: 0.0412, 34.5, 1 234."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -3 or magnitude > 5:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}".replace(",", NARROW_SPACE).replace("-", "−")


def count(value: float | None) -> str:
    """Whole numbers: exact below ten thousand, then 12.3 k, 4.56 M, 7.89 G."""
    if value is None or not math.isfinite(value):
        return MISSING
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # Four digits are as short as "1.23 k" and exact.
        if value >= (1e4 if unit == "k" else scale):
            return f"{number(value / scale)}{NARROW_SPACE}{unit}"
    return f"{value:,.0f}".replace(",", NARROW_SPACE)


def percent(share: float | None, digits: int = 1) -> str:
    """A share of one as percent: 33.1 %."""
    if share is None or not math.isfinite(share):
        return MISSING
    least = 10.0**-digits
    # A share that is not zero must not read 0.0 %.
    if 0 < 100 * share < least / 2:
        return f"<{NARROW_SPACE}{least:.{digits}f}{NARROW_SPACE}%"
    return f"{100 * share:.{digits}f}{NARROW_SPACE}%".replace("-", "−")


Z_95 = 1.959964
"""Half of the width of the central 95 % of a normal distribution."""


def wilson(share: float, targets: int) -> tuple[float, float]:
    """The 95 % interval of a share that was counted over independent `targets` (E. B. Wilson, JASA 22, 1927, p. 209)."""
    spread = Z_95 * Z_95 / targets
    middle = (share + spread / 2) / (1 + spread)
    reach = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / targets + spread / (4 * targets))
    # Rounding may carry the ends a hair beyond 0 and 1.
    return max(0.0, middle - reach), min(1.0, middle + reach)


def share_digits(share: float, targets: int | None, most: int = 2) -> int:
    """Decimals of a percentage that mean something: the last one is no finer than half of the interval. Unknown: `most`."""
    if not targets or not 0 <= share <= 1:
        return most
    low, high = wilson(share, targets)
    # 50 and not 100: half of the interval, in percent.
    return min(most, max(0, math.ceil(-math.log10(50 * (high - low)))))


def targets_of(event: Mapping[str, Any]) -> int | None:
    """The targets of an evaluation, or of a client's data; older files have them under the name `tokens`."""
    targets: int | None = event.get("targets", event.get("tokens"))
    return targets


def accuracy(event: Mapping[str, Any]) -> str:
    """The accuracy of an evaluation with its 95 % interval: 66 % (55 to 76)."""
    return counted_share(event, "accuracy", targets_of(event))


def counted_share(event: Mapping[str, Any], field: str, count: int | None) -> str:
    """The share `field` of `count` independent cases, with its 95 % interval."""
    share = event.get(field)
    if share is None or not count or not 0 <= share <= 1:
        return score(event, field, percent)
    digits = share_digits(share, count)
    low, high = (f"{100 * end:.{digits}f}" for end in wilson(share, count))
    return f"{percent(share, digits)} ({low} to {high})"


def many(size: int, noun: str) -> str:
    """A count with its noun: 1 client, 12 clients."""
    return f"{count(size)} {noun}{'' if size == 1 else 's'}"


def signed_percent(share: float | None, digits: int = 1) -> str:
    """A relative change: +12.0 %, −59.3 %."""
    return MISSING if share is None or not math.isfinite(share) else ("+" if share >= 0 else "−") + percent(abs(share), digits)


def points(difference: float | None, digits: int = 1) -> str:
    """A difference of two shares in percentage points: +11.8 pp."""
    if difference is None or not math.isfinite(difference):
        return MISSING
    return f"{100 * difference:+.{digits}f}{NARROW_SPACE}pp".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds as 120 ms, 4.2 s, 3 min 12 s, 1 h 02 min."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    # The bounds lie where rounding would otherwise give 1000 ms, 60.0 s.
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    # Rounded once, before minutes are split off: never "3 min 60 s".
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def score(event: Mapping[str, Any], field: str, form: Callable[[float | None], str]) -> str:
    """A recorded figure; one that was recorded as null was not finite, which is not the same as missing."""
    return "not finite" if field in event and event[field] is None else form(event.get(field))


def clock(unix_seconds: float | None) -> str:
    """A point in time, UTC."""
    if unix_seconds is None or not 0 <= unix_seconds < 253402300800:  # the year 10000
        return MISSING
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
