"""Differences: what the configurations of several runs do not agree in, and the versions of their software."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmoe_ds.config.yaml12 import inline_yaml
from fedmoe_ds.report import formats
from fedmoe_ds.report.history import Event
from fedmoe_ds.report.markup import Markup, table, tag

PLACE = ("name", "output")
"""Where a run lies says nothing about what it computes."""
LEAD = (
    f"Keys of config.yaml with more than one value, and versions of software. A dash ({formats.MISSING}): that file has no "
    "such key, because the run is of another version, or the key belongs to another method."
)
NOTHING = "Nothing to compare (no config.yaml, a link, or no mapping)"


def difference_section(keys: Sequence[str], configs: Sequence[Mapping[str, Any] | None], starts: Sequence[Event]) -> Markup:
    """A row per key in which the runs differ.

    Args:
        keys: what the page calls the runs.
        configs: their configurations; None where a run folder holds none that can be compared.
        starts: their `run` events.
    """
    known = [place for place, config in enumerate(configs) if config is not None]
    rows = differing([flat(configs[place] or {}) for place in known])
    shown = [[key, *_spread(values, known, len(keys))] for key, values in rows]
    versions = differing([dict(start.get("versions") or {}) for start in starts])
    # No YAML: a version is not quoted because it looks like a number.
    shown += [
        [f"version of {name}", *(value if isinstance(value, str) else _text(value) for value in values)]
        for name, values in versions
    ]
    lost = [key for key, config in zip(keys, configs, strict=True) if config is None]
    missing = tag("p", f"{NOTHING}: {', '.join(lost)}.", cls="note") if lost else None
    if not shown:
        agreed = tag("p", "The configurations agree in every key.", cls="empty") if len(known) > 1 else None
        return tag("div", agreed, missing)
    rows_of_cells = [[row[0], *(tag("td", value, cls="name", data_t=value) for value in row[1:])] for row in shown]
    body = tag("div", table(["key", *keys], rows_of_cells, text_columns=1 + len(keys)), cls="scroll")
    return tag("div", tag("p", LEAD, cls="lead"), body, missing)


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted keys and their values; what is no section, a list included, is a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        dotted = f"{above}{key}"
        # An empty section says something, and has no keys to say it with.
        found |= flat(value, f"{dotted}.") if isinstance(value, Mapping) and value else {dotted: value}
    return found


def differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The keys in which they are not all alike, with a value per configuration; a key that is not there is `_ABSENT`."""
    # In the order of the first file: it is that of the configuration's tree.
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in PLACE]
    rows = [(key, [config.get(key, _ABSENT) for config in configs]) for key in keys]
    # By their text: YAML's 1 and 1.0 and true are three values, which Python takes for one.
    return [(key, values) for key, values in rows if len({_text(value) for value in values}) > 1]


class _Absent:
    """No value, which is not null."""


_ABSENT = _Absent()


def _text(value: Any) -> str:
    return formats.MISSING if value is _ABSENT else inline_yaml(value)


def _spread(values: Sequence[Any], places: Sequence[int], runs: int) -> list[str]:
    """A cell per run, of which some have no configuration."""
    cells = [formats.MISSING] * runs
    for place, value in zip(places, values, strict=True):
        cells[place] = _text(value)
    return cells
