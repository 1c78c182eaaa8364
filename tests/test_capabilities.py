"""Every two capabilities of methods and modes of runs: together they have the bits of one client at a time, or one line says
why they do not go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from capabilities import CAPABILITIES, FEATURES, MODES, covering, method_of, pairs
from dense_inputs import write_dense
from every import every
from federations import alone, finish, make_config, run_alone, write_inputs
from test_methods_resume import StopsAfter, start

from fedmoe_ds.clients import local_training
from fedmoe_ds.config import Config
from fedmoe_ds.devices.work import span_of
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import run_spec
from fedmoe_ds.federation.device_check import check_devices
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.federation.run_spec import check_plan
from fedmoe_ds.methods import method_for, registry

SMALL: dict[str, Any] = {
    "method": {"name": "probe"},
    "adapters": {"attention": ["q_proj", "o_proj"], "router": "train"},
    "federation": {"tiers": [{"top_k": 2, "share": 1.0}, {"top_k": 1, "share": 1.0}]},
    "local": {"max_steps": 2, "batch_size": 3},
    "execution": {"micro_batch_size": None},
    "evaluation": {"max_sequences": 1, "client_sequences": 1},
}
MODEL: dict[str, Any] = {"hidden_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LATE = "start from adapters of past rounds"
OWN_ROUNDS = "method probe plans itself who takes part in a round; use synchronous or deadline"
OWN_CLOCK = "method probe plans with devices and a channel of its own"
NO_MEAN = "`combine` "
OLD_STATISTICS = "statistics of past rounds are not kept for late clients"
DUALS = "adds dual variables to a weighted mean of adapters"
REFUSED: dict[str, dict[str, str]] = {
    "spending": dict.fromkeys(("synchronous", "deadline", "buffered"), OWN_CLOCK),
    "plan": {"buffered": OWN_ROUNDS},
    "delay": {"scaffold": LATE, "feddyn": LATE, "factors": LATE, "buffered": "says itself how late its clients are"},
    "buffered": {"scaffold": LATE, "feddyn": LATE, "factors": LATE},
    "feddyn": dict.fromkeys(("changes", "shares", "elements", "after the mean"), DUALS),
    "factors": {
        **dict.fromkeys(("changes", "shares", "elements", "after the mean", "server rate", "own models"), NO_MEAN),
        **dict.fromkeys(("scaffold", "feddyn"), "changes what the adapters' coordinates mean"),
        "fedams": "has no mean of adapters whose change could be a gradient",
    },
    "balance": {"micro-batches": "weighs a whole step of 3 sequences at once", "groups": "have no router whose choice it"},
    "statistics": {"delay": OLD_STATISTICS, "buffered": "those of past rounds are not kept for updates that come late"},
    "survey": {
        "delay": OLD_STATISTICS,
        **dict.fromkeys(("rows", "own models"), "drop what clients have of their own"),
        **dict.fromkeys(("synchronous", "deadline", "buffered"), "no device has time for that"),
    },
    "ranks": {"router bias": "moves routers by how much experts are used, and these are not there to be used"},
    "attention": {"packing": "samples that lie end to end are attended to apart"},
    "server training": {"own models": "has no one model of all clients that the server could train"},
    "private": {
        **dict.fromkeys(("plan", "spending"), "its rounds are planned"),
        **dict.fromkeys(("memory", "statistics", "survey"), "clients tell the server more than their changes"),
        **dict.fromkeys(("gradient probe", "attention", "shares", "elements"), "its weights follow from clients' data"),
        **dict.fromkeys(("scaffold", "feddyn"), "sends clients' variables as well"),
        **dict.fromkeys(("synchronous", "deadline", "buffered"), "availability decides who takes part"),
        "changes": "its weights are those of changes",
        "router bias": "the server makes something of how clients' tokens are routed",
        "after the mean": "it changes the mean by a rule of its own",
        "server rate": "its server's rate follows from who takes part",
        "factors": "it collects clients' factors",
    },
}
"""By two features, what the line says that refuses them."""
REFUSALS = {frozenset((one, other)): line for one, others in REFUSED.items() for other, line in others.items()}
ROWS = covering([pair for pair in pairs() if pair not in REFUSALS])
QUICK = (1, 3, 5, 7)
"""What `make test` runs: all that methods ask for, planned rounds and devices among it. The rest: `make test-sweep`."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capabilities")
    write_dense(folder, ("llama",), (7, 6, 5, 4))
    write_inputs(folder, (7, 6, 5, 4), **MODEL)
    return folder


