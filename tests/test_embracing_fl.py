"""EmbracingFL, exactly: full depth is FedAvg, shallow clients leave the layers before theirs alone, and nothing is computed for
these; what FLOPs count; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every import every
from federations import Result, alone, build, finish, make_config, own_tensors, run_alone, write_inputs

from fedmoe_ds.clients import local_training
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.cost import CostModel
from fedmoe_ds.methods import method_for

DEPTH = 3
SMALL: dict[str, Any] = {
    "adapters": {"router": "train", "attention": ["q_proj", "o_proj"]},
    "federation": {"rounds": 1},
    "local": {"max_steps": 2, "weight_decay": 0.5},
    "evaluation": {"max_sequences": 1, "client_sequences": 0},
}


def tiers(*layers: int | None) -> dict[str, Any]:
    return {"federation": {"tiers": [{"layers": count, "share": 1.0} for count in layers]}}


EMBRACING: dict[str, Any] = {"method": {"name": "embracing-fl"}}
MIXED = (EMBRACING, tiers(3, 2, 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embracing-fl")
    write_inputs(folder, num_hidden_layers=DEPTH)
    return folder


@pytest.fixture(scope="module")
def mixed(root: Path) -> Result:
    return run_alone(make_config(root, "mixed", SMALL, *MIXED))


def initial(root: Path, name: str, *changes: dict[str, Any]) -> dict[str, np.ndarray]:
    parts, journal = build(make_config(root, name, SMALL, *changes), *alone())
    journal.close()
    return {key: value.numpy().copy() for key, _, value in parts.state.adapters.items(0)}


def layer(key: str) -> int:
    return int(key.split(".")[1])


def test_all_strong_is_fedavg_to_the_bit(root: Path) -> None:
    strong = run_alone(make_config(root, "strong", SMALL, EMBRACING, tiers(DEPTH, None)))
    whole = {"method": {"name": "fedit"}, "federation": {"tiers": [{"share": 1.0}]}}
    assert strong.digest == run_alone(make_config(root, "fedit", SMALL, whole)).digest


def test_layers_that_nobody_trains_keep_their_bits(root: Path) -> None:
    """Whatever moves weights: decay, and momentum at the server."""
    server = {"server": {"optimizer": "fedavgm"}, "federation": {"rounds": 2}}
    weak = run_alone(make_config(root, "weak", SMALL, EMBRACING, tiers(1), server))
    before = initial(root, "weak-start", EMBRACING, tiers(1))
    same = {key for key, value in before.items() if value.tobytes() == weak.adapters[key].tobytes()}
    assert {layer(key) for key in same} == {0, 1}
    assert every(key in same for key in before if layer(key) < DEPTH - 1)


def test_a_layer_is_the_mean_of_those_who_train_it(root: Path, mixed: Result) -> None:
    """With the clients of one depth alone, deeper layers come out alike, as others have no weight there."""
    events = [event for event in mixed.events if event["event"] == "client"]
    depth = {event["client"]: int(event["tier_label"].split("l")[1]) for event in events}
    assert sorted(set(depth.values())) == [1, 2, 3]
    before = initial(root, "mixed-start", *MIXED)
    changed = {layer(key) for key, value in before.items() if value.tobytes() != mixed.adapters[key].tobytes()}
    assert changed == {0, 1, 2}, "a layer that one client trains changes"
    parts, journal = build(make_config(root, "deep", SMALL, *MIXED), *alone())
    shares = {
        client.name: {spec.name: parts.spec.method.weights(spec, update(parts, client), 0.25) for spec in parts.spec.blocks}
        for client in parts.clients
    }
    journal.close()
    for name, weights in shares.items():
        for values in weights.values():
            wanted = [0.25 if index >= DEPTH - depth[name] else 0.0 for index in range(DEPTH)]
            assert np.array_equal(values.reshape(DEPTH, -1), np.tile(np.array(wanted)[:, None], (1, values[0].size)))


def update(parts: Any, client: Any) -> Any:
    """What a client reports, as far as weights ask."""
    from fedmoe_ds.clients.update import ClientUpdate
    from fedmoe_ds.methods import RoundContext

    counts = np.ones(parts.counts_shape, dtype=np.int64)
    return ClientUpdate(client, 0, 0, 1, 1, counts, True, assignment=parts.spec.method.assign(client, RoundContext(1, {})))


def test_the_prefix_runs_without_a_backward_pass(root: Path, mixed: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients are zero before anybody clears them where a pass has no deeper client; and the bits are those of a run that
    goes back through all layers and clears what comes out."""
    seen: dict[int, list[bool]] = {}
    clear = ClientView.clear_untrained

    def look(view: ClientView) -> None:
        for spec in view.blocks():
            for place, index in enumerate(spec.layers):
                seen.setdefault(index, []).append(bool((view.grad(spec)[place] == 0).all()))
        clear(view)

    monkeypatch.setattr(ClientView, "clear_untrained", look)
    run_alone(make_config(root, "looked-at", SMALL, EMBRACING, tiers(2)))
    assert every(seen[0]) and not all(seen[1]) and not all(seen[2])
    monkeypatch.setattr(local_training, "first_trained", lambda works, bank: 0)
    seen.clear()
    whole = run_alone(make_config(root, "whole", SMALL, *MIXED, {"execution": {"clients_in_flight": 1}}))
    assert not all(seen[0]), "this run has computed them"
    assert whole.digest == mixed.digest


