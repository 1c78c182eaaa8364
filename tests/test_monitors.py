"""Monitors through DeepSpeed: TensorBoard and CSV files hold what metrics.jsonl holds, once per round, in the run folder."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from every import every
from federations import alone, make_config, read_events, write_inputs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedmoe_ds.config import Config
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import session
from fedmoe_ds.federation.monitors import check_monitors, filled, keep_rounds, of_round, start_monitors

SMALL: dict[str, Any] = {
    "local": {"max_steps": 1, "batch_size": 3},
    "federation": {"tiers": [{"top_k": 2, "share": 1.0}, {"top_k": 2, "rank": 2, "share": 1.0}]},
    "method": {"name": "hetlora"},
    "evaluation": {"metrics": ["exact_match"], "clients_every": 1},
    "deepspeed": {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True}},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("monitors")
    write_inputs(root, samples=(7, 6, 5), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    return root


def train(config: Config) -> session.Ending:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "build_topology", lambda config, runtime: alone()[1])
        patch.setattr("deepspeed.comm.get_rank", lambda: 0)  # there is no process group in a world of one
        return session.train(config, alone()[0], "auto", StopRequest())


def curves_of(folder: Path, name: str = "run") -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, float]]]]:
    """(round, value) by curve: TensorBoard's by their names, those of the CSV files by the names of these."""
    events = EventAccumulator(str(folder / "monitor" / "tensorboard" / name))
    events.Reload()
    board = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    files = {}
    for path in (folder / "monitor" / "csv_monitor" / name).glob("*.csv"):
        header, *rows = list(csv.reader(path.open()))
        assert header[0] == "step" and len(header) == 2
        files[path.stem] = [(int(step), float(value)) for step, value in rows]
    return board, files


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def expected_of(events: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The curves that a record stands for, worked out from its events alone."""
    found: dict[str, list[tuple[int, float]]] = {}

    def add(name: str, round_index: int, value: float) -> None:
        found.setdefault(name.replace(" ", "-"), []).append((round_index, value))

    for event in events:
        if event["event"] == "eval" and event["split"] != "client":
            for name in ("perplexity", "accuracy", "loss", "exact_match"):
                add(f"{name}/{event['split']}/k{event['tier_label']}", event["round"], event[name])
        if event["event"] == "round":
            r = event["round"]
            for name in ("tokens", "targets", "seconds", "tokens_per_s", "participants", "dropped", "waves", "lr"):
                add(f"round/{name}", r, event[name])
            add("round/bytes", r, sum(tally["bytes"] for tally in event["collectives"].values()))
            for name, tally in event["collectives"].items():
                add(f"bytes/{name}", r, tally["bytes"])
            for name, seconds in event["phases"].items():
                add(f"seconds/{name}", r, seconds)
            clients = [e for e in events if e["event"] == "client" and e["round"] == r]
            for name in ("loss_first", "loss_last"):
                add(f"round/{name}", r, mean([client[name] for client in clients]))
                for label in {client["tier_label"] for client in clients}:
                    add(f"{name}/k{label}", r, mean([c[name] for c in clients if c["tier_label"] == label]))
    return found


def test_every_figure_once_also_after_a_resume(inputs: Path) -> None:
    config = make_config(inputs, "run", SMALL)
    folder = Path(config.output) / "run"
    assert train(config).exit_code == 0
    # A kill after round 2 and before its checkpoint: the rows of round 2 are there, and trained again.
    shutil.rmtree(folder / "checkpoints" / "round-00002")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["event"] != "end"))
    assert train(make_config(inputs, "run", SMALL, {"federation": {"rounds": 3}})).exit_code == 0
    expected = expected_of(read_events(folder))
    assert {"perplexity/clients/k2-r2", "loss_last/k2-r2", "round/bytes"} <= expected.keys()
    assert [r for r, _ in expected["loss/global/k2-r4"]] == [0, 1, 2, 3]
    board, files = curves_of(folder)
    assert files == {name.replace("/", "_"): points for name, points in expected.items()}, "floats, to the last digit"
    assert board.keys() == expected.keys()
    for name, points in expected.items():
        assert [r for r, _ in board[name]] == [r for r, _ in points], name
        assert [v for _, v in board[name]] == pytest.approx([v for _, v in points], rel=1e-6), name  # float32


def test_what_is_left_open_lies_in_the_run_folder(tmp_path: Path) -> None:
    own = {"output_path": "/elsewhere", "job_name": "mine"}
    on = {"enabled": True}
    section = {"tensorboard": on, "csv_monitor": {**on, **own}, "wandb": {"enabled": False}, "comet": {**on, "project": "p"}}
    found = filled(Config.model_validate({"name": "x", "deepspeed": section}), tmp_path)
    assert found == {
        "tensorboard": {"enabled": True, "output_path": f"{tmp_path}/monitor/tensorboard", "job_name": "x"},
        "csv_monitor": {"enabled": True, **own},
        "comet": {"enabled": True, "project": "p", "samples_log_interval": 1, "experiment_name": "x"},
    }


def unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route to it")


def test_a_service_that_fails_ends_no_run(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in a round nor at the end; the files and the record are whole. A run that fails brings out what there is, too."""
    ended = list[int]()

    def started(*given: Any) -> Any:
        master: Any = start_monitors(*given)
        master.comet_monitor = SimpleNamespace(write_events=unreachable, experiment=SimpleNamespace(end=unreachable))
        master.wandb_monitor = SimpleNamespace(write_events=lambda figures: None)
        return master

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda exit_code: ended.append(exit_code)))
    monkeypatch.setattr(session, "start_monitors", started)
    short = {"federation": {"rounds": 1}, "deepspeed": {"tensorboard": {"enabled": False}}}
    config = make_config(inputs, "services", SMALL, short)
    assert train(config).exit_code == 0 and ended == [0]
    said = capsys.readouterr().err
    line = "deepspeed.comet: ConnectionError: no route to it"
    assert said.count(f"{line}; these figures are in metrics.jsonl alone") == 3, "of rounds 0 and 1, and of the training"
    assert said.count(f"{line}; its last figures may be in metrics.jsonl alone") == 1
    events = read_events(Path(config.output) / "services")
    files = Path(config.output, "services", "monitor", "csv_monitor", "services")
    assert events[-1]["event"] == "end" and len(list(files.glob("*.csv"))) == len(expected_of(events))
    monkeypatch.setattr(session, "Federation", unreachable)
    with pytest.raises(ConnectionError):
        train(make_config(inputs, "fails", SMALL, short))
    assert ended == [0, 1] and "its last figures" in capsys.readouterr().err


