"""Every: `all` for tests. A test that looks at nothing must fail."""

from __future__ import annotations

from collections.abc import Iterable


def every(conditions: Iterable[object]) -> bool:
    """Whether all conditions hold, and there is one at all."""
    found = [bool(condition) for condition in conditions]
    return bool(found) and all(found)