def test_a_client_of_depth_one_is_a_client_of_that_one_layer(root: Path) -> None:
    """Clipping counts what it trains: the same step as one whose other gradients never were."""
    parts, journal = build(make_config(root, "one", SMALL, EMBRACING, tiers(1), {"local": {"clip": 1e-4}}), *alone())
    before = {key: value.clone() for key, _, value in parts.state.adapters.items(0)}
    result = finish(parts, journal)
    moved = {layer(key) for key, value in before.items() if not np.array_equal(value.numpy(), result.adapters[key])}
    assert moved == {DEPTH - 1}


def test_control_variates_of_other_layers_stay_zero(root: Path) -> None:
    """A shallow client knows nothing about the slope of layers that it does not train, whatever the server's c is there."""
    scaffold = {"local": {"optimizer": "sgd", "lr": 0.05, "drift": "scaffold"}, "federation": {"rounds": 2}}
    parts = run_alone(make_config(root, "scaffold", SMALL, *MIXED, scaffold)).parts
    depth = np.array([client.layers for client in parts.clients])
    controls = {key: value for key, value in own_tensors(parts).items() if ".control" in key}
    assert {layer(key) for key in controls} == {0, 1, 2}
    for key, value in controls.items():
        known_N = value.flatten(1).abs().amax(1).numpy() > 0
        assert not known_N[depth < DEPTH - layer(key)].any(), key
    assert any(value[depth == DEPTH].abs().max() > 0 for key, value in controls.items() if layer(key) == 0)


def test_flops_count_the_layers_that_are_trained(mixed: Result) -> None:
    spec = mixed.parts.spec
    rows = [event for event in mixed.events if event["event"] == "client"]
    by_depth: dict[int, list[float]] = {}
    for row in rows:
        by_depth.setdefault(int(row["tier_label"].split("l")[1]), []).append(row["flops"] / row["tokens"])
    means = [float(np.mean(by_depth[count])) for count in (1, 2, 3)]
    assert means == sorted(means) and len(set(means)) == 3
    cost, top_k, rank = spec.cost, spec.expert_layout.top_k, spec.config.adapters.rank
    whole = cost.spent(1, top_k * DEPTH, top_k * DEPTH, rank)
    assert whole == cost.spent(1, top_k * DEPTH, top_k * DEPTH, rank, DEPTH)
    assert means == pytest.approx([cost.spent(1, top_k * DEPTH, top_k * n, rank, n) for n in (1, 2, 3)], rel=1e-12)
    # By hand, without adapters: forward, and back through the head and one layer of two.
    assert CostModel(100.0, 0.0, head=40.0, depth=2).spent(1, 0, 0, 4, 1) == 100 + 40 + 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ({"method": {"name": "fedit"}}, tiers(2, 1)),
            r"^federation\.tiers\.0\.layers: 2: here a budget buys top_k, not layers",
        ),
        (
            (EMBRACING, tiers(2, 1), {"federation": {"budget": "top_k"}}),
            r"^federation\.tiers\.0\.layers: 2: here a budget buys",
        ),
        ((EMBRACING, {"federation": {"budget": "rank"}}), r"^federation\.budget: rank: method embracing-fl needs equal ranks"),
    ],
)
def test_what_is_refused(root: Path, changes: tuple[dict[str, Any], ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method_for(make_config(root, "refused", SMALL, *changes))
