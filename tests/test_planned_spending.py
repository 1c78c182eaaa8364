"""Runs of the two wireless systems as users see them: time and energy in the record, equal bits where nothing differs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from every import every
from federations import make_config, run_alone, write_inputs

from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.run_spec import check_start

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


def test_without_room_and_noise_it_is_fedavg_to_the_bit(root: Path) -> None:
    fedit = run_alone(make_config(root, "fedit", QUICK, {"method": {"name": "fedit"}}))
    quiet = {"name": "ota-ffl", "epsilon": 0.0, "snr_db": None}
    assert run_alone(make_config(root, "quiet", QUICK, {"method": quiet})).digest == fedit.digest
    assert run_alone(make_config(root, "loud", QUICK, {"method": {**quiet, "snr_db": 40.0}})).digest != fedit.digest


def test_a_client_has_one_device(root: Path) -> None:
    config = make_config(root, "two", QUICK, {"method": RADIO, "devices": {"mix": {"phone-mid": 1.0}}})
    with pytest.raises(UserError, match=r"^devices: method wireless-fl plans with devices and a channel of its own"):
        check_start(config, "cpu")
