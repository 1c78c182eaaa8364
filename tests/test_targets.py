"""Tokens are rows that the blocks see, targets are what is predicted: every count of a run is of what it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dense_inputs import dense_config, write_dense
from federations import Result, make_config, run_alone

from fedmoe_ds.clients.batches import local_batches
from fedmoe_ds.data import Sequences
from fedmoe_ds.report import formats, write_report
from fedmoe_ds.report.history import History
from fedmoe_ds.report.population import data_section

ONE: dict[str, Any] = {"federation": {"rounds": 1}, "local": {"max_steps": 3}}


@pytest.fixture(scope="module", params=["instructions", "images"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Result:
    root = tmp_path_factory.mktemp("targets")
    write_dense(root, ("vit",))
    text = request.param == "instructions"
    return run_alone(make_config(root, "counted", ONE) if text else dense_config(root, "vit", "counted", ONE))


def counted(result: Result, data: Sequences, chosen: range | list[int]) -> tuple[int, int]:
    """(tokens, targets) of some samples, from the samples themselves."""
    part, images = data.select(chosen), result.parts.foundation.images
    if part.labels is None:
        return sum(map(len, part.input_ids)), sum(int(mask[1:].sum()) for mask in part.loss_mask)
    assert images is not None and images.positions > 1
    return len(part.labels) * images.positions, len(part.labels)


def events(result: Result, kind: str, **wanted: Any) -> list[dict[str, Any]]:
    return [e for e in result.events if e["event"] == kind and all(e.get(key) == value for key, value in wanted.items())]


def test_what_is_evaluated_are_targets(result: Result) -> None:
    data, config = result.parts.data, result.parts.config.evaluation
    held = data.global_holdout()
    expected = {"global": counted(result, held, range(min(config.max_sequences or len(held), len(held))))[1]}
    for client in result.parts.clients:
        own = data.holdout(client.index)
        expected[client.name] = counted(result, own, range(min(config.client_sequences, len(own))))[1]
    expected["clients"] = sum(count for name, count in expected.items() if name != "global")
    found = events(result, "eval")
    assert {event.get("client") or event["split"] for event in found} >= {"global", "clients"}
    for event in found:
        assert event["targets"] == event["tokens"] == expected[event.get("client") or event["split"]]
        assert event["accuracy"] * event["targets"] == pytest.approx(round(event["accuracy"] * event["targets"]), abs=1e-6)


def test_what_is_trained_are_tokens_and_targets(result: Result) -> None:
    parts, config = result.parts, result.parts.config
    for event in events(result, "client"):
        (client,) = [client for client in parts.clients if client.name == event["client"]]
        batches = local_batches(client, config.local, config.seed, 1)
        each = [counted(result, parts.data.train(client.index), batch.tolist()) for batch in batches]
        assert event["tokens"] == sum(tokens for tokens, _ in each)
        assert event["targets"] == sum(targets for _, targets in each) < event["tokens"]
    (whole,) = events(result, "round")
    for word in ("tokens", "targets"):
        assert whole[word] == sum(event[word] for event in events(result, "client"))


def test_what_clients_hold_are_targets(result: Result) -> None:
    (data,) = events(result, "data")
    for client, event in zip(result.parts.clients, data["clients"], strict=True):
        train = result.parts.data.train(client.index)
        assert event["targets"] == event["tokens"] == client.targets == counted(result, train, range(len(train)))[1]


def test_the_report_uses_the_words(result: Result) -> None:
    folder = Path(result.parts.config.output) / result.parts.config.name
    page, history = write_report(folder).read_text(), History.of(result.events)
    total = sum(client.targets for client in result.parts.clients)
    assert f"hold {formats.count(total)} training targets" in page
    # Lengths of sequences are tokens, and say so in a table of their own.
    told = bool((history.data.pop("lengths", None) or {}).get("counts"))
    assert ("by their tokens" in page) == told == (result.parts.foundation.images is None)
    section = str(data_section(history))
    assert " targets" in section and " tokens" not in section
    for client in history.data["clients"]:
        del client["targets"]
    assert str(data_section(history)) == section, "files that call them tokens read the same"
