"""Samples on the report page: how long the clients' sequences are, and a few of them as text with their targets marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmoe_ds.clients.tiers import tier_order
from fedmoe_ds.report import formats
from fedmoe_ds.report.history import Event, History, tier_of
from fedmoe_ds.report.markup import Markup, table, tag
from fedmoe_ds.report.svg import tier_colours, tier_mark

LENGTH_LEAD = "Training sequences by their tokens, per tier. Longer samples were cut, or left out; both are counted above."
SAMPLE_LEAD = (
    "The first training samples of each tier's first client, as the model reads them. Marked tokens are targets: the loss is "
    "about these alone."
)


def length_table(history: History) -> Markup | None:
    """Counts of sequences by length; None for images and for records of earlier versions."""
    lengths: Mapping[str, Any] = history.data.get("lengths") or {}
    counts: Mapping[str, list[int]] = lengths.get("counts") or {}
    if not counts:
        return None
    width, bins = lengths["width"], max(map(len, counts.values()))
    tiers, colours = sorted(counts, key=tier_order), tier_colours(history.tiers)
    head = ["tokens", *(tag("th", tier_mark(colours.get(tier, "t0"), tier), scope="col") for tier in tiers)]
    rows = [
        [f"{place * width + 1} to {(place + 1) * width}", *(formats.count(_at(counts[tier], place)) for tier in tiers)]
        for place in range(bins)
    ]
    body = tag("div", table(head, rows), cls="scroll")
    return tag("details", tag("summary", "Lengths of sequences"), tag("p", LENGTH_LEAD, cls="lead"), body)


def sample_section(history: History) -> Markup | None:
    """Samples as text; None for a run that shows none."""
    if not history.samples:
        return None
    colours = tier_colours(history.tiers)
    rows = [
        [
            tag("td", tier_mark(colours.get(tier_of(one), "t0"), tier_of(one))),
            str(one["client"]),
            tag("td", _text(one)),
            *_sizes(one),
        ]
        for one in history.samples
    ]
    body = tag("div", table(["tier", "client", "sample", "tokens", "targets"], rows, text_columns=3), cls="scroll")
    return tag("div", tag("p", SAMPLE_LEAD, cls="lead"), body)


def _text(one: Event) -> Markup:
    pieces = one.get("pieces") or []
    return tag("pre", *(tag("mark", piece["text"]) if piece["target"] else piece["text"] for piece in pieces))


def _sizes(one: Event) -> list[str]:
    return [formats.count(one.get("tokens")), formats.count(one.get("targets"))]


def _at(counts: list[int], place: int) -> int:
    return counts[place] if place < len(counts) else 0
