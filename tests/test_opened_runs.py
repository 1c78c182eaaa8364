"""Runs that are opened elsewhere than they ended: stopped within a round, on another device, in commands with own words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from every import every
from federations import Result, alone, build, make_config, read_events, run_alone, write_inputs
from safetensors.torch import load_file

from fedmoe_ds.errors import UserError
from fedmoe_ds.export import command, lora, merge
from fedmoe_ds.export.command import main as export
from fedmoe_ds.export.written import Request
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.federation.run_spec import check_promise
from fedmoe_ds.report.several import page, read_runs
from fedmoe_ds.results import TrainedRun, answering, loaded_model, open_run, trained_run
from fedmoe_ds.results.evaluate_command import main as evaluate
from fedmoe_ds.results.generate_command import main as generate
from fedmoe_ds.results.loaded_model import LoadedModel, config_here
from fedmoe_ds.results.scored_config import config_of_run
from fedmoe_ds.storage.in_use import hold

QUICK: dict[str, Any] = {
    "local": {"max_steps": 1, "lr": 1e-2, "clip": None},
    "evaluation": {"client_sequences": 0, "max_sequences": 4},
    "execution": {"clients_in_flight": 1},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("opened")
    write_inputs(root, samples=(14, 9, 7, 5), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    return root


def stopped_within(root: Path, name: str, round_index: int, *changes: dict[str, Any]) -> Path:
    """The folder of a run that was asked to stop while the first client of a round was trained."""
    parts, journal = build(make_config(root, name, QUICK, *changes), *alone())
    told = journal.wave_done

    def wave_done(*wave: Any) -> None:
        if parts.state.round + 1 == round_index:
            parts.stop.name = "SIGTERM"
        told(*wave)

    journal.wave_done = wave_done  # type: ignore[method-assign]
    assert Federation(parts, journal).run().interrupted == "SIGTERM"
    journal.close()
    return Path(journal.folder)


def test_a_run_that_was_stopped_within_a_round(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of its last complete round, as its record has them; never clients' rescalers of the next one."""
    folder = stopped_within(root, "flame", 2, {"method": {"name": "flame"}})
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["round-00001", "round-00001-partial"]
    expected = [(e["tier_label"], e["loss"]) for e in read_events(folder) if e["event"] == "eval" and e["round"] == 1]
    capsys.readouterr()
    assert evaluate([str(folder), "--lines"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["tier_label"], row["loss"]) for row in rows] == expected != []
    words = r"stopped within round 2, and what 1 of its clients keep .* finish the run \(--resume auto\), or take round 1"
    with pytest.raises(UserError, match=words):
        open_run(folder / "checkpoints" / "round-00001-partial")
    shutil.rmtree(folder / "checkpoints" / "round-00001")
    for round_index in (None, 1):
        with pytest.raises(UserError, match=r"while the adapters are of round 1; finish the run \(--resume auto\)$"):
            open_run(folder, round_index)


def test_of_a_run_without_anything_of_clients_a_stop_changes_nothing(root: Path) -> None:
    folder = stopped_within(root, "fedit", 2, {"method": {"name": "fedit"}})
    whole = open_run(folder)
    assert whole.checkpoint.name == "round-00001"
    shutil.rmtree(whole.checkpoint)
    # One adapter for all, and that is of round 1.
    partial = open_run(folder)
    assert partial.checkpoint.name == "round-00001-partial" and partial.round == 1
    result: Result = run_alone(make_config(root, "one", QUICK, {"method": {"name": "fedit"}, "federation": {"rounds": 1}}))
    found = {key: partial.value(key, block, partial.select()) for key, block in partial.items()}
    assert found and every(torch.equal(value, torch.from_numpy(result.adapters[key])) for key, value in found.items())


@pytest.fixture(scope="module")
def flame(root: Path) -> TrainedRun:
    changes = {"method": {"name": "flame"}, "federation": {"rounds": 1}}
    run_alone(make_config(root, "whole", QUICK, changes))
    return open_run(root / "runs" / "whole")


def configured(run: TrainedRun, known: dict[str, Any] | None = None, **sections: dict[str, Any]) -> TrainedRun:
    """The run as if it had been configured so, and its checkpoint's identity had said so."""
    config = run.config
    changed = {name: getattr(config, name).model_copy(update=changes) for name, changes in sections.items()}
    spec = replace(run.spec, config=config.model_copy(update=changed))
    return replace(run, spec=spec, snapshot=replace(run.snapshot, identity=run.snapshot.identity | (known or {})))


