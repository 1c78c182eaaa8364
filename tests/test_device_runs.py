"""Runs on simulated devices: time and energy are what reports and profiles say, on any topology, however often resumed."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every import every
from federations import Result, alone, build, finish, make_config, run_alone, write_inputs
from method_variants import DEVICES, variant_config
from reference import Adapters
from reference_inputs import check_equal, initial, tasks
from reference_methods import Late, Returned
from replay import Replay
from safetensors.numpy import load_file
from test_methods_resume import StopsAfter, start

from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.config import Config
from fedmoe_ds.devices import BUILTIN, Fleet
from fedmoe_ds.devices.work import Work, joules_of, span_of
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.federation.run_spec import check_start
from fedmoe_ds.federation.start_events import too_small
from fedmoe_ds.federation.virtual_clock import VirtualClock
from fedmoe_ds.model.adapter_bank import shared_blocks
from fedmoe_ds.report import write_report
from fedmoe_ds.report.device_time import device_section, reached, scored, targets
from fedmoe_ds.report.history import History
from fedmoe_ds.report.html import read_history
from fedmoe_ds.studies.compare.aggregate import Comparison
from fedmoe_ds.studies.compare.device_time import device_table, picture
from fedmoe_ds.studies.compare.record import Record
from fedmoe_ds.studies.compare.to_target import target_of

pytestmark = pytest.mark.timeout(600)
LONGER: dict[str, Any] = {"federation": {"rounds": 4}, "execution": {"clients_in_flight": 2}, "evaluation": {"every": 1}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    write_inputs(folder)
    return folder


def config_of(root: Path, variant: str, tag: str, *changes: dict[str, Any]) -> Config:
    return variant_config(root, variant, tag, LONGER, *changes)


@pytest.fixture(scope="module")
def straight(root: Path) -> dict[str, Result]:
    return {variant: run_alone(config_of(root, variant, "straight")) for variant in DEVICES}


def of_kind(result: Result, kind: str) -> list[dict[str, Any]]:
    return [event for event in result.events if event["event"] == kind]


TIMED = ("virtual_s", "virtual_time", "joules", "joules_total", "late", "lost", "stale", "down_bytes", "up_bytes")
OWN = ("client", "round", "status", "device", "virtual_s", "down_s", "compute_s", "up_s", "joules", "delay", "flops")


def told(result: Result) -> list[tuple[Any, ...]]:
    """All that a run says about devices, exact."""
    rounds = [tuple(event.get(key) for key in TIMED) for event in of_kind(result, "round")]
    clients = [tuple(event.get(key) for key in OWN) for event in of_kind(result, "client")]
    scores = [(event["loss"], event["virtual_time"], event["joules_total"]) for event in of_kind(result, "eval")]
    return [*rounds, *clients, *scores]


def test_without_devices_nothing_is_said_and_with_idle_ones_nothing_changes(root: Path, straight: dict[str, Result]) -> None:
    """Synchronous rounds on devices that are always on train the same clients to the same bits."""
    plain = run_alone(config_of(root, "fedit", "plain"))
    assert plain.digest == straight["devices"].digest and plain.scores() == straight["devices"].scores()
    keys = {key for event in plain.events if event["event"] != "run" for key in event}
    assert not keys & {*TIMED, "device"} and "devices" not in of_kind(plain, "run")[0]


def test_time_and_energy_are_those_of_what_was_counted(straight: dict[str, Result]) -> None:
    result = straight["devices"]
    parts, time, joules = result.parts, 0.0, 0.0
    layout = parts.spec.expert_layout
    numbers = sum(
        len(block.layers) * (layout.num_experts if block.expert else 1) * math.prod(block.item)
        for block in shared_blocks(parts.spec.blocks)
    )
    for event in of_kind(result, "round"):
        clients = [one for one in of_kind(result, "client") if one["round"] == event["round"]]
        for one in clients:
            profile, work = BUILTIN[one["device"]], Work(one["flops"], 4 * numbers, 4 * numbers)
            assert (one["down_bytes"], one["up_bytes"]) == (work.down_bytes, work.up_bytes)
            assert one["virtual_s"] == span_of(profile, work).total / 1e9 and one["joules"] == joules_of(profile, work)
            assert math.isclose(one["down_s"] + one["compute_s"] + one["up_s"], one["virtual_s"])
        assert event["virtual_s"] == max(one["virtual_s"] for one in clients)
        time, joules = time + event["virtual_s"], joules + math.fsum(one["joules"] for one in clients)
        assert math.isclose(event["virtual_time"], time) and math.isclose(event["joules_total"], joules)
        scores = [one for one in of_kind(result, "eval") if one["round"] == event["round"]]
        assert every(one["virtual_time"] == event["virtual_time"] for one in scores)
    assert of_kind(result, "run")[0]["devices"]["profiles"] == {"phone-mid": 3, "laptop": 3}


def test_the_start_counts_devices_that_cannot_hold_all_experts(root: Path, straight: dict[str, Result]) -> None:
    """Against the weights on disk: a byte less is too little, also where experts are most of them."""
    clock = straight["devices"].parts.clock
    assert clock is not None
    stored = [load_file(file) for file in sorted((root / "model").glob("*.safetensors"))]
    needed = sum(value.nbytes for tensors in stored for value in tensors.values())
    experts = sum(value.nbytes for tensors in stored for name, value in tensors.items() if ".experts." in name)
    assert experts > needed / 2
    profiles = [replace(BUILTIN["laptop"], name=str(size), memory_bytes=size) for size in (needed - 1, needed)]
    own = Fleet(profiles, np.array([0, 0, 1]), np.zeros(3, np.int64))
    told = too_small(VirtualClock(clock.spec, clock.clients, own, 3))
    assert told == f"; 2 of them have less memory than all weights of the model take ({needed / 2**30:.2f} GiB)"
    assert too_small(VirtualClock(clock.spec, clock.clients, Fleet(profiles[1:], np.zeros(3, np.int64), own.shift_N), 3)) == ""


def test_deadlines_leave_out_who_is_late(straight: dict[str, Result]) -> None:
    """Nobody trains in vain: who is left out has no steps, but time and energy."""
    result = straight["deadline"]
    rounds = of_kind(result, "round")
    assert sum(event["late"] + event["lost"] for event in rounds) > 3
    missed = [event for event in of_kind(result, "client") if event["status"] in ("late", "lost")]
    assert missed and every(event["steps"] == 0 and event["virtual_s"] >= 0 for event in missed)
    assert sum(event["joules"] for event in missed) > 0
    for event in rounds:
        taken = [one for one in of_kind(result, "client") if one["round"] == event["round"] and one["status"] == "ok"]
        assert 1 <= len(taken) <= 3 and event["dropped"] + len(taken) == event["participants"]


def test_clocks_of_devices_that_sleep(straight: dict[str, Result]) -> None:
    """The rounds wait for devices that are on, which takes hours."""
    rounds = of_kind(straight["nights"], "round")
    assert every(event["participants"] < 5 for event in rounds), "others are off"
    assert rounds[-1]["virtual_time"] > 0


def test_buffered_updates_are_late(straight: dict[str, Result]) -> None:
    """Whoever arrives in a step has begun so many steps before; the clock goes on from arrival to arrival."""
    for variant, buffer, most in (("buffered", 2, 3), ("buffered-adam", 3, 2)):
        result = straight[variant]
        taken = [event for event in of_kind(result, "client") if event["status"] == "ok"]
        assert every(0 <= event["delay"] <= min(most, event["round"] - 1) for event in taken)
        assert any(event["delay"] > 0 for event in taken), variant
        for event in of_kind(result, "round"):
            own = [one for one in taken if one["round"] == event["round"]]
            assert len(own) == buffer and event["mean_delay"] == sum(one["delay"] for one in own) / buffer
        times = [event["virtual_time"] for event in of_kind(result, "round")]
        assert times == sorted(times) and times[0] > 0


@pytest.mark.parametrize("variant", DEVICES)
def test_one_client_at_a_time(root: Path, straight: dict[str, Result], variant: str) -> None:
    waves = run_alone(config_of(root, variant, "waves", {"execution": {"clients_in_flight": 1}}))
    assert waves.digest == straight[variant].digest and told(waves) == told(straight[variant])


@pytest.mark.parametrize("variant", DEVICES)
def test_stopped_and_resumed(root: Path, straight: dict[str, Result], variant: str) -> None:
    """In the middle of round 3, by a signal, then killed after it: the clock is in every checkpoint."""
    config = config_of(root, variant, "stopped", {"execution": {"clients_in_flight": 1}})
    parts, journal = start(config, *alone(), "never")
    trained = [
        len([e for e in of_kind(straight[variant], "client") if e["round"] == r and e["status"] == "ok"]) for r in (1, 2, 3)
    ]
    parts.training_data = StopsAfter(parts, sum(trained[:2]) + 1)
    outcome = Federation(parts, journal).run()
    journal.close()
    assert outcome.interrupted == "SIGTERM"
    result = finish(*start(config, *alone(), "auto"))
    assert result.digest == straight[variant].digest and told(result) == told(straight[variant])
    # Back to the checkpoint of a whole round: what was recorded after it is trained again.
    folder = Path(config.output) / config.name / "checkpoints"
    shutil.rmtree(folder / "round-00004")
    again = finish(*start(config, *alone(), "auto"))
    assert again.digest == result.digest and told(again) == told(result)


def test_refusals(root: Path) -> None:
    mix = {"mix": {"laptop": 1.0}}
    for changes, message in (
        ({"method": {"name": "centralised"}, "devices": mix}, "devices: method centralised trains one client"),
        ({"devices": {"mix": {"tablet": 1.0}}}, "devices.mix.tablet: there is no such profile"),
        ({"method": {"name": "flora"}, "devices": {**mix, "aggregation": "buffered"}}, "buffered: clients start from .* flora"),
        ({"devices": {**mix, "aggregation": "buffered", "buffer": 7}}, "devices.buffer: 7: there are 6 clients"),
        ({"devices": {**mix, "aggregation": "deadline", "deadline_s": 1e-6}}, "devices.deadline_s: 1e-06: no device trains"),
    ):
        with pytest.raises(UserError, match=message):
            run_alone(make_config(root, "refused", changes))


def test_refusals_come_before_anything_is_loaded(root: Path) -> None:
    with pytest.raises(UserError, match="centralised"):
        check_start(make_config(root, "r", {"method": {"name": "centralised"}, "devices": {"mix": {"laptop": 1.0}}}), "cpu")


class Buffered(Late):
    """FedBuff: a change that is tau steps late counts 1 / sqrt(1 + tau)."""

    def step(self, returned: list[Returned], fresh: Adapters) -> None:
        for one in returned:
            tau = self.options["delay"](one.task.index, len(self.history))
            for key, received in one.received.items():
                if key in one.trained.adapters:
                    change = one.trained.adapters[key] - received
                    one.trained.adapters[key] = received + change / math.sqrt(1 + tau)
        super().step(returned, fresh)


def test_buffered_rounds_are_the_plain_ones(tmp_path: Path) -> None:
    """FedIT's mean of changes, each from its own start and weighed by its lateness, in plain loops in float64."""
    model = {"num_hidden_layers": 1, "num_experts": 8, "num_experts_per_tok": 4, "hidden_size": 16}
    write_inputs(tmp_path, (13, 9, 7, 5, 6), **model)
    small = {
        "method": {"name": "fedit"},
        "federation": {"rounds": 9, "tiers": [{"top_k": 4, "share": 1.0}]},
        "local": {"max_steps": 2, "batch_size": 2, "optimizer": "sgd", "lr": 0.5, "clip": 0.5},
        "execution": {"micro_batch_size": None, "clients_in_flight": 4},
        "evaluation": {"max_sequences": 1, "client_sequences": 0, "every": 9},
        "devices": {**DEVICES["buffered"]["devices"], "dropout": 0.0},
    }
    parts, journal = build(make_config(tmp_path, "plain", small), *alone())
    assert parts.clock is not None
    delays: dict[tuple[int, int], int] = {}
    replay: Any = Replay(parts, 0.5, 0.5)
    expected = Buffered(replay, initial(parts), [c.index for c in parts.clients], delay=lambda i, r: delays[i, r])
    federation = Federation(parts, journal)
    for round_index in range(1, 5):
        arrivals = parts.clock.select(parts.state.clock, round_index).arrivals
        delays |= {(flight.client, round_index): round_index - 1 - flight.version for flight in arrivals}
        todo = tasks(parts, round_index)
        replay.forget()
        assert not federation._round(round_index)
        expected.round(todo, {})
        check_equal(dict(expected.adapters), {key: value.double() for key, _, value in parts.state.adapters.items(0)})
    journal.close()
    assert len(set(delays.values())) > 1


