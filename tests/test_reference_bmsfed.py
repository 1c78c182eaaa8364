"""Rounds of BMSFed against the slow float64 reference in `reference_bmsfed.py`: choices, prototypes and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_inputs import dense_config, write_dense
from federations import alone, build, finish
from reference_bmsfed import BMSFedReference, plan
from reference_dense import Image, Settings
from reference_inputs import TOLERANCE, check_equal, initial
from test_reference_fft_moe import SGD, samples_of, tasks

from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.methods.bmsfed import FINGERPRINT, LIKENESS, PROTOTYPES

pytestmark = pytest.mark.timeout(600)

CONFIG: dict[str, Any] = {
    "seed": 1,
    "method": {"name": "bmsfed"},
    "adapters": {"moe": {"experts": 2, "top_k": 1}},
    "federation": {"rounds": 4, "participation": 0.7, "tiers": None},
    "local": {**SGD, "clip": 0.5, "max_steps": 3},
    "data": {"form": {"kind": "grey-and-colour"}, "max_samples": 12, "partition": {"min_samples": 4}},
    "evaluation": {"client_sequences": 0, "every": 4},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bmsfed")
    write_dense(folder, ("vit-rgb",))
    return folder


@pytest.mark.parametrize(("alpha", "threshold"), [(1.0, 1.0), (3.0, 1.02)])
def test_same_rounds(root: Path, alpha: float, threshold: float) -> None:
    method = {"method": {"alpha": alpha, "threshold": threshold}}
    parts, journal = build(dense_config(root, "vit-rgb", f"bmsfed-{alpha}", CONFIG, method), *alone())
    told = Settings(experts=2, top_k=1, auxiliary="none", **SGD, clip=0.5)
    expected = BMSFedReference(root / "vit-rgb", told, initial(parts), alpha=alpha, seed=1)
    samples = {client.index: client.samples for client in parts.clients}
    federation, kinds = Federation(parts, journal), set[tuple[int, ...]]()
    count = len(parts.participants(1))
    assert 2 <= count < len(parts.clients)
    for round_index in range(1, 5):
        chosen = plan(1, round_index, count, samples, expected.known, threshold)
        ours = parts.planning.of(round_index)
        assert ours.parts == chosen and [client.index for client in ours.participants] == sorted(chosen)
        kinds |= set(chosen.values())
        members = {task.index: task for client in parts.clients for task in tasks_of(parts, round_index, client)}
        expected.round_of([members[index] for index in sorted(chosen)], chosen)
        assert not federation._round(round_index)
        check(parts, expected)
    assert len(kinds) == 2, "some trained the weaker modality alone"
    journal.close()


def tasks_of(parts: Any, round_index: int, client: Any) -> Any:
    """What any client would train on in a round."""
    there = type("There", (), {})()
    there.participants = lambda index: [client]
    there.training_data, there.config = parts.training_data, parts.config
    return tasks(there, round_index)


def check(parts: Any, expected: BMSFedReference) -> None:
    items = parts.state.adapters.items(0)
    check_equal(expected.adapters, {key: value.clone() for key, _, value in items})
    memories = parts.state.personal.memories
    assert memories.keys() == expected.known.keys()
    for index, known in expected.known.items():
        ours = memories[index]
        assert ours[LIKENESS].tolist() == pytest.approx(known.likeness, rel=1e-4)
        wanted = torch.tensor(known.prints)
        assert float((torch.from_numpy(ours[FINGERPRINT]) - wanted).norm()) <= 1e-4 * float(wanted.norm())
    (statistics,) = [bank for name, bank in parts.state.server.items() if name == "statistics"]
    found = {key: value for key, _, value in statistics.items(0)}
    for (modality, label), value in expected.prototypes.items():
        own = found[f"keys.{modality * 10 + label}.{PROTOTYPES}"]
        assert torch.allclose(own.double(), value, rtol=TOLERANCE * 10, atol=TOLERANCE * 10)


def test_an_evaluation_is_of_both_and_of_each(root: Path) -> None:
    parts, journal = build(
        dense_config(root, "vit-rgb", "scored", CONFIG, {"federation": {"rounds": 1}, "evaluation": {"every": 1}}), *alone()
    )
    result = finish(parts, journal)
    told = Settings(experts=2, top_k=1, auxiliary="none", **SGD)
    adapters = {key: torch.from_numpy(value).double() for key, value in result.adapters.items()}
    expected = BMSFedReference(root / "vit-rgb", told, adapters, alpha=1.0, seed=1)
    held = samples_of(parts.data.global_holdout())[: parts.config.evaluation.max_sequences]
    loss, views = expected.evaluate_views([one for one in held if isinstance(one, Image)])
    after = [event for event in result.events if event["event"] == "eval"][-1]
    assert after["round"] == 1 and after["loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert [after["view_0"], after["view_1"]] == pytest.approx(views)