def test_a_run_on_a_gpu_is_asked_on_a_cpu(
    flame: TrainedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was fast there, with threads and with Triton; what the user says of this process is still checked."""
    torch_threads = torch.get_num_threads()
    on_gpu = configured(
        flame,
        {"execution": {**flame.snapshot.identity["execution"], "reproducible": "fast"}},
        execution={"reproducible": "auto", "threads": 2, "adapter_kernels": "triton"},
    )
    assert not LoadedModel.of_run(on_gpu).spec.bitwise
    monkeypatch.setattr(answering, "open_run", lambda *argv: on_gpu)
    assert generate([str(flame.folder), "--prompt", "a", "--raw", "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    torch.set_num_threads(torch_threads)
    assert config_of_run(on_gpu, [], [], False).execution == config_here(on_gpu).execution
    assert config_of_run(flame, [], [], False).execution.reproducible == "bitwise"
    for word, told in (
        ("execution.adapter_kernels=triton", "needs a CUDA device"),
        ("execution.reproducible=bitwise", "execution.threads: 2: bitwise mode needs 1"),
    ):
        with pytest.raises(UserError, match=told):
            LoadedModel.of_run(on_gpu, config_of_run(on_gpu, [], [word], False))
    torch.set_num_threads(torch_threads)


def test_a_run_on_a_cpu_is_asked_on_a_gpu(flame: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits were promised there; here nobody promises any, and only who asks for them is refused."""
    monkeypatch.setattr(loaded_model, "_wanted_device", lambda: "cuda")
    assert flame.snapshot.identity["execution"]["reproducible"] == "bitwise"
    for run in (flame, configured(flame, execution={"reproducible": "bitwise"})):
        check_promise(config_here(run), "cuda")
        assert config_here(run).execution.reproducible == "fast"
    runtime = loaded_model.this_process
    monkeypatch.setattr(loaded_model, "_wanted_device", lambda: "cpu")
    monkeypatch.setattr(loaded_model, "this_process", lambda n: replace(runtime(n), device=torch.device("cuda", 0)))
    with pytest.raises(UserError, match=r"^execution\.reproducible: bitwise: on cuda "):
        LoadedModel.of_run(flame, config_of_run(flame, [], ["execution.reproducible=bitwise"], False))


def test_a_run_on_a_gpu_that_was_taken_for_bitwise(flame: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier version took the mode there and did nothing for it: its runs are opened like others."""
    written = configured(flame, {"topology": {"device": "cuda"}}, execution={"reproducible": "bitwise"})
    monkeypatch.setattr(trained_run, "read_snapshot", lambda folder: written.snapshot)
    monkeypatch.setattr(trained_run, "load_config", lambda path: written.config)
    opened = open_run(flame.folder)
    assert not opened.spec.bitwise and opened.config.execution.reproducible == "bitwise"


def test_what_a_run_wanted_of_its_training_keeps_no_evaluation_back(flame: TrainedRun) -> None:
    best = configured(flame, checkpoint={"best": "exact_match"}, evaluation={"metrics": ["exact_match"]})
    assert config_of_run(best, [], ["evaluation.metrics=[ranked_choice]"], False).evaluation.metrics == ["ranked_choice"]
    split = configured(flame, checkpoint={"best": "accuracy", "best_split": "clients"}, evaluation={"client_sequences": 4})
    assert config_of_run(split, [], ["evaluation.client_sequences=0"], False).evaluation.client_sequences == 0
    # Documents have no answers to generate, and are full sequences already.
    asked = configured(flame, evaluation={"generations": 2}, execution={"packing": True})
    words = ["data.template=text", "execution.packing=false"]
    assert LoadedModel.of_run(flame, config_of_run(asked, ["x.txt"], words, False)).spec.config.data.template == "text"


def test_a_client_and_a_tier_that_is_not_its_own(flame: TrainedRun) -> None:
    client = flame.clients[0]
    other = next(tier for tier in flame.tiers if tier != client.tier)
    words = rf"^--tier: {other}: with --client {client.name}: a client's model is that of its own tier \({client.tier}\); drop"
    with pytest.raises(UserError, match=words):
        evaluate([str(flame.folder), "--data", "x.jsonl", "--client", client.name, "--tier", other])


def test_a_run_that_began_with_adapters(
    root: Path, flame: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its round 0 is the start: nothing that it writes takes these figures for those of the base model."""
    changes = {"method": {"name": "fedit"}, "federation": {"rounds": 1}, "adapters": {"start": str(flame.folder)}}
    run_alone(make_config(root, "second", QUICK, changes))
    folder = root / "runs" / "second"
    for run, column in ((folder, "| start | trained |"), (flame.folder, "| base model | trained |")):
        # FLAME's rescaler fits into a whole model alone.
        assert export([str(run), "--format", "merged", "--out", str(tmp_path / run.name)]) == 0
        text = (tmp_path / run.name / "README.md").read_text()
        assert column in text and ("| started from | whole after round 1 |" in text) == (run == folder)
    text = page(read_runs([flame.folder, folder]))
    words = "of A the foundation; of B what the run started from (whole after round 1)"
    assert f"Before is {words}, after" in text and f"Round 0 is {words}, before" in text
    assert "Before is the foundation, after" in page(read_runs([flame.folder]))
    capsys.readouterr()
    assert evaluate([str(folder), "--before", "--lines"]) == 0
    told = "round 0 is the foundation here; in the run's own record it is what that started from, whole after round 1"
    assert told in capsys.readouterr().err


def test_an_export_of_adapters_lets_go_of_what_it_has_read(
    flame: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the whole checkpoint would count as this process's memory at the end."""
    plain = replace(flame, spec=replace(flame.spec, blocks=[block for block in flame.spec.blocks if block.pair]))
    selection, largest = plain.select(), max(value.nbytes for value in map(flame._adapters.read, flame._adapters))
    released: list[int] = []
    monkeypatch.setattr(TrainedRun, "release", lambda self: released.append(1))
    monkeypatch.setattr(merge, "BYTES_PER_OPEN", 2 * largest)
    monkeypatch.setattr(lora, "check_carried", lambda *argv: None)
    lora.write_lora("peft", Request(plain, selection, tmp_path, "base"))
    written = sum(value.nbytes for value in load_file(tmp_path / "adapter_model.safetensors").values())
    assert len(released) >= written / (3 * largest) > 2


def test_what_a_killed_export_has_left(root: Path, flame: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes with the next export; that of a living one stays, and a request to end leaves none."""
    dead, alive = (Path(tempfile.mkdtemp(prefix=".draft-export-", dir=tmp_path)) for _ in range(2))
    (dead / "part").write_bytes(bytes(100))
    assert hold(alive)
    argv = [str(flame.folder), "--format", "merged", "--out", str(tmp_path / "out")]

    def asked_to_end(*request: Any) -> None:
        assert not dead.exists() and len(list(tmp_path.iterdir())) == 2, "the living one's, and its own"
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(command, "_filled", asked_to_end)
        with pytest.raises(SystemExit) as ended:
            export(argv)
    assert ended.value.code == 143 and list(tmp_path.iterdir()) == [alive]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert export(argv) == 0 and sorted(tmp_path.iterdir()) == [alive, tmp_path / "out"]


def test_a_checkpoint_alone_knows_its_clients_by_name(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one tier there is nothing else to know: figures and models are those of the run."""
    one = {"federation": {"rounds": 1, "tiers": [{"top_k": 2, "share": 1}]}, "method": {"name": "fedsa-lora"}}
    run_alone(make_config(root, "own", QUICK, one, {"evaluation": {"client_sequences": 2}}))
    run = open_run(root / "runs" / "own")
    shutil.copytree(run.checkpoint, tmp_path / "round-00001")
    lone = open_run(tmp_path / "round-00001")
    assert [client.name for client in lone.clients] == [client.name for client in run.clients] != []
    name, items = run.clients[2].name, dict(run.items())
    ours, theirs = run.select(client=name), lone.select(client=name)
    assert every(torch.equal(run.value(key, block, ours), lone.value(key, block, theirs)) for key, block in items.items())
    figures = []
    for folder in (run.folder, lone.checkpoint):
        capsys.readouterr()
        assert evaluate([str(folder), "--lines"]) == 0
        figures.append(capsys.readouterr().out)
    assert figures[0] == figures[1] and name in figures[0]
    with pytest.raises(UserError, match=r"--client: bob: no client of this run has this name"):
        lone.select(client="bob")
