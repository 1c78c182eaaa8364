"""A trained head: gradients equal autograd's, one per client in one pass; alone it needs nothing of the layers before it; what
a run with one evaluates, keeps and exports; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_inputs import DIGITS, write_dense
from every import every
from federations import Result, alone, build, make_config, run_alone
from torch import Tensor

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.identity import of_settings
from fedmoe_ds.federation.start_events import start_line
from fedmoe_ds.model.adapter_bank import HEAD, HEAD_BIAS
from fedmoe_ds.model.batch import Rows

ALONE: dict[str, Any] = {"adapters": {"attention": [], "head": "train"}}
BESIDE: dict[str, Any] = {"adapters": {"attention": ["q_proj"], "head": "train"}}
ZERO: dict[str, Any] = {"adapters": {"head_start": "zero"}}
COUNT = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    write_dense(folder, ("llama", "vit"))
    return folder


def config_of(root: Path, family: str, name: str, *changes: dict[str, Any]) -> Config:
    plain: dict[str, Any] = {
        "foundation": {"path": str(root / family)},
        "method": {"name": "fedit"},
        "federation": {"tiers": None},
        "execution": {"micro_batch_size": None},
        "local": {"max_steps": 2},
    }
    return make_config(root, f"{family}-{name}", plain, {"data": DIGITS} if family == "vit" else {}, *changes)


def parts_of(root: Path, family: str, name: str, *changes: dict[str, Any]) -> Parts:
    parts, journal = build(config_of(root, family, name, *changes), *alone())
    journal.close()
    return parts


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_gradients_of_two_clients_heads_in_one_pass(root: Path, family: str) -> None:
    parts = parts_of(root, family, "gradients", BESIDE)
    bank, model = parts.execution.bank, parts.trainer.model
    torch.manual_seed(1)
    for value in bank.values.values():
        value.normal_(std=0.3)
    assert (HEAD_BIAS in bank) == (family == "vit")
    bank.zero_grad()
    rows = [Rows.of(slot, 1, parts.training_data.train(slot), range(COUNT), images=parts.spec.images) for slot in range(2)]
    batch = model.batch(rows)
    model.loss(batch, None, batch.targets).sum.backward()
    hidden_BSD, _ = model._hidden(batch, None, None)
    hidden = torch.split(batch.predicting(hidden_BSD).detach(), batch.targets)
    labels = torch.split(batch.labels_N, batch.targets)
    read = model.read_out(batch, None)
    for slot in range(2):
        weight, bias = reference(bank.value(HEAD, -1)[slot], bank.value(HEAD_BIAS, -1)[slot] if HEAD_BIAS in bank else None)
        logits = F.linear(hidden[slot], weight, bias)
        head, own = read[slot]
        assert torch.allclose(head(own), logits, atol=1e-5), "what a client is taught is read out by its own head"
        F.cross_entropy(logits, labels[slot]).backward()
        assert torch.allclose(bank.grad(HEAD, -1)[slot], weight.grad, atol=1e-6)
        assert bias is None or torch.allclose(bank.grad(HEAD_BIAS, -1)[slot], bias.grad, atol=1e-6)
    # What is before the head has its gradient through the client's own.
    assert every(bool(bank.grads["attention.q_proj.lora_B"][:, slot].any()) for slot in range(2))


def reference(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.clone().requires_grad_(), None if bias is None else bias.clone().requires_grad_()


@pytest.fixture(scope="module")
def alone_run(root: Path) -> Result:
    return run_alone(config_of(root, "vit", "alone", ALONE, ZERO))


def test_a_head_alone_is_trained_from_zero(alone_run: Result) -> None:
    assert "; the whole head (no experts)" in start_line(alone_run.parts)
    keys = [f"model.{name}" for name in (HEAD, HEAD_BIAS)]
    assert sorted(alone_run.adapters) == sorted(keys)
    assert every(alone_run.adapters[key].any() for key in keys)
    losses = {
        event["round"]: event["loss"] for event in alone_run.events if event["event"] == "eval" and event["split"] == "global"
    }
    assert losses[0] == pytest.approx(np.log(10)), "all classes are alike to a head of zeros"
    assert losses[max(losses)] < losses[0]


def test_nothing_before_a_head_alone_has_a_gradient(root: Path) -> None:
    """Not on the way back, and not in what its training is predicted and counted to cost."""
    parts = parts_of(root, "vit", "no-backward", ALONE)
    rows = [Rows.of(0, 1, parts.training_data.train(0), range(COUNT), images=parts.spec.images)]
    batch = parts.trainer.model.batch(rows)
    hidden_BSD, _ = parts.trainer.model._hidden(batch, None, None)
    assert not hidden_BSD.requires_grad
    assert parts.trainer.model.loss(batch, None, batch.targets).sum.requires_grad
    cost = parts.spec.cost
    assert cost.head_weights == 2 * 10 * 32
    assert cost.spent(1, 0, 0, 4) == cost.dense + cost.head + cost.head_weights
    assert cost.spent(1, 0, 0, 4, trains_head=False) == cost.dense + cost.head


def test_a_client_that_is_told_not_to_leaves_its_head(root: Path) -> None:
    parts = parts_of(root, "vit", "told", BESIDE)
    told = Assignment(1, trains_head=False)
    assert told.trains(parts.execution.bank.specs[HEAD]) == np.zeros(1)
    assert told.trains(parts.execution.bank.specs["attention.q_proj.lora_A"]) is None
    nothing = Assignment(1, trained_N=np.zeros(2, dtype=bool))
    assert nothing.trains(parts.execution.bank.specs[HEAD]) is None and nothing.first_trained == 2


def test_a_start_from_a_head_is_taken_up_or_refused(root: Path, alone_run: Result) -> None:
    start = {"adapters": {"start": str(root / "runs" / "vit-alone")}}
    parts = parts_of(root, "vit", "goes-on", ALONE, start)
    for key, _, value in parts.state.adapters.items(0):
        assert value.numpy().tobytes() == alone_run.adapters[key].tobytes()
    with pytest.raises(UserError, match=r"has adapted head.*set adapters.head=train"):
        parts_of(root, "vit", "lost", {"adapters": {"attention": ["q_proj"]}}, start)


def test_what_it_begins_as_is_part_of_the_run(root: Path) -> None:
    one, other = (
        of_settings(json.loads(config_of(root, "vit", "identity", *changes).model_dump_json()))
        for changes in ([ALONE], [ALONE, ZERO])
    )
    assert one != other and one["adapters"]["head_start"] == "foundation"


def test_refusals(root: Path) -> None:
    with pytest.raises(ValueError, match=r"adapters.head_start: zero: a frozen head"):
        config_of(root, "vit", "no", ZERO)
    with pytest.raises(UserError, match=r"adapters.attention: \[\]: .*head=train"):
        parts_of(root, "vit", "no", {"adapters": {"attention": []}})
