"""FedMox: its rounds in float64, what clients without labels cannot see, the gate, the server's own training, refusals.

Legend: N images, T token rows, E experts, K top-k.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import dense_config, write_dense
from every import every
from federations import Result, alone, build, finish, make_config, run_alone, write_inputs
from method_variants import IMAGES
from pydantic import ValidationError
from reference_dense import Settings, Task
from reference_fedmox import FedMox, Rule
from reference_inputs import check_equal, initial
from test_methods_resume import start
from test_reference_fft_moe import EPS, samples_of, tasks

from fedmoe_ds.clients.batches import local_batches
from fedmoe_ds.config import Config
from fedmoe_ds.data import digits
from fedmoe_ds.data.preparation import assemble_images
from fedmoe_ds.data.sequences import fingerprint
from fedmoe_ds.errors import UserError
from fedmoe_ds.export.card import card
from fedmoe_ds.export.written import Request, Written
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.federation.server_training import server_client
from fedmoe_ds.methods import method_for
from fedmoe_ds.model.adapter_moe_layer import SelectedSoftmax
from fedmoe_ds.model.router import route
from fedmoe_ds.results import open_run

pytestmark = pytest.mark.timeout(600)

SHORT: dict[str, Any] = {
    "federation": {"rounds": 1, "participation": 0.8},
    "local": {"max_steps": 2, "eps": EPS},
    "evaluation": {"max_sequences": 4, "client_sequences": 1, "every": 9},
    "data": {"partition": {"kind": "iid"}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fedmox")
    write_dense(folder, ("vit",))
    return folder


def config_of(root: Path, name: str, *changes: dict[str, Any]) -> Config:
    return dense_config(root, "vit", f"fedmox-{name}", IMAGES["fedmox"], SHORT, *changes)


def result(root: Path, name: str, *changes: dict[str, Any]) -> Result:
    return run_alone(config_of(root, name, *changes))


@pytest.fixture(scope="module")
def plain(root: Path) -> Result:
    return result(root, "plain")


def losses(found: Result) -> list[float]:
    return [event["loss_first"] for event in found.events if event["event"] == "client"]


# Rounds


def public_task(parts: Parts, round_index: int, epochs: float) -> Task:
    told = parts.config.local.model_copy(update={"epochs": epochs, "max_steps": None})
    client, samples = server_client(parts.clients, parts.data, 1), samples_of(parts.data.train(len(parts.clients)))
    batches = local_batches(client, told, parts.config.seed, round_index)
    return Task(client.index, 1, client.samples, [[samples[i] for i in batch] for batch in batches])


def test_same_rounds(root: Path) -> None:
    parts, journal = build(
        config_of(root, "rounds", {"seed": 1, "federation": {"rounds": 2}, "data": {"partition": {"clients": 3}}}), *alone()
    )
    config, training = parts.config, parts.config.server.training
    assert training is not None and len(parts.participants(1)) == 2
    local = config.local
    told = Settings(experts=4, top_k=1, auxiliary="none", lr=local.lr, eps=EPS, clip=local.clip)
    rule = Rule(0.2, 4.0, 1.0 - config.server.lr, training.lr)
    expected = FedMox(root / "vit", told, initial(parts), rule=rule)
    expected.serve(public_task(parts, 0, training.warm_up))
    for round_index in (1, 2):
        expected.mixed(tasks(parts, round_index), public_task(parts, round_index, training.epochs))
    assert expected.margin > 1e-6, "too near to a tie, or to the threshold, for a comparison"
    assert expected.taught > 3 and expected.untaught > 3
    found = finish(parts, journal)
    check_equal(expected.adapters, {key: torch.from_numpy(value) for key, value in found.adapters.items()})
    assert parts.state.utilisation_LE is not None and (parts.state.utilisation_LE == expected.used).all()


def test_the_record_tells_the_server_s_losses(plain: Result) -> None:
    (warmed,) = (event for event in plain.events if event["event"] == "warm_up")
    rounds = [event for event in plain.events if event["event"] == "round"]
    assert warmed["server_steps"] > rounds[0]["server_steps"] > 0
    told = [event[key] for event in (warmed, *rounds) for key in ("server_loss_first", "server_loss_last")]
    assert every(np.isfinite(loss) and loss > 0 for loss in told) and {event["server_status"] for event in rounds} == {"ok"}
    first = next(event["round"] for event in plain.events if event["event"] in ("eval", "warm_up") and "round" in event)
    assert first == 0, "the evaluation before round 1 is that of the warmed-up model"
    run = open_run(plain.parts.checkpoints.parent)
    said = card(Request(run, run.select(), run.folder / "out", "base"), Written("transformers", "", ""))
    assert "|  | after the server's warm-up | trained |" in said


# What is the same as something simpler, to the bit


def test_nothing_comes_of_clients_that_are_sure_of_nothing_or_count_nothing(root: Path, plain: Result) -> None:
    """A threshold above 1, and alpha = 1 with other clients: what the server alone makes."""
    unsure = result(root, "unsure", {"method": {"threshold": 1.5}})
    assert set(losses(unsure)) == {0.0} and max(losses(plain)) > 0.0
    alone_ = result(root, "alpha", {"server": {"lr": 0.0}}, {"federation": {"participation": 1.0}})
    assert alone_.digest == unsure.digest != plain.digest and max(losses(alone_)) > 0.0


def test_labels_of_clients_change_no_bit(root: Path, plain: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permuted labels of what clients train on: the same data are stored, and the run is the same; shown, they would count."""
    pretraining, images = digits.split()
    data = plain.parts.config.data
    prepared = assemble_images(images, data, 0)
    train = np.concatenate([prepared.owned[2 * client] for client in range(len(prepared.names))])
    permuted_N = images.labels_N.copy()
    permuted_N[train] = np.random.default_rng(0).permutation(permuted_N[train])
    assert (permuted_N != images.labels_N).mean() > 0.1
    permuted = digits.Images(images.pixels_NCHW, permuted_N)
    shown = [assemble_images(one, data.model_copy(update={"labels": "shown"}), 0) for one in (images, permuted)]
    assert len({fingerprint(one.content, one.owned) for one in shown}) == 2
    monkeypatch.setattr(digits, "split", lambda: (pretraining, permuted))
    hidden = result(root, "permuted")
    assert hidden.parts.data.path != plain.parts.data.path
    assert (hidden.digest, hidden.scores()) == (plain.digest, plain.scores())
    assert hidden.parts.data.fingerprint == plain.parts.data.fingerprint
    for client in range(len(plain.parts.clients)):
        labels_N = plain.parts.data.train(client).labels
        assert labels_N is not None and not labels_N.any()
    held_N = plain.parts.data.global_holdout().labels
    assert held_N is not None and len(set(held_N.tolist())) > 5, "an evaluation knows them"


