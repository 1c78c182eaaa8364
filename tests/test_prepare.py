"""`fedmoe prepare`: what a start finds afterwards, what is told, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from every import every
from federations import make_config, run_alone, write_inputs
from launching import changed

from fedmoe_ds.commands import prepare as command
from fedmoe_ds.config import Config
from fedmoe_ds.distributed.stop_points import StopError, heard_by
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.errors import EXIT_STOPPED, UserError
from fedmoe_ds.federation.preparation import prepare
from fedmoe_ds.foundation import file_sums, host_sharing
from fedmoe_ds.foundation import fingerprint as prints
from fedmoe_ds.foundation.fingerprint import fingerprint
from fedmoe_ds.foundation.foundation import open_skeleton
from fedmoe_ds.foundation.loading import Skeleton
from fedmoe_ds.storage import cache

SHORT: dict[str, Any] = {"federation": {"rounds": 1}, "local": {"max_steps": 1}, "evaluation": {"client_sequences": 0}}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    cache.passed_over()  # by tests before, in this process: they are not told here
    write_inputs(tmp_path)
    return make_config(tmp_path, "run", SHORT, {"foundation": {"cache": str(tmp_path / "prepared")}})


@pytest.fixture
def worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are worth an entry, and as old as they have to be."""
    monkeypatch.setattr(file_sums, "WORTH", 0)
    monkeypatch.setattr(file_sums, "_SETTLED_NS", -(10**12))


def entries(config: Config) -> dict[str, set[str]]:
    root = cache.root(config.foundation.cache)
    return {kind: {path.name for path in (root / kind).glob("*")} for kind in ("data", "foundations", "shared", "sums")}


def test_a_start_finds_what_was_prepared(config: Config, worth: None, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    told = list(prepare(config, 2, notes.append))
    kept = entries(config)
    assert every(kept[kind] for kind in ("data", "shared", "sums")) and len(kept["shared"]) == 2, kept
    assert [line.split(":")[0] for line in told] == [
        "foundation", "data", "sums of the model's files", "weights that ranks of a host map", told[-1].split(":")[0],
    ]  # fmt: skip
    assert "1 weight files" in told[0] and "found" in told[0] and "made, " in told[1] and "1 read, " in told[2]
    assert "2 files" in told[3] and "2 written, 0 found" in told[3] and told[-1].startswith("prepared in ")
    again = list(prepare(config, 2, notes.append))
    assert "found" in again[1] and "0 read, 0.0 MiB, 1 known" in again[2] and "0 written, 2 found" in again[3]
    read: list[Path] = []
    for module in (file_sums, prints):
        monkeypatch.setattr(module, "file_sha256", lambda path: read.append(path) or "0" * 64)
    run_alone(config)
    assert entries(config) == kept and not [path for path in read if path.suffix == ".safetensors"]


class Alike:
    """The first of ranks of one host that all say the same."""

    rank = 0

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.ranks

    def run_on_all_ranks(self, action: Any) -> Any:
        return action()


def check_only_mapped(config: Config, ranks: int, everything: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start takes the prepared files and writes none: no weight of the model's own files is read."""
    root, path = cache.root(config.foundation.cache), str(config.foundation.path)
    skeleton = open_skeleton(path, config.foundation, 1, 0, "cpu")
    own = skeleton.load(torch.device("cpu"))
    monkeypatch.setattr(Skeleton, "read", lambda self, memory: memory and pytest.fail(f"read: {sorted(memory)}"))
    place = (root / "shared", Alike(ranks), lambda line: None, root / "sums", everything)
    memory = host_sharing.load_shared(skeleton, fingerprint(Path(path)), 1, ["a"] * ranks, *place)
    assert memory.keys() == own.keys() and every(memory[name].equal(own[name]) for name in own)


def test_ranks_of_a_host_map_what_was_prepared(config: Config, worth: None, monkeypatch: pytest.MonkeyPatch) -> None:
    list(prepare(config, 2, lambda line: None))
    check_only_mapped(config, 2, False, monkeypatch)


def test_one_rank_finds_what_was_prepared_where_all_weights_are_mapped(
    config: Config, worth: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = changed(config.model_dump(), foundation={"mapped": "all"})
    told = list(prepare(Config.model_validate(tree), 1, lambda line: None))
    assert "weights that ranks of a host map: 2 files" in told[3] and "2 written, 0 found" in told[3]
    check_only_mapped(config, 1, True, monkeypatch)


def test_mapped_weights_are_refused_for_gpus(config: Config) -> None:
    on_cuda = {"topology": {"device": "cuda"}, "execution": {"reproducible": "fast"}}
    tree = changed(config.model_dump(), foundation={"mapped": "all"}, **on_cuda)
    with pytest.raises(UserError, match=r"foundation\.mapped: all: weights are in the memory of the cuda device; leave it at"):
        list(prepare(Config.model_validate(tree), 1, lambda line: None))


def test_shards_of_experts_are_left_to_the_start_and_told(config: Config) -> None:
    """What is common to all shards is prepared."""
    sharded = Config.model_validate(changed(config.model_dump(), topology={"ep_size": 2}))
    told = list(prepare(sharded, 2, lambda line: None))
    assert "1 files" in told[3] and told[3].endswith("shards of experts are written by the first start (topology.ep_size 2)")
    assert "1 written, 1 found" in list(prepare(config, 2, lambda line: None))[3], "the dense part is the same at every ep_size"


def test_pre_training_that_is_stopped_goes_on(tmp_path: Path) -> None:
    tree = {
        "name": "digits", "output": str(tmp_path), "method": {"name": "fft-moe"},
        "foundation": {"preset": "nano-vit", "pretrain": {"steps": 6}, "cache": str(tmp_path / "cache")},
        "federation": {"tiers": [{"top_k": 2, "share": 1.0}]},
        "adapters": {"moe": {"experts": 4, "width": 4, "top_k": 2}},
        "data": {"source": "digits", "partition": {"kind": "iid", "clients": 4}},
    }  # fmt: skip
    config, left, notes = Config.model_validate(tree), [3], list[str]()

    def listen() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StopError("SIGUSR1")

    with heard_by(listen), pytest.raises(StopError, match="stopped by SIGUSR1 while loading; pre-training goes on"):
        list(prepare(config, 1, notes.append))
    told = list(prepare(config, 1, notes.append))
    assert "made, " in told[0] and any("goes on after step" in note for note in notes)


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["--ranks", "0"], {}, r"--ranks: 0: must be at least 1"),
        (["--ranks", "2", "topology.device=cuda", "execution.reproducible=fast"], {}, r"--ranks: 2: ranks share no weights in"),
        ([], {"RANK": "1", "WORLD_SIZE": "2"}, r"prepare: one process does all of it, and a launcher has started several"),
        (["method.name=flamme"], {}, r"method.name: flamme: .*did you mean 'flame'"),
    ],
)
def test_refusals(
    words: list[str], variables: dict[str, str], message: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(config.output) / "config.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config.model_dump(mode="json")))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        command.main(["--config", str(file), *words])
    assert not any(entries(config).values())


def test_the_command(config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(config.output) / "config.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config.model_dump(mode="json")))
    stop = StopRequest()
    monkeypatch.setattr(command, "STOP", stop)
    assert command.main(["--config", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and said[-1].startswith("prepared in ") and said[1].startswith("data: ")
    stop.name = "SIGTERM"
    assert command.main(["--config", str(file), "data.sequence_length=33"]) == EXIT_STOPPED
    said = capsys.readouterr()
    assert "stopped by SIGTERM while loading; start the same command again to continue" in said.err
