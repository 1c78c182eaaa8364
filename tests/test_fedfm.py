"""FedFM: its matching losses, its anchors, and what its parameters turn into FedAvg.

Legend: N targets, C classes, D width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_inputs import dense_config, write_dense
from federations import alone, build, make_config, run_alone, write_inputs
from reference import Reference, Settings
from torch import Tensor

from fedmoe_ds.aggregation.averaged_statistics import STATISTICS
from fedmoe_ds.config.schema import MethodConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.methods import ModelFacts, Statistic, load_method, method_for
from fedmoe_ds.methods.fedfm import FedFM
from fedmoe_ds.testing import check_method

N, C, D = 11, 5, 7
LOSSES = ("contrastive", "squared")


def fedfm(**keys: Any) -> FedFM:
    method = load_method(MethodConfig.model_validate({"name": "fedfm", **keys}))
    assert isinstance(method, FedFM)
    method.facts = ModelFacts(1, 1, 1, 0, classes=C, width=D)
    return method


def given() -> tuple[Tensor, Tensor, Statistic]:
    """Features, labels, and anchors of all classes but one."""
    torch.manual_seed(3)
    known = torch.tensor([True, True, False, True, True])
    return torch.randn(N, D, requires_grad=True), torch.arange(N) % C, Statistic(torch.randn(C, D) * known[:, None], known)


@pytest.mark.parametrize("loss", LOSSES)
def test_matching_is_that_of_plain_loops(loss: str) -> None:
    hidden_ND, labels_N, anchors = given()
    total = 0.0
    for feature, label in zip(hidden_ND.double().tolist(), labels_N.tolist(), strict=True):
        if not anchors.known[label]:
            continue
        unit = [x / math.hypot(*feature) for x in feature]
        of_class = {c: anchors.value[c].double().tolist() for c in range(C) if anchors.known[c]}
        units = {c: [x / math.hypot(*anchor) for x in anchor] for c, anchor in of_class.items()}
        cosines = {c: sum(a * b for a, b in zip(unit, anchor, strict=True)) / 0.2 for c, anchor in units.items()}
        if loss == "contrastive":
            total += math.log(sum(map(math.exp, cosines.values()))) - cosines[label]
        else:
            total += sum((a - b) ** 2 for a, b in zip(unit, units[label], strict=True)) / D
    keys = {"temperature": 0.2} if loss == "contrastive" else {}
    assert float(fedfm(loss=loss, **keys)._matching(hidden_ND, labels_N, anchors).detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_matching_knows_directions_alone(loss: str) -> None:
    """Longer features have the same loss, so its gradient is at right angles to them; without an anchor there is none."""
    hidden_ND, labels_N, anchors = given()
    method = fedfm(loss=loss)
    found = method._matching(hidden_ND, labels_N, anchors)
    longer = method._matching(hidden_ND * 3.0, labels_N, Statistic(anchors.value * 0.5, anchors.known))
    torch.testing.assert_close(longer, found, rtol=1e-5, atol=1e-6)
    (grad_ND,) = torch.autograd.grad(found, hidden_ND)
    along_N = (F.normalize(grad_ND, dim=1) * F.normalize(hidden_ND.detach(), dim=1)).sum(1)
    assert float(along_N.abs().max()) < 1e-5
    matched_N = grad_ND.abs().sum(1) > 0
    assert torch.equal(matched_N, anchors.known[labels_N]) and bool(matched_N.any()) and bool(grad_ND.isfinite().all())


def test_a_feature_is_drawn_to_its_own_anchor_and_from_the_others() -> None:
    hidden_ND, labels_N, anchors = given()
    (grad_ND,) = torch.autograd.grad(fedfm()._matching(hidden_ND, labels_N, anchors), hidden_ND)
    moved_ND = (hidden_ND - 1e-3 * grad_ND).detach()

    def margin(x_ND: Tensor) -> Tensor:
        cosine_NC = F.normalize(x_ND, dim=1) @ F.normalize(anchors.value, dim=1).T
        own_N = cosine_NC.gather(1, labels_N[:, None])[:, 0]
        return own_N - cosine_NC.masked_fill(F.one_hot(labels_N, C).bool(), -torch.inf)[:, anchors.known].amax(1)

    known_N = anchors.known[labels_N]
    assert bool((margin(moved_ND) > margin(hidden_ND.detach()))[known_N].all())


# Runs

SHORT: dict[str, Any] = {
    "federation": {"rounds": 2},
    "local": {"max_steps": 2},
    "evaluation": {"max_sequences": 1, "client_sequences": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fedfm")
    write_dense(folder, ("vit",), samples=(9, 7, 5))
    write_inputs(folder, (9, 7, 5))
    return folder


def test_without_matching_it_is_fedavg_to_the_bit(root: Path) -> None:
    """In the rounds before there are anchors, too: features are then summed up, and nothing else happens."""
    runs = {
        name: run_alone(make_config(root, name, SHORT, {"method": method}))
        for name, method in {
            "plain": {"name": "fedit"},
            "off": {"name": "fedfm", "matching": 0.0},
            "matched": {"name": "fedfm"},
        }.items()
    }
    assert runs["off"].digest == runs["plain"].digest != runs["matched"].digest
    assert STATISTICS not in runs["off"].parts.state.server
    first = [
        run_alone(make_config(root, f"first-{i}", SHORT, {"federation": {"rounds": 1}}, {"method": method})).digest
        for i, method in enumerate(({"name": "fedit"}, {"name": "fedfm"}, {"name": "fedfm", "anchors": "survey"}))
    ]
    assert first[0] == first[1] == first[2]


def anchors_of(parts: Parts) -> Statistic:
    return parts.server.averaged.delivered(parts.state.server)["anchors"]


def test_a_survey_s_anchors_are_class_means_of_the_pooled_data(root: Path) -> None:
    """By the model that the last round has made, in float64, whoever has which samples; a token of nobody has none."""
    few: dict[str, Any] = {"federation": {"participation": 0.67}, "seed": 6}
    config = make_config(root, "survey", SHORT, few, {"method": {"name": "fedfm", "anchors": "survey"}})
    result = run_alone(config)
    parts, found = result.parts, anchors_of(result.parts)
    reference = Reference(root / "model", Settings(scale=2.0))
    adapters = {key: torch.from_numpy(value).double() for key, value in result.adapters.items()}
    reached: dict[int, list[Tensor]] = {}
    members = parts.participants(2)
    for client in members:
        data = parts.training_data.train(client.index)
        for ids, mask in zip(data.input_ids, data.loss_mask, strict=True):
            reference.start(adapters, torch.ones(1, dtype=torch.float64), client.cap)
            reference.features.clear()
            with torch.no_grad():
                _, labels = reference.predictions(ids, mask)
            for label, feature in zip(labels.tolist(), reference.features[0], strict=True):
                reached.setdefault(label, []).append(feature)
    assert reference.margin > 1e-6 and [client.index for client in members] == [1, 2]
    for label, features in reached.items():
        np.testing.assert_allclose(found.value[label].numpy(), torch.stack(features).mean(0).numpy(), atol=1e-5)
    assert set(reached) == set(found.known.nonzero().flatten().tolist())


def test_a_survey_does_not_depend_on_how_it_is_cut(root: Path) -> None:
    """Not on who trains or is evaluated together, and but for rounding not on how many samples pass at once."""
    change: dict[str, Any] = {"method": {"name": "fedfm", "anchors": "survey"}, "adapters": {"router": "train"}}
    one: dict[str, Any] = {"execution": {"clients_in_flight": 1}, "evaluation": {"batch_size": 5}}
    ways: list[dict[str, Any]] = [{}, one, {"execution": {"micro_batch_size": None}}]
    runs = [run_alone(make_config(root, f"cut-{i}", SHORT, change, way)) for i, way in enumerate(ways)]
    assert runs[0].digest == runs[1].digest
    first, second, third = (anchors_of(run.parts) for run in runs)
    assert torch.equal(first.value, second.value) and torch.equal(first.known, third.known)
    torch.testing.assert_close(third.value, first.value, rtol=1e-4, atol=1e-4)
    assert not torch.equal(third.value, first.value)


@pytest.mark.parametrize("anchors", ["stale", "survey"])
def test_classes_of_images_are_their_labels(root: Path, anchors: str) -> None:
    """Of plain adapters on a vision transformer: an anchor per digit. One that nobody has in a round keeps its bits."""
    moe = {"adapters": {"attention": [], "moe": {"experts": 1, "width": 8, "top_k": 1}}, "federation": {"tiers": None}}
    few: dict[str, Any] = {"federation": {"participation": 0.17}, "data": {"partition": {"alpha": 0.1}}}
    change: dict[str, Any] = {**SHORT, "local": {"max_steps": None, "epochs": 1, "batch_size": 4}}
    config = dense_config(root, "vit", anchors, change, moe, few)
    method = type(config.method)(name="fedfm", anchors=anchors)
    parts, journal = build(config.model_copy(update={"method": method}), *alone())
    federation, before, known, seen = Federation(parts, journal), torch.zeros(10, 32), set[int](), list[set[int]]()
    for round_index in (1, 2):
        assert not federation._round(round_index)
        labels = [parts.training_data.train(client.index).labels for client in parts.participants(round_index)]
        seen.append({int(label) for own in labels if own is not None for label in own})
        known |= seen[-1]
        found = anchors_of(parts)
        assert set(found.known.nonzero().flatten().tolist()) == known
        for c in range(10):
            assert torch.equal(found.value[c], before[c]) == (c not in seen[-1]), c
        before = found.value.clone()
    journal.close()
    assert seen[0] - seen[1] and len(known) < 10


@pytest.mark.cluster
def test_a_survey_is_a_method_like_any_other() -> None:
    """The same bits with two clients in flight, and after a stop in the middle of a round."""
    result = check_method(FedFM, {"anchors": "survey"}, ranks=1)
    assert result.digest is not None


def test_what_cannot_be_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"^method.first_round: 200: none of the 100 rounds would match any feature; use 100"):
        method_for(make_config(root, "late", {"method": {"name": "fedfm", "first_round": 200}, "federation": {"rounds": 100}}))
    method = fedfm()
    with pytest.raises(UserError, match=r"^method.name: fedfm: the model tells 50304 classes apart, .*; use a model"):
        method.check(ModelFacts(1, 1, 1, 0, classes=50304, width=2048))
    method.check(ModelFacts(1, 1, 1, 0, classes=4096, width=64))