def test_one_expert_is_a_plain_adapter(root: Path) -> None:
    one: dict[str, Any] = {"adapters": {"moe": {"experts": 1}}}
    gates = [result(root, gate, one, {"adapters": {"moe": {"gate": gate}}}).digest for gate in ("straight-through", "softmax")]
    assert gates[0] == gates[1]


def test_shown_labels_without_the_server_are_fedavg(root: Path) -> None:
    labelled: dict[str, Any] = {"data": {"labels": "shown"}, "server": {"lr": 1.0, "training": {"epochs": 0.0, "warm_up": 0.0}}}
    params = {"method": {"threshold": 0.9}}
    ours = result(root, "ours", labelled, params)
    config = config_of(root, "theirs", labelled, params)
    theirs = run_alone(config.model_copy(update={"method": type(config.method)(name="fedit")}))
    assert ours.digest == theirs.digest and ours.scores() == theirs.scores()
    assert not [event for event in ours.events if event["event"] == "warm_up" or "server_steps" in event], "it does nothing"


# The gate


def test_the_gate_is_one_and_teaches_the_router() -> None:
    logits_TE = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rule, cap_T, valid_T = SelectedSoftmax(5, 1), torch.ones(7, dtype=torch.int64), torch.arange(7) < 6
    hard = route(logits_TE, rule, cap_T, valid_T)
    through = route(logits_TE, rule, cap_T, valid_T, straight_through=True)
    assert torch.equal(hard.weights_TK, through.weights_TK) and torch.equal(hard.experts_TK, through.experts_TK)
    assert through.weights_TK[:6].eq(1.0).all() and not through.weights_TK[6].any(), "padding weighs nothing"
    (nothing_TE,) = torch.autograd.grad(hard.weights_TK.sum(), logits_TE, retain_graph=True)
    (grad_TE,) = torch.autograd.grad(through.weights_TK.sum(), logits_TE, retain_graph=True)
    best_TE = torch.nn.functional.one_hot(through.experts_TK[:, 0], 5)
    assert float(nothing_TE.abs().max()) < 1e-6
    assert torch.allclose(grad_TE[:6], (best_TE - logits_TE.softmax(-1))[:6], atol=1e-6), "that of log p"
    assert not grad_TE[6].any()


