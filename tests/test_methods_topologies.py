"""Every method on three topologies, all methods in one world each: the digest and the evaluation rows of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import run_distributed
from federations import Result, joined, run_alone, run_joined, write_inputs
from method_variants import VARIANTS, variant_config

pytestmark = pytest.mark.timeout(600)

ALL_AT_ONCE: dict[str, Any] = {"execution": {"clients_in_flight": None}}
Outcome = tuple[str, list[tuple[Any, ...]]]


def work(rank: int, root: Path, ep_size: int) -> dict[str, Outcome]:
    runtime = joined(rank)
    tag = f"{runtime.world_size}-{ep_size}"
    found = {}
    for variant in VARIANTS:
        result = run_joined(variant_config(root, variant, tag, {"topology": {"ep_size": ep_size}}), runtime)
        found[variant] = (result.digest, result.scores())
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def single(root: Path) -> dict[str, Result]:
    return {variant: run_alone(variant_config(root, variant, "1-1", ALL_AT_ONCE)) for variant in VARIANTS}


def test_methods_differ(single: dict[str, Result]) -> None:
    assert len({result.digest for result in single.values()}) == len(VARIANTS)
    for variant, result in single.items():
        assert {event["status"] for event in result.events if event["event"] == "client"} == {"ok"}, variant
        before, *_, after = (event["loss"] for event in result.events if event["event"] == "eval" and event["tier"] == 8)
        assert before != after, variant


def test_what_clients_do_differs_by_tier(single: dict[str, Result]) -> None:
    """The table of budgets: k active experts, r LoRA rows; the same tier buys the one or the other."""

    def bought(variant: str) -> dict[int, set[tuple[int, int | None]]]:
        clients: dict[int, set[tuple[int, int | None]]] = {}
        for event in single[variant].events:
            if event["event"] == "client":
                clients.setdefault(event["top_k"], set()).add((event["active_experts"], event["rank"]))
        return clients

    assert bought("flame") == bought("fedit") == {8: {(8, None)}, 4: {(4, None)}, 1: {(1, None)}}
    assert bought("flexlora") == bought("flora") == {8: {(8, None)}, 4: {(8, 2)}, 1: {(8, 1)}}
    assert bought("fslora") == bought("flora")
    assert bought("fedyogi") == {8: {(8, None)}, 4: {(4, 2)}, 1: {(1, 1)}}
    assert bought("hfedmoe") == {tier: {(8, None)} for tier in (8, 4, 1)}
    assert bought("centralised") == {8: {(8, None)}}


def test_one_client_at_a_time(root: Path, single: dict[str, Result]) -> None:
    """Waves of one, in another order than that of the participants."""
    for variant, result in single.items():
        alone = run_alone(variant_config(root, variant, "waves", {"execution": {"clients_in_flight": 1}}))
        assert alone.digest == result.digest, variant
        assert alone.scores() == result.scores(), variant


def test_fast_mode_agrees(root: Path, single: dict[str, Result]) -> None:
    """Batched across clients: factors of the LoRA scale, unequal rows, held-back and whole experts; equal predictions."""
    for variant in ("fslora", "hetlora", "hfedmoe", "hfedmoe-full", "scaffold"):
        result = single[variant]
        fast = run_alone(variant_config(root, variant, "fast", ALL_AT_ONCE, {"execution": {"reproducible": "fast"}}))
        for ours, theirs in zip(fast.scores(), result.scores(), strict=True):
            assert ours[:4] == theirs[:4]
            assert ours[4] == pytest.approx(theirs[4], rel=1e-4), (variant, ours, theirs)


@pytest.mark.parametrize(("world_size", "ep_size"), [(2, 2), (2, 1), pytest.param(4, 2, marks=pytest.mark.cluster)])
def test_topologies(root: Path, single: dict[str, Result], world_size: int, ep_size: int) -> None:
    for found in run_distributed(work, world_size, root, ep_size, timeout_s=540.0):
        for variant, result in single.items():
            digest, scores = found[variant]
            assert digest == result.digest, variant
            assert scores == result.scores(), variant