def test_pages_say_when_a_target_was_reached(straight: dict[str, Result]) -> None:
    result = straight["buffered"]
    history = read_history(result.parts.checkpoints.parent)
    rows = scored(history, "8")
    assert [row["round"] for row in rows] == [0, 1, 2, 3, 4] and rows[0]["virtual_time"] == 0
    best = min(row["perplexity"] for row in rows)
    hit = reached(rows, "perplexity", best)
    assert hit is not None and hit["perplexity"] == best and reached(rows, "perplexity", best * 0.99) is None
    assert reached(rows, "accuracy", 0.0) == rows[0]
    assert [target for _, target in targets(history, rows)][-1] == pytest.approx(best)
    text = write_report(result.parts.checkpoints.parent).read_text()
    assert "Virtual time and energy" in text and "Time and energy to a target" in text and "phone-entry" in text
    assert device_section(History()) is None


def test_comparisons_say_how_long_each_takes_to_the_same_target(straight: dict[str, Result]) -> None:
    """The target of a seed is what all of its runs reach: the worst of their best."""
    records = []
    for label in ("devices", "buffered"):
        courses = {"8": scored(read_history(straight[label].parts.checkpoints.parent), "8")}
        records.append(Record(label, 0, label, "", {}, {"8": {}}, {"hold-outs": {}}, {}, courses=courses))
    comparison = Comparison(["devices", "buffered"], 1, records)
    bests = [min(row["perplexity"] for row in record.courses["8"]) for record in records]
    assert target_of(comparison, "8", 0, "perplexity") == max(bests)
    table = device_table(comparison, "8").splitlines()
    assert len(table) == 4 and every("1 of 1" in line for line in table[2:]) and "virtual time" in table[0]
    named = [replace(record, targets={"accuracy": 1.0}) for record in records]
    assert "0 of 1" in device_table(Comparison(["devices", "buffered"], 1, named), "8")
    assert "<svg" in picture(comparison)


