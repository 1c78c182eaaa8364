"""Runs of the two wireless systems as users see them: time and energy in the record, equal bits where nothing differs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
from every import every
from federations import make_config, run_alone, write_inputs

from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.run_spec import check_start
from fedmoe_ds.methods import Method, MethodInfo, PlanContext, RoundPlan, Spending, registry

QUICK: dict[str, Any] = {"evaluation": {"client_sequences": 0, "every": 1}, "federation": {"rounds": 3}}
RADIO = {"name": "wireless-fl", "channels": 2, "epochs": 2, "deadline_s": 0.25}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wireless")
    write_inputs(folder)
    return folder


def test_time_and_energy_are_recorded(root: Path) -> None:
    result = run_alone(make_config(root, "radio", QUICK, {"method": RADIO}))
    rounds = [event for event in result.events if event["event"] == "round"]
    clients = [event for event in result.events if event["event"] == "client"]
    assert len(clients) == 6 and every(math.isclose(c["compute_s"] + c["up_s"], 0.25) for c in clients)
    for number, event in enumerate(rounds, 1):
        assert math.isclose(event["virtual_s"], 0.25) and math.isclose(event["virtual_time"], 0.25 * number, rel_tol=1e-6)
        own = [client["joules"] for client in clients if client["round"] == number]
        assert event["joules"] == math.fsum(own) > 0
        assert math.isclose(event["joules_total"], sum(e["joules"] for e in rounds[:number]))
    scored = [event for event in result.events if event["event"] == "eval"]
    assert {e["joules_total"] for e in scored} == {0.0, *(event["joules_total"] for event in rounds)}


def test_a_round_that_nobody_can_take_part_in_changes_nothing(root: Path) -> None:
    result = run_alone(make_config(root, "nobody", QUICK, {"method": {**RADIO, "power_w": 1e-30}}))
    rounds = [event for event in result.events if event["event"] == "round"]
    assert every(event["participants"] == 0 and event["joules"] == event["virtual_s"] == 0.0 for event in rounds)
    assert len({event["loss"] for event in result.events if event["event"] == "eval" and event["tier"] == 8}) == 1


class Spends(Method):
    """Plans with everybody; `told` is what it says of their spending."""

    info = MethodInfo("Spends", "none", "nothing", "all", "all", "data size", "all of it")
    accounts = True
    told: ClassVar[dict[int, Spending]] = {}

    def plan(self, context: PlanContext) -> RoundPlan:
        return RoundPlan(context.drawn, spending=self.told)


ONE = Spending(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({0: ONE, 1: ONE}, r"plan says what \[0, 1\] spend, and accounts for \[0, 1, 2, 3, 4, 5\]; let both agree"),
        (dict.fromkeys(range(7), ONE), r"plan says what \[0, 1, 2, 3, 4, 5, 6\] spend, and accounts for \[0, 1, 2, 3, 4, 5\]"),
        (
            {**dict.fromkeys(range(6), ONE), 3: Spending(1.0, math.nan, 1.0)},
            "plan says that client 3 spends .*nan.*; give finite",
        ),
        ({**dict.fromkeys(range(6), ONE), 4: Spending(1.0, 1.0, -1.0)}, "plan says that client 4 spends .*-1.0.*; give finite"),
    ],
)
def test_everybody_who_takes_part_spends(
    root: Path, monkeypatch: pytest.MonkeyPatch, told: dict[int, Spending], message: str
) -> None:
    """The record is made of what they spend: a participant without would be missing in it."""
    monkeypatch.setattr(registry, "_method_class", lambda name: type("Told", (Spends,), {"told": told}))
    with pytest.raises(UserError, match=f"^method spends: {message}"):
        run_alone(make_config(root, "spends", QUICK, {"method": {"name": "spends"}}))


def test_without_room_and_noise_it_is_fedavg_to_the_bit(root: Path) -> None:
    fedit = run_alone(make_config(root, "fedit", QUICK, {"method": {"name": "fedit"}}))
    quiet = {"name": "ota-ffl", "epsilon": 0.0, "snr_db": None}
    assert run_alone(make_config(root, "quiet", QUICK, {"method": quiet})).digest == fedit.digest
    assert run_alone(make_config(root, "loud", QUICK, {"method": {**quiet, "snr_db": 40.0}})).digest != fedit.digest


def test_a_client_has_one_device(root: Path) -> None:
    config = make_config(root, "two", QUICK, {"method": RADIO, "devices": {"mix": {"phone-mid": 1.0}}})
    with pytest.raises(UserError, match=r"^devices: method wireless-fl plans with devices and a channel of its own"):
        check_start(config, "cpu")
