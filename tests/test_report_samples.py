"""Samples and lengths on the report page: targets are marked, hostile text stays text, and nothing shows unasked."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_ds.data import Sequences
from fedmoe_ds.federation.samples import spans
from fedmoe_ds.report.events import wrong_field
from fedmoe_ds.report.history import History
from fedmoe_ds.report.html import page
from fedmoe_ds.report.samples import length_table, sample_section

CLIENT: dict[str, Any] = {"name": "ann", "tier_label": "4", "top_k": 4, "samples": 3, "targets": 9}
DATA: dict[str, Any] = {
    "event": "data",
    "clients": [CLIENT],
    "lengths": {"width": 8, "counts": {"4": [0, 2, 1]}},
    "omissions": {"rows": 5, "total": {"empty": 2}, "clients": {"ann": {"empty": 2}}},
}
HOSTILE = "</pre><script>alert(1)</script>\x1b[2J\u202eabc"
SAMPLE: dict[str, Any] = {
    "event": "sample",
    "tier_label": "4",
    "client": "<b>ann</b>",
    "pieces": [{"text": f"say {HOSTILE}", "target": False}, {"text": f"yes {HOSTILE}", "target": True}],
    "tokens": 12,
    "targets": 5,
}


def test_spans_part_a_sequence_at_its_targets() -> None:
    ids, mask = np.arange(10, 16), np.array([False, False, True, True, False, True])
    found = spans(Sequences([ids], [mask]), 0)
    assert found == [([10, 11], False), ([12, 13], True), ([14], False), ([15], True)]


def test_targets_are_marked_and_text_stays_text() -> None:
    assert wrong_field(SAMPLE) is None and wrong_field(DATA) is None
    shown = sample_section(History.of([DATA, SAMPLE]))
    assert shown is not None and shown.count("<mark>") == 1 and "<mark>yes &lt;/pre&gt;&lt;script&gt;" in shown
    assert "<script>" not in shown and "<b>ann" not in shown and "\x1b" not in shown and "\u202e" not in shown
    assert "What clients learn from" in page(History.of([DATA, SAMPLE]), None)


def test_without_samples_no_section_and_lengths_are_there_all_the_same() -> None:
    history = History.of([DATA])
    assert sample_section(history) is None and "What clients learn from" not in page(history, None)
    lengths = length_table(history)
    assert lengths is not None and ">9 to 16<" in lengths and ">17 to 24<" in lengths
    assert "2 of 5 samples left out" in page(history, None)
    assert length_table(History.of([{"event": "data", "clients": [CLIENT]}])) is None, "a record of an earlier version"


def test_events_of_other_types_are_named() -> None:
    for change, field in (
        ({"pieces": [{"text": 3, "target": True}]}, "pieces.0.text"),
        ({"client": None}, "client"),
        ({"tier_label": "<4>"}, "tier_label"),
    ):
        assert field in (wrong_field({**SAMPLE, **change}) or "")
    assert "lengths.width" in (wrong_field({**DATA, "lengths": {"width": 0, "counts": {}}}) or "")
