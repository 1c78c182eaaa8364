"""Averaged statistics: weighted means by key against plain loops, whoever adds up; keys without weight; what they cost.

Legend: K keys, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from federations import alone, build, finish, make_config, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.aggregation.averaged_statistics import STATISTICS, AveragedStatistics, Summary
from fedmoe_ds.aggregation.postprocessors import keep_out_non_finite
from fedmoe_ds.aggregation.round_sums import RoundSums
from fedmoe_ds.aggregation.weighted_average import Statistics
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.device_check import check_devices
from fedmoe_ds.federation.traffic import Traffic
from fedmoe_ds.methods import CLASS_FEATURES, CLASS_TARGETS, Method, class_means, class_sums, method_for
from fedmoe_ds.methods.contradictions import contradictions
from fedmoe_ds.planner.memory import estimate, outlasting

SHAPES: dict[str, tuple[int, ...]] = {"means": (5, 3), "matrices": (2, 2, 4), "numbers": (4,)}
CLIENTS = 6


def summaries(seed: int) -> list[Summary]:
    """Of every client; a third of the weights is zero, and the last key's always."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(CLIENTS):
        own: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, shape in SHAPES.items():
            weight_K = draw.integers(1, 50, shape[0]) * (draw.random(shape[0]) > 0.3)
            weight_K[-1] = 0
            own[name] = (draw.normal(size=shape).astype(np.float32), weight_K.astype(np.float64))
        found.append(own)
    return found


def totals(averaged: AveragedStatistics, parts: list[list[Summary]], exact: bool = True) -> Statistics:
    """The sums of ranks that add up these clients each, after their collective."""
    ranks = []
    for own in parts:
        sums = averaged.sums(exact)
        assert sums is not None
        for one in own:
            averaged.add(sums, one)
        ranks.append(sums)
    first, *others = ranks
    for other in others:
        windows = torch.maximum(first.windows.memory, other.windows.memory)
        for sums in (first, other):
            start = 0
            for name in SHAPES:
                for part in sums._sums(name):
                    part.raise_to(windows[start : start + part.windows.numel()].view(part.windows.shape))
                    start += part.windows.numel()
        first.flat.memory.add_(other.flat.memory)
    return first


@pytest.mark.parametrize("exact", [True, False])
def test_means_are_those_of_plain_loops(exact: bool) -> None:
    averaged, clients = AveragedStatistics(SHAPES), summaries(0)
    own = averaged.banks()
    for spec in averaged.specs:
        own[STATISTICS].client(spec.name, 0).fill_(7.0)
    averaged.step(totals(averaged, [clients], exact), own)
    for name, found in averaged.delivered(own).items():
        assert found.value.shape == SHAPES[name] and found.value.dtype == torch.float32
        for key in range(SHAPES[name][0]):
            weights = [float(one[name][1][key]) for one in clients]
            assert bool(found.known[key]) == (sum(weights) > 0)
            if not sum(weights):
                assert bool((found.value[key] == 7.0).all()), "a key without weight keeps its value"
                continue
            mean = sum(w * one[name][0][key].astype(np.float64) for w, one in zip(weights, clients, strict=True)) / sum(weights)
            np.testing.assert_allclose(found.value[key].numpy(), mean, rtol=1e-6 if exact else 1e-4, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.permutations(range(CLIENTS)), st.integers(0, CLIENTS))
def test_who_adds_up_whom_changes_no_bit(seed: int, order: list[int], cut: int) -> None:
    averaged, clients = AveragedStatistics(SHAPES), summaries(seed)
    parts = [[clients[i] for i in order[:cut]], [clients[i] for i in order[cut:]]]
    banks = [averaged.banks(), averaged.banks()]
    averaged.step(totals(averaged, [clients]), banks[0])
    averaged.step(totals(averaged, parts), banks[1])
    pairs = [(one.value, one.known) for bank in banks for one in averaged.delivered(bank).values()]
    for (value, known), (other, other_known) in zip(pairs[: len(SHAPES)], pairs[len(SHAPES) :], strict=True):
        assert torch.equal(value, other) and torch.equal(known, other_known)


def test_what_is_known_stays_known() -> None:
    averaged = AveragedStatistics({"means": (3, 2)})
    own = averaged.banks()

    def step(weights: list[float], value: float) -> None:
        averaged.step(totals_of({"means": (np.full((3, 2), value), np.array(weights))}), own)

    def totals_of(one: Summary) -> Statistics:
        sums = averaged.sums(True)
        assert sums is not None
        averaged.add(sums, one)
        return sums

    step([1.0, 0.0, 2.0], 3.0)
    step([0.0, 0.0, 4.0], 5.0)
    found = averaged.delivered(own)["means"]
    assert found.value[:, 0].tolist() == [3.0, 0.0, 5.0] and found.known.tolist() == [True, False, True]


def test_none_are_no_state_no_sums_and_no_bytes() -> None:
    averaged = AveragedStatistics({})
    assert averaged.banks() == {} == averaged.delivered({}) and averaged.sums(True) is None
    sums = RoundSums([], 1, True, keyed=averaged)
    assert sums.keyed is None and not [*sums.tensors()]