@pytest.mark.parametrize("monitor, extra", [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet")])
def test_a_missing_package_is_one_line_before_anything_is_written(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: str, extra: str
) -> None:
    packages = ("tensorboard", "wandb", "comet_ml")
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in packages else real(name, *more))
    config = make_config(inputs, "missing", {"output": str(tmp_path / "runs"), "deepspeed": {monitor: {"enabled": True}}})
    with pytest.raises(UserError, match=rf"^deepspeed\.{monitor}\.enabled: true: .* pip install 'fedmoe-ds\[{extra}\]'"):
        train(config)
    assert not (tmp_path / "runs").exists()
    check_monitors({monitor: {"enabled": False}, "csv_monitor": {"enabled": True}})


def test_rows_of_later_rounds_go_and_other_files_stay(tmp_path: Path) -> None:
    # Earlier versions wrote a header at every start.
    (tmp_path / "a.csv").write_text("step,a\r\n0,1.5\r\n1,2.5\r\nstep,a\r\n1,2.5\r\n2,9\r\n")
    (tmp_path / "b.csv").write_text("step,b\r\n7,1\r\n")
    others = {"mine.csv": "name,step\n2,3\n", "empty.csv": "", "wide.csv": "step,a,b\n9,1,2\n"}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    keep_rounds(tmp_path, 1)
    assert (tmp_path / "a.csv").read_text().split() == ["step,a", "0,1.5", "1,2.5", "1,2.5"]
    assert (tmp_path / "b.csv").read_text().split() == ["step,b"]
    assert {name: (tmp_path / name).read_text() for name in others} == others
    keep_rounds(tmp_path / "nowhere", 1)


@pytest.mark.parametrize("name", ["monitor", "monitor/csv_monitor", "monitor/csv_monitor/run", "monitor/csv_monitor/run/x.csv"])
def test_nothing_is_written_through_a_link(inputs: Path, tmp_path: Path, name: str) -> None:
    place, target = tmp_path / "runs" / "run" / name, tmp_path / "target"
    place.parent.mkdir(parents=True)
    if name.endswith(".csv"):
        target.write_text("step,x\n1,2\n")
    else:
        target.mkdir()
    place.symlink_to(target)
    only = {"tensorboard": {"enabled": False}}
    with pytest.raises(UserError, match=r"^deepspeed\.csv_monitor: cannot start: .*symbolic link"):
        train(make_config(inputs, "run", SMALL, {"output": str(tmp_path / "runs"), "deepspeed": only}))
    assert target.read_text() == "step,x\n1,2\n" if target.is_file() else not list(target.iterdir())


def test_losses_that_are_not_finite_are_in_no_mean() -> None:
    fields = dict.fromkeys(("tokens", "targets", "seconds", "tokens_per_s", "participants", "dropped", "waves", "lr"), 1)
    clients: list[dict[str, Any]] = [
        {"tier_label": "4", "loss_first": 1.0, "loss_last": math.nan},
        {"tier_label": "4", "loss_first": 3.0, "loss_last": math.inf},
        {"tier_label": "2", "loss_first": None, "loss_last": 8.0},
    ]
    found = {
        name: value for name, value, r in of_round(7, clients, {**fields, "targets": None, "collectives": {}, "phases": {}})
    }
    losses = {name: value for name, value in found.items() if "loss" in name}
    assert losses == {"round/loss_first": 2.0, "loss_first/k4": 2.0, "round/loss_last": 8.0, "loss_last/k2": 8.0}
    assert "round/targets" not in found and found["round/bytes"] == 0
    assert every(r == 7 for _, _, r in of_round(7, clients, {**fields, "collectives": {}, "phases": {}}))