def test_a_probability_that_underflows_is_no_division_by_zero() -> None:
    logits_TE = torch.tensor([[0.0, 200.0]], requires_grad=True)
    allowed_TE = torch.tensor([[True, False]])
    one = torch.ones(1, dtype=torch.int64)
    routing = route(logits_TE, SelectedSoftmax(2, 1), one, one > 0, allowed_TE, straight_through=True)
    routing.weights_TK.sum().backward()  # type: ignore[no-untyped-call]
    assert routing.weights_TK.item() == 1.0 and logits_TE.grad is not None and logits_TE.grad.tolist() == [[1.0, -1.0]]


# A start that is stopped before its first round


def test_a_stop_before_the_first_round_warms_up_again(root: Path, plain: Result) -> None:
    parts, journal = start(config_of(root, "early"), *alone(), "never")
    parts.stop.name = "SIGTERM"
    assert Federation(parts, journal).run().interrupted == "SIGTERM"
    journal.close()
    again = finish(*start(config_of(root, "early"), *alone(), "auto"))
    assert again.digest == plain.digest and again.scores() == plain.scores()


# Refusals

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "labels": ({"method": {"name": "fft-moe"}}, r"data\.labels: hidden: method fft-moe trains clients on labels; use shown"),
    "idle": (
        {"data": {"labels": "shown"}, "method": {"threshold": 0.5}},
        r"method\.threshold: 0\.5: has no effect with data\.labels=shown",
    ),
}
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "gate": ({"adapters": {"moe": {"top_k": 2}}}, r"adapters\.moe\.gate: straight-through: weighs one expert per row"),
    "nobody trains": ({"server": {"training": None}}, r"data\.public: 0\.05: only the server would have these samples"),
    "nothing to train on": ({"data": {"public": 0.0}}, r"server\.training: trains on the public split, and data\.public is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(root: Path, case: str) -> None:
    change, expected = REFUSED[case]
    config = config_of(root, "refused", change)
    if "name" in change.get("method", {}):
        config = config.model_copy(update={"method": type(config.method)(name=change["method"]["name"])})
    with pytest.raises(UserError, match=f"^{expected}"):
        method_for(config)


@pytest.mark.parametrize("case", INVALID)
def test_invalid(root: Path, case: str) -> None:
    change, expected = INVALID[case]
    with pytest.raises(ValidationError, match=expected):
        config_of(root, "invalid", change)


def test_a_step_of_zero_needs_the_server(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"server\.lr: 0\.0: the global adapters would never change"):
        make_config(tmp_path, "zero", {"server": {"lr": 0.0}})


@pytest.mark.parametrize("name", ["flame", "local-only", "centralised", "flex-moe"])
def test_the_server_trains_what_all_share(tmp_path: Path, name: str) -> None:
    own = {"method": {"name": name}, "adapters": {"router": "train"}, "data": {"public": 0.2}, "server": {"training": {}}}
    with pytest.raises(UserError, match=rf"^server\.training: method {name} has no one model of all clients"):
        method_for(make_config(tmp_path, "own", own))


def test_labels_of_text_are_its_tokens(tmp_path: Path) -> None:
    write_inputs(tmp_path, samples=(3,), num_hidden_layers=1)
    hidden = {"data": {"labels": "hidden"}, "method": {"name": "fedmox"}}
    with pytest.raises(UserError, match=r"^data\.labels: hidden: the labels of text are its own tokens"):
        build(make_config(tmp_path, "text", hidden), *alone())