def test_class_sums_are_those_of_plain_loops() -> None:
    torch.manual_seed(0)
    features_ND, labels_N = torch.randn(9000, 3), torch.randint(4, (9000,))
    sums = class_sums(features_ND, labels_N, 6)
    for c in range(6):
        own = [feature.double() for feature, label in zip(features_ND, labels_N.tolist(), strict=True) if label == c]
        assert int(sums[CLASS_TARGETS][c]) == len(own)
        torch.testing.assert_close(
            sums[CLASS_FEATURES][c], sum(own, torch.zeros(3, dtype=torch.float64)), rtol=1e-12, atol=1e-9
        )
    assert every(not bool(value.any()) for value in class_sums(features_ND, labels_N, 6, counted=False).values())
    means_CD, counts_C = class_means({name: value.numpy() for name, value in sums.items()})
    assert not means_CD[4:].any() and not counts_C[4:].any()
    np.testing.assert_allclose(means_CD[0], features_ND[labels_N == 0].double().mean(0).numpy(), atol=1e-12)


# In a run

BASE: dict[str, Any] = {"method": {"name": "fedfm"}, "evaluation": {"client_sequences": 0, "max_sequences": 1}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    write_inputs(folder, (13, 9, 7, 5))
    return folder


def test_sums_that_are_not_finite_stay_out_of_the_round(root: Path) -> None:
    """The client's adapters, too: they were trained beside them."""
    parts, journal = build(make_config(root, "poisoned", BASE, {"federation": {"rounds": 1}}), *alone())

    def poisoned(view: Any, update: Any) -> None:
        if update.client.index == 1:
            update.observed[CLASS_FEATURES][3, 0] = np.inf

    result = finish(parts, journal, poisoned, keep_out_non_finite)
    status = {event["client"]: event["status"] for event in result.events if event["event"] == "client"}
    assert status.pop(parts.clients[1].name) == "non-finite" and set(status.values()) == {"ok"}
    assert every(bool(value.isfinite().all()) for value in parts.state.server[STATISTICS].values.values())


def test_bytes_of_statistics_travel_and_are_planned(root: Path) -> None:
    classes, width = 320, 32
    found: dict[str, tuple[int, int]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for name, method in {
        "none": {"name": "fedit"},
        "stale": {"name": "fedfm"},
        "survey": {"name": "fedfm", "anchors": "survey"},
        "off": {"name": "fedfm", "matching": 0.0},
    }.items():
        parts, journal = build(make_config(root, f"bytes-{name}", {"method": method}), *alone())
        journal.close()
        found[name] = Traffic(parts.spec, parts.clients, 4).of(4)
        kept = outlasting(parts.spec, 4, 4).get("server state", 0)
        sizes[name] = estimate(parts.spec, 4, 40, 4)["round sums"], kept
        assert kept == sum(bank.nbytes() for bank in parts.state.server.values())
        made = sum(tensor.nbytes for _, side, _, tensor in parts.new_sums().tensors() if side == "values")
        assert name == "survey" or sizes[name][0] == made
    down, up = found["none"]
    numbers = 4 * classes * width
    assert found["off"] == found["none"] and sizes["off"] == sizes["none"]
    assert found["stale"] == (down + numbers, up + numbers + 4 * classes)
    assert sizes["stale"][1] == numbers + 4 * classes


# What does not go together


class Wrong(Method):
    """A method that says one thing and does another."""


def test_contradictions_are_named() -> None:
    keep: dict[str, Any] = {
        "statistics": lambda self: {"means": (2, 3)},
        "summary": lambda self, client, sums: {},
        "survey": lambda self, targets: {},
        "surveys": True,
    }

    def told(**change: Any) -> list[str]:
        given = {name: value for name, value in (keep | change).items() if value is not None}
        return [line.split(":")[0] for line in contradictions(type("Changed", (Wrong,), given))]

    assert told() == []
    assert told(summary=None) == ["statistics"] and told(survey=None) == ["surveys"] and told(most_delay=2) == ["most_delay"]
    assert told(statistics=None) == ["statistics", "surveys"]
    assert told(rescaler="client") == told(unequal_ranks=True) == ["surveys"]


def test_devices_that_cannot_serve_them_are_refused(root: Path) -> None:
    mix: dict[str, Any] = {"mix": {"laptop": 1.0}, "availability": "always"}
    late = {**mix, "aggregation": "buffered", "buffer": 2, "concurrency": 4}
    for devices, method, words in (
        (late, {"name": "fedfm"}, r"^devices.aggregation: buffered: method fedfm delivers statistics .*; use synchronous"),
        (mix, {"name": "fedfm", "anchors": "survey"}, r"^devices: method fedfm passes over clients' data once more.*; drop"),
    ):
        config = make_config(root, "refused", {"method": method, "devices": devices})
        with pytest.raises(UserError, match=words) as caught:
            check_devices(config, method_for(config))
        assert "\n" not in str(caught.value)
    config = make_config(root, "taken", {"method": {"name": "fedfm"}, "devices": mix})
    check_devices(config, method_for(config))
