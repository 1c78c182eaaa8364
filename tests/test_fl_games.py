"""FL Games, exactly: the form equals a loop over players; one player is gradient descent; where players disagree, a box
leads the mean to zero; heads and adapters take turns; what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import DIGITS, write_dense
from every import every
from federations import Result, alone, build, finish, make_config, own_values, run_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_games import Player, play

from fedmoe_ds.clients.batches import local_batches
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.run_spec import check_start
from fedmoe_ds.methods.fl_games import _in_box, _moved
from fedmoe_ds.model.adapter_bank import HEAD, HEAD_BIAS
from fedmoe_ds.model.batch import Rows

ROUNDS = 3
SMALL: dict[str, Any] = {
    "adapters": {"attention": [], "head": "train"},
    "data": {**DIGITS, "partition": {"kind": "dirichlet", "clients": 3, "alpha": 0.5, "column": None}},
    "federation": {"rounds": ROUNDS, "participation": 1.0, "tiers": None},
    "local": {"optimizer": "sgd", "lr": 4.0, "clip": None, "max_steps": 2},
    "execution": {"micro_batch_size": None},
    "evaluation": {"max_sequences": 4, "client_sequences": 0},
}
# Wider than what the foundation's head has, so that it binds where a step leads out of it and nowhere else.
GAMES: dict[str, dict[str, Any]] = {
    "parallel": {"box": None},
    "box": {"box": 0.8},
    "smooth": {"buffer": 2, "box": None},
    "smooth-box": {"buffer": 2, "box": 0.8},
    "terms": {"buffer": 2, "box": 0.8, "smooth": "terms"},
    "sequential": {"play": "sequential", "box": 0.8},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("games")
    write_dense(folder, ("vit",))
    return folder


def config_of(root: Path, name: str, *changes: dict[str, Any]) -> Config:
    return make_config(root, name, SMALL, {"foundation": {"path": str(root / "vit")}}, *changes)


def game(**params: Any) -> dict[str, Any]:
    return {"method": {"name": "fl-games", **params}}


def players_of(parts: Parts) -> list[Player]:
    """The clients, with what the head reads of their samples."""
    model, found = parts.trainer.model, []
    head = torch.cat([parts.state.adapters.value(HEAD, -1)[0], parts.state.adapters.value(HEAD_BIAS, -1)[0][:, None]], 1)
    for client in parts.clients:
        data = parts.training_data.train(client.index)
        batch = model.batch([Rows.of(0, 1, data, range(len(data)), images=parts.spec.images)])
        with torch.no_grad():
            hidden_ND = batch.predicting(model._hidden(batch, None, None)[0]).double()
        features = torch.cat([hidden_ND, torch.ones(len(hidden_ND), 1)], 1).numpy()
        found.append(Player(features, batch.labels_N.numpy(), head.double().numpy()))
    return found


@pytest.mark.parametrize("kind", GAMES)
def test_the_form_equals_the_loop_over_players(root: Path, kind: str) -> None:
    params = GAMES[kind]
    parts, journal = build(config_of(root, f"game-{kind}", game(**params)), *alone())
    players, local, box = players_of(parts), parts.config.local, params["box"]
    first_VD = players[0].head_VD
    for player in players:
        player.past = [player.head_VD] * params.get("buffer", 0)
    for index in range(1, ROUNDS + 1):
        batches = [local_batches(client, local, parts.config.seed, index) for client in parts.clients]
        how = params.get("smooth", "players")
        who = [(index - 1) % 3] if "play" in params else [0, 1, 2]
        mean_VD = play(players, who, batches, local.lr, box, how)
    result = finish(parts, journal)
    assert abs(head_of(result) - mean_VD).max() < 1e-5 < 0.1 < abs(mean_VD - first_VD).max()
    for own_VD, player in zip(heads_of(parts), players, strict=True):
        assert abs(own_VD - player.head_VD).max() < 1e-5
    # The box binds, and not from the beginning.
    assert box is None or (abs(first_VD).max() < box and every((abs(player.head_VD) == box).any() for player in players))


def head_of(result: Result) -> np.ndarray:
    """[V, D + 1]: the mean of all heads."""
    return np.concatenate([result.adapters[f"model.{HEAD}"], result.adapters[f"model.{HEAD_BIAS}"][:, None]], 1)


def heads_of(parts: Parts) -> list[np.ndarray]:
    """[V, D + 1]: the head of every client."""
    own = own_values(parts)
    both = zip(own["head.own.weight"][:, 0], own["head.own.bias"][:, 0], strict=True)
    return [torch.cat([weight, bias[:, None]], 1).double().numpy() for weight, bias in both]


def test_a_single_player_takes_gradient_steps(root: Path) -> None:
    one = {"data": {"partition": {"clients": 1}}, "federation": {"rounds": 2}}
    ours = run_alone(config_of(root, "one", game(buffer=2, box=None), one))
    plain = run_alone(config_of(root, "one-plain", {"method": {"name": "fedit"}}, one))
    assert abs(head_of(ours) - head_of(plain)).max() < 1e-6


def test_variants_take_turns(root: Path) -> None:
    """With adapters, heads play in odd rounds and adapters move in even ones; neither moves the other by a bit."""
    both = {"adapters": {"attention": ["q_proj"], "head": "train"}}

    def after(rounds: int) -> Result:
        return run_alone(config_of(root, f"turns-{rounds}", game(buffer=1), both, {"federation": {"rounds": rounds}}))

    one, two, three = (after(rounds).adapters for rounds in (1, 2, 3))
    heads = {key for key in one if key.startswith("model.head")}
    assert len(heads) == 2 < len(one)
    same_12 = {key for key in one if one[key].tobytes() == two[key].tobytes()}
    same_23 = {key for key in one if two[key].tobytes() == three[key].tobytes()}
    assert heads == same_12 and same_23 == set(one) - heads


def test_adapters_move_by_the_mean_of_their_changes(root: Path) -> None:
    both = {"adapters": {"attention": ["q_proj"], "head": "train"}, "federation": {"rounds": 2}}
    parts, journal = build(config_of(root, "equal", game(), both), *alone())
    seen: list[dict[str, torch.Tensor]] = []

    def look(view: ClientView, update: ClientUpdate) -> None:
        change = {s.name: view.value(s).double() - view.received(s).double() for s in view.blocks() if not s.after_layers}
        seen.append(change)

    first = {name: parts.state.adapters.client(name, 0).clone() for name in parts.state.adapters.specs}
    finish(parts, journal, look)
    assert len(seen) == 6
    for name in ("attention.q_proj.lora_A", "attention.q_proj.lora_B"):
        moved = parts.state.adapters.client(name, 0).double() - first[name].double()
        assert torch.allclose(moved, sum(change[name] for change in seen) / 3, atol=1e-6)
    assert bool(moved.any())


def quarters(most: int) -> st.SearchStrategy[float]:
    """Numbers in [-most, most] that differ by enough for players to get to their bounds soon."""
    return st.integers(-4 * most, 4 * most).map(lambda count: count / 4)


@settings(max_examples=25, deadline=None)
@given(st.tuples(quarters(4), quarters(4)))
def test_two_players_who_disagree_drop_the_feature(optima: tuple[float, float]) -> None:
    """Losses (m - c_k)^2 / 2 of the mean m, one after the other: m ends at 0, clipped to between the optima."""
    assert settled(optima) == pytest.approx(float(np.clip(0.0, min(optima), max(optima))), abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.lists(quarters(1), min_size=3, max_size=3))
def test_three_players_meet_at_the_median(optima: list[float]) -> None:
    """Where the box does not bind for the middle one: of an odd number, those at both ends cancel out."""
    assert settled(optima) == pytest.approx(float(np.median(optima)), abs=1e-4)


def settled(optima: Sequence[float], box: float = 5.0) -> float:
    """The mean once nobody moves any more: best responses by steps of the form, to convergence."""
    terms = len(optima)
    own = [torch.zeros(1) for _ in optima]
    mean = torch.zeros(1)
    for _ in range(200):
        before = torch.stack(own)
        for k, optimum in enumerate(optima):
            # A step at rate 1 of the mean gets to the optimum, or as far as the box of the player lets it.
            trained = _in_box(own[k], mean, torch.full((1,), optimum), terms, box)
            own[k], mean = _moved(own[k], mean, trained, terms, box), trained
        if torch.equal(torch.stack(own), before):
            break
    else:
        pytest.fail("they still move")
    assert every(abs(float(one)) <= box for one in own)
    return float(mean)


def test_the_box_leaves_what_is_in_it() -> None:
    own, start = torch.tensor([0.1, 0.9]), torch.tensor([0.3, 0.7])
    trained = torch.tensor([0.30000001, 0.9])
    kept = _in_box(own, start, trained, 3, 1.0)
    assert kept[0] == trained[0] and _moved(own, start, kept, 3, 1.0)[1] == 1.0
    assert float(own[1] + 3 * (kept[1] - start[1])) == pytest.approx(1.0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "head": ({"adapters": {"head": "frozen", "attention": ["q_proj"]}}, "adapters.head: frozen: the players"),
    "some": ({"federation": {"participation": 0.5}}, "federation.participation: 0.5: method fl-games is a game of all"),
    "adam": ({"local": {"optimizer": "adamw"}}, "local.optimizer: adamw: "),
    "clip": ({"local": {"clip": 1.0}}, "local.clip: 1.0: .*use null"),
    "decay": ({"local": {"weight_decay": 0.1}}, "local.weight_decay: 0.1: .*use 0.0"),
    "drift": ({"local": {"drift": "fedprox"}}, "local.drift: fedprox: "),
    "server": ({"server": {"lr": 0.5}}, "server.lr: 0.5: the model of method fl-games"),
    "adaptive": ({"server": {"optimizer": "fedadam"}}, "server.optimizer: fedadam: the model"),
    "training": ({"server": {"training": {}}, "data": {"public": 0.2}}, "server.training: the model of method fl-games"),
    "devices": ({"devices": {"mix": {"laptop": 1.0}}}, "devices: some of them may be off"),
    "idle": ({"method": {"play": "sequential", "buffer": 2}}, "method.buffer: 2: has no effect with method.play=sequential"),
    "unread": ({"method": {"smooth": "terms"}}, "method.smooth: terms: has no effect with method.buffer=0"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(root: Path, kind: str) -> None:
    change, message = REFUSED[kind]
    with pytest.raises(UserError, match=message):
        check_start(config_of(root, f"refused-{kind}", game(), change), "cpu")