def config_of(root: Path, name: str, features: Sequence[str], *changes: dict[str, Any]) -> Config:
    # Ranks are experts beside a dense model, and groups are made of one.
    beside = {"foundation": {"path": str(root / "llama")}} if {"ranks", "groups"} & set(features) else {}
    return make_config(root, name, SMALL, beside, *(MODES[one] for one in features if one in MODES), *changes)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the method `probe` one with these capabilities."""
    return lambda features: monkeypatch.setattr(registry, "_method_class", lambda name: method_of(features))


def test_two_features_go_together_or_one_line_refuses_them(root: Path, probe: Any) -> None:
    found = {}
    for pair in pairs():
        probe(sorted(pair, key=FEATURES.index))
        try:
            config = config_of(root, "pair", sorted(pair))
            method = method_for(config)
            check_plan(config, bitwise=True)
            check_devices(config, method)
        except UserError as error:
            found[pair] = str(error)
    assert found.keys() == REFUSALS.keys(), [sorted(pair) for pair in found.keys() ^ REFUSALS.keys()]
    for pair, line in found.items():
        assert REFUSALS[pair] in line and len(line.splitlines()) == 1, (sorted(pair), line)


def test_rows_have_every_pair() -> None:
    there = {frozenset((one, other)) for row in ROWS for one in row for other in row if one != other}
    assert there == {pair for pair in pairs() if pair not in REFUSALS}


def check(root: Path, number: int, features: Sequence[str]) -> None:
    """All clients at once; and one at a time, stopped in the middle of the second round and resumed."""
    whole = run_alone(config_of(root, f"whole-{number}", features))
    config = config_of(root, f"single-{number}", features, {"execution": {"clients_in_flight": 1}})
    parts, journal = start(config, *alone(), "never")
    trained = [event for event in whole.events if event["event"] == "client" and event["steps"]]
    parts.training_data = StopsAfter(parts, sum(event["round"] == 1 for event in trained) + 1)
    outcome = Federation(parts, journal).run()
    journal.close()
    assert outcome.interrupted == "SIGTERM"
    single = finish(*start(config, *alone(), "auto"))
    assert single.digest == whole.digest, features
    assert single.scores() == whole.scores(), features
    assert len(whole.scores()) > 0 and any(event["status"] == "ok" for event in trained)


@pytest.mark.sweep
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_capability_changes_bits(root: Path, probe: Any, capability: str) -> None:
    """What the rows above put together is seen in a result: without it they would hold of anything."""
    found = set()
    for features in ([], [capability]):
        probe(features)
        name = f"with-{len(features)}-{capability.replace(' ', '-')}"
        found.add(run_alone(config_of(root, name, features, {"federation": {"rounds": 3}})).digest)
    assert len(found) == 2


def marked(number: int) -> Any:
    return number if number in QUICK else pytest.param(number, marks=pytest.mark.sweep)


@pytest.mark.parametrize("number", [marked(number) for number in range(len(ROWS))])
def test_together_they_have_the_bits_of_one_client_at_a_time(root: Path, probe: Any, number: int) -> None:
    probe(ROWS[number])
    check(root, number, ROWS[number])


def test_a_prefix_that_is_not_trained_costs_nothing_and_changes_nothing(
    root: Path, probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an objective, in packed passes whose layers are recomputed: the bits of a run that keeps all activations, and of
    one that goes back through all layers."""
    features = ["trained layers", "objective", "packing"]
    probe(features)
    kept = run_alone(config_of(root, "kept", features))
    again = run_alone(config_of(root, "again", [*features, "recomputed"]))
    monkeypatch.setattr(local_training, "first_trained", lambda works, bank: 0)
    through = run_alone(config_of(root, "through", [*features, "recomputed"], {"execution": {"clients_in_flight": 1}}))
    assert kept.digest == again.digest == through.digest and kept.scores() == again.scores() == through.scores()


def test_a_plan_says_how_long_clients_take_and_who_is_late(root: Path, probe: Any) -> None:
    """Of four that are asked it takes three, for a step or two, and the first two of them to arrive are trained."""
    features = ["plan", "deadline"]
    probe(features)
    result = run_alone(config_of(root, "late", features, {"devices": {"availability": "always"}}))
    rows = [event for event in result.events if event["event"] == "client"]
    clock = result.parts.clock
    assert clock is not None
    for number in (1, 2):
        own = {int(row["client"][-3:]): row for row in rows if row["round"] == number}
        assert sorted(row["status"] for row in own.values()) == ["late", "ok", "ok"]
        works = {index: clock.work(replace(result.parts.clients[index], steps=1 + index % 2)) for index in own}
        seconds = {index: span_of(clock.fleet[index].profile, work).total for index, work in works.items()}
        assert [own[index]["status"] for index in sorted(own, key=lambda index: seconds[index])] == ["ok", "ok", "late"]
        assert every(row["steps"] == (1 + index % 2 if row["status"] == "ok" else 0) for index, row in own.items())


@pytest.mark.parametrize("weights", ["changes", "shares", "elements"])
def test_weights_are_those_of_the_clients_that_arrive(
    root: Path, probe: Any, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """As if nobody else had been drawn: lost clients are in no sum, and in none that it is divided by."""
    probe([weights])
    once: dict[str, Any] = {"federation": {"rounds": 1}, "evaluation": {"client_sequences": 0}, "seed": 3}
    always = {"devices": {"dropout": 0.5, "availability": "always"}}
    some = run_alone(config_of(root, f"some-{weights}", [weights, "synchronous"], once, always))
    status = {event["client"]: event["status"] for event in some.events if event["event"] == "client"}
    arrived = {name for name, word in status.items() if word == "ok"}
    assert 0 < len(arrived) < len(status) == 4
    monkeypatch.setattr(run_spec, "participants", lambda clients, *rest: [one for one in clients if one.name in arrived])
    assert run_alone(config_of(root, f"alone-{weights}", [weights], once)).digest == some.digest