def test_what_comes_down_is_what_the_round_before_has_kept(straight: dict[str, Result]) -> None:
    """FLoRIST's products, whatever rank a client has; before the first round there is none."""
    result, before = straight["thresholded"], 0
    assert result.parts.clock is not None
    whole = result.parts.clock.traffic.of(4)[1]  # all rows of all pairs
    for event in of_kind(result, "round"):
        trained = [one for one in of_kind(result, "client") if (one["round"], one["status"]) == (event["round"], "ok")]
        assert {one["down_bytes"] for one in trained} == {before} and event["down_bytes"] == before * len(trained)
        before = event["product_bytes"]
        assert event["product_rows"] > 0 and 0 < before < whole
    assert result.parts.clock.traffic.of(1)[0] == 4 * result.parts.state.sent_down == before
    others = [event for variant in DEVICES if variant != "thresholded" for event in of_kind(straight[variant], "round")]
    assert not any("product_rows" in event for event in others)


def test_traffic_is_what_the_assignment_says(straight: dict[str, Result]) -> None:
    clock = straight["devices"].parts.clock
    assert clock is not None
    layers, experts = straight["devices"].parts.counts_shape
    whole, dense = clock.traffic.of(4), clock.traffic.of(4, Assignment(8, allowed_LE=np.zeros((layers, experts), bool)))
    assert whole[0] == whole[1] and clock.traffic.of(2) == (whole[0] // 2, whole[1] // 2), "LoRA alone is trained"
    half = np.zeros((layers, experts), bool)
    half[:, ::2] = True
    allowed, trained = (clock.traffic.of(4, Assignment(8, **{key: half})) for key in ("allowed_LE", "trained_LE"))
    assert allowed == (dense[0] + (whole[0] - dense[0]) // 2,) * 2
    assert trained == (whole[0], allowed[1])
