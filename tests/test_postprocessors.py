"""Postprocessors: what one does to an update is in the sum, and an update that is kept out changes no bit of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from federations import Result, alone, build, finish, leave_out, make_config, write_inputs

from fedmoe_ds.aggregation.postprocessors import Postprocessor
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.update import ClientUpdate


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("postprocessors")
    write_inputs(folder)
    yield folder


ROUND = {"federation": {"rounds": 1}}


def run(root: Path, name: str, kept: int | None = None, *steps: Postprocessor) -> Result:
    parts, journal = build(make_config(root, name, ROUND), *alone())
    if kept is not None:
        leave_out(parts, {1: kept})
    return finish(parts, journal, *steps)


def test_an_update_that_is_kept_out_is_as_if_its_client_had_not_come(root: Path) -> None:
    seen = []

    def refuse(view: ClientView, update: ClientUpdate) -> str | None:
        seen.append(update.client.index)
        return "refused" if update.client.index >= 2 else None

    def late(view: ClientView, update: ClientUpdate) -> str | None:
        assert update.client.index < 2, "the step before has kept it out"
        return None

    found = run(root, "refused", None, refuse, late)
    assert found.digest == run(root, "absent", 2).digest != run(root, "all").digest
    rows = {event["client"]: event["status"] for event in found.events if event["event"] == "client"}
    assert len(seen) == len(rows) > 2 and sorted(rows.values()) == ["ok"] * 2 + ["refused"] * (len(rows) - 2)


def test_what_it_does_to_the_tensors_is_in_the_sum(root: Path) -> None:
    def halve(view: ClientView, update: ClientUpdate) -> None:
        for spec in view.blocks():
            if spec.trained:
                view.value(spec).sub_(view.received(spec)).mul_(0.5).add_(view.received(spec))

    start = build(make_config(root, "start", ROUND), *alone())[0]
    before = {key: value.clone().numpy() for key, _, value in start.state.adapters.items(start.first_expert)}
    whole, half = run(root, "whole").adapters, run(root, "half", None, halve).adapters
    moved = 0
    for key, value in before.items():
        np.testing.assert_allclose(half[key] - value, 0.5 * (whole[key] - value), atol=1e-6, err_msg=str(key))
        moved += bool(np.abs(whole[key] - value).max() > 1e-5)
    assert moved > len(before) // 2
