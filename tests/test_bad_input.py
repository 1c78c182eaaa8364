"""Bad input: the real command answers every user's mistake with one line and exit code 2, and nothing keeps running."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from every import every
from launching import Result, changed, read_events, refused, run
from safetensors.torch import load_file, save_file

from fedmoe_ds.checkpoint import reader as checkpoint
from fedmoe_ds.config import Config, TopologyConfig
from fedmoe_ds.distributed import mpi_control
from fedmoe_ds.distributed.launcher import Launch
from fedmoe_ds.distributed.runtime import init_runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import resolve_foundation

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def foundation(nano: dict[str, Any]) -> Path:
    """The model folder of the nano foundation, which is there already: other tests keep more of them in that cache."""
    config = Config.model_validate(nano)
    return resolve_foundation(config.foundation, config.seed, print)


@pytest.fixture(scope="module")
def finished(nano: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The undisturbed run of the `nano` federation."""
    folder = tmp_path_factory.mktemp("finished")
    result = run(changed(nano, output=str(folder)), folder)
    assert result.digest
    return result


def assert_names(line: str, *parts: str) -> None:
    """A message names field, value and fix: the given parts, in this order."""
    position = 0
    for part in parts:
        found = line.find(part, position)
        assert found >= 0, f"{part!r} is missing in: {line}"
        position = found + len(part)


CONFIGURATION = {
    "unknown key": ({"federation": {"roundz": 5}}, (), ("federation.roundz: unknown key", "did you mean 'rounds'?")),
    "mistyped section": ({"topologie": {"ep_size": 1}}, (), ("topologie: unknown key", "did you mean 'topology'?")),
    "mistyped override": ({}, ("local.epoch=2",), ("local.epoch: unknown key", "did you mean 'epochs'?")),
    "no override": ({}, ("federation.rounds",), ("override: federation.rounds:", "write key=value")),
    "wrong type": ({"federation": {"rounds": "many"}}, (), ("federation.rounds: many: expected integer",)),
    "cap below 1": (
        {"federation": {"tiers": [{"top_k": 4, "share": 1.0}, {"top_k": 0, "share": 1.0}]}},
        (),
        ("federation.tiers.1.top_k: 0: expected", "1"),
    ),
    "mixes clients": (
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
        (),
        ("deepspeed.zero_optimization:", "across clients", "use topology.ep_size"),
    ),
    "unknown method": ({"method": {"name": "flam"}}, (), ("method.name: flam:", "did you mean 'flame'?")),
    "unknown method key": (
        {"method": {"name": "flame", "temprature": 2.0}},
        (),
        ("method.temprature: unknown key for method 'flame'", "did you mean 'temperature'?"),
    ),
    "ep_size above the world": (
        {"topology": {"ep_size": 2}},
        (),
        ("topology.ep_size: 2:", "world of 1 rank", "use ep_size in [1] or start a multiple of 2 ranks"),
    ),
    "Triton on a CPU": (
        {"topology": {"device": "cpu"}, "execution": {"adapter_kernels": "triton"}},
        (),
        ("execution.adapter_kernels: triton:", "needs a CUDA device", "use auto"),
    ),
    "moments on the host of a CPU": (
        {"topology": {"device": "cpu"}, "execution": {"moments_on": "host"}},
        (),
        ("execution.moments_on: host:", "in the host's memory as it is", "use device"),
    ),
}


@pytest.mark.parametrize("case", CONFIGURATION)
def test_a_mistake_in_the_configuration(case: str, nano: dict[str, Any], tmp_path: Path) -> None:
    changes, overrides, parts = CONFIGURATION[case]
    config = changed(changed(nano, output=str(tmp_path)), **changes)
    assert_names(refused(config, tmp_path, overrides), *parts)


def test_a_missing_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("name: small\n")
    assert_names(
        run(tmp_path / "smal.yaml", tmp_path).mistake(),
        f"config: {tmp_path / 'smal.yaml'}: no such file",
        "did you mean 'small.yaml'?",
    )


def test_a_run_folder_is_not_used_twice_but_a_refused_start_does_not_use_it(
    finished: Result, nano: dict[str, Any], tmp_path: Path
) -> None:
    before = (finished.folder / "metrics.jsonl").read_bytes()
    line = refused(changed(nano, output=str(finished.folder.parent)), tmp_path)
    assert_names(line, "name: nano:", "already holds a run", "add --resume auto", "or set another name")
    assert (finished.folder / "metrics.jsonl").read_bytes() == before
    wrong = changed(nano, output=str(tmp_path), federation={"tiers": [{"top_k": 5, "share": 1.0}]})
    assert_names(refused(wrong, tmp_path), "federation.tiers.0.top_k: 5:", "4 experts", "use 1 to 4")
    mended = changed(nano, output=str(tmp_path))
    assert run(mended, tmp_path).digest == finished.digest


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def few_rows(folder: Path) -> dict[str, Any]:
    rows = [{"text": f"Sample {number} of four is about the number {number}."} for number in range(4)]
    return {"source": write_rows(folder / "few.jsonl", rows), "partition": {"kind": "iid", "column": None, "clients": 9}}


def unanswerable_client(folder: Path) -> dict[str, Any]:
    rows = [{"instruction": "Say yes.", "output": "yes", "group": "short"} for _ in range(6)]
    rows += [{"instruction": "Repeat: " + "many words " * 60, "output": "yes", "group": "long"} for _ in range(3)]
    return {"source": write_rows(folder / "rows.jsonl", rows), "template": "instruction", "sequence_length": 48}


def malformed(folder: Path) -> dict[str, Any]:
    good = json.dumps({"text": "Fine.", "group": "a"})
    (folder / "torn.jsonl").write_text(f'{good}\n{good}\n{{"text": "Torn", "gro\n{good}\n')
    return {"source": str(folder / "torn.jsonl")}


DATA: dict[str, tuple[Callable[[Path], dict[str, Any]], tuple[str, ...]]] = {
    "more clients than samples": (few_rows, ("data.partition.clients: 9: more clients than the", "samples", "use at most")),
    "an empty client": (unanswerable_client, ("data.partition: client 'long':", "raise data.sequence_length")),
    "missing file": (lambda folder: {"source": str(folder / "no.jsonl")}, ("data.source:", "no.jsonl: no such file; give")),
    "missing column": (lambda folder: {"columns": {"text": "body"}}, ("data.columns", "body", "text")),
    "missing group column": (
        lambda folder: {"partition": {"column": "owner"}},
        ("data.partition.column: owner:", "group"),
    ),
    "malformed line": (malformed, ("data.source:", "torn.jsonl:3: not valid JSON", "mend or drop the line")),
}


@pytest.mark.parametrize("case", DATA)
def test_a_mistake_in_the_data(case: str, nano: dict[str, Any], tmp_path: Path) -> None:
    make, parts = DATA[case]
    assert_names(refused(changed(nano, output=str(tmp_path), data=make(tmp_path)), tmp_path), *parts)


def test_a_checkpoint_of_another_model_and_of_other_settings(
    finished: Result, nano: dict[str, Any], foundation: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished.folder, tmp_path / "nano")
    shutil.copytree(foundation, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1.0
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    kept = sorted(path.name for path in (tmp_path / "nano" / "checkpoints").iterdir())
    other = changed(nano, output=str(tmp_path), foundation={"path": str(tmp_path / "other")})
    line = refused(other, tmp_path, ("--resume", "auto"))
    assert_names(line, "--resume: foundation", "belongs to another model", "use the foundation of that run, or another name")
    other = changed(nano, output=str(tmp_path), local={"lr": 1e-3})
    line = refused(other, tmp_path, ("--resume", "auto"))
    assert_names(line, "--resume: local.lr: 0.001:", "written with 0.005", "set it back, or use another name")
    assert sorted(path.name for path in (tmp_path / "nano" / "checkpoints").iterdir()) == kept
    assert read_events(tmp_path / "nano") == read_events(finished.folder)


SEVERAL_RANKS: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "unknown key": (4, {"federation": {"roundz": 5}}, ("federation.roundz: unknown key", "did you mean 'rounds'?")),
    "experts": (3, {"topology": {"ep_size": 3}}, ("topology.ep_size: 3: 8 experts", "choose one of 1, 2, 4, 8")),
    "control by MPI": (
        2,
        {"topology": {"control": "mpi"}},
        ("topology.control: mpi:", "without MPI", "mpirun", "control=torch"),
    ),
    "malformed line": (2, {}, ("data.source:", "torn.jsonl:3: not valid JSON", "mend or drop the line")),
}


@pytest.mark.parametrize(
    # One that every rank finds by itself and one that rank 0 finds alone; starts of several ranks cost 20 s each.
    "case",
    [
        case if case in ("experts", "malformed line") else pytest.param(case, marks=pytest.mark.cluster)
        for case in SEVERAL_RANKS
    ],
)
def test_all_ranks_end_on_a_mistake(case: str, nano: dict[str, Any], tmp_path: Path) -> None:
    ranks, changes, parts = SEVERAL_RANKS[case]
    if case == "malformed line":
        changes = {"data": malformed(tmp_path), "topology": {"ep_size": 2}}
    result = run(changed(changed(nano, output=str(tmp_path)), **changes), tmp_path, ranks)
    assert_names(result.mistake(), *parts)


@pytest.mark.parametrize("key", ["control", "aggregation"])
def test_every_rank_can_tell_that_there_is_no_mpi(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it waits for the others, so that none hangs."""
    for name in list(os.environ):
        if name.startswith(mpi_control._CONNECTED):
            monkeypatch.delenv(name)
    with pytest.raises(UserError, match=rf"^topology\.{key}: mpi: the 2 ranks .* without MPI: .* use topology\.{key}=torch"):
        init_runtime(Launch("environment", 1, 2, 1), TopologyConfig.model_validate({key: "mpi"}))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None], Callable[[], None] | None]]:
    """(folder, leave, prepare): `leave(bytes)` fills the disk under `folder` up to that, `leave(0)` empties it again.

    Without the right to mount, `leave` does nothing and `prepare` limits the size of files to less than a shard of adapters.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode  # fmt: skip
    ballast = folder / "ballast"

    def leave(size: int) -> None:
        ballast.unlink(missing_ok=True)
        if mounted and size:
            free = shutil.disk_usage(folder).free
            ballast.write_bytes(bytes(free - size))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, resource.RLIM_INFINITY))

    try:
        yield folder, leave, None if mounted else limit
    finally:
        if mounted:
            with contextlib.suppress(OSError):
                subprocess.run(["umount", "-l", str(folder)], check=True)


def blocks(paths: Iterable[Path]) -> int:
    """Bytes that files occupy on a disk with blocks of 4 KiB."""
    return sum(4096 * math.ceil(path.stat().st_size / 4096) for path in paths)


def test_a_full_disk(
    small_disk: tuple[Path, Callable[[int], None], Callable[[], None] | None],
    finished: Result,
    nano: dict[str, Any],
    tmp_path: Path,
) -> None:
    """The disk fills while the second checkpoint is written: what is there stays intact, and with room the run ends as ever."""
    disk, leave, limit = small_disk
    texts = blocks([finished.folder / "metrics.jsonl", finished.folder / "config.yaml"])
    leave(texts + 3 * blocks((finished.folder / "checkpoints" / "round-00001").iterdir()) // 2)
    config = changed(nano, output=str(disk), topology={"ep_size": 2})
    line = run(config, tmp_path, ranks=2, prepare=limit).mistake()
    assert_names(line, f"checkpoint: {disk / 'nano' / 'checkpoints'}: cannot write:", "make room", "--resume auto")
    left = list((disk / "nano" / "checkpoints").iterdir())
    assert [path.name for path in left] == ([] if limit else ["round-00001"])
    assert every(checkpoint.find_damage(path) is None for path in left)
    leave(0)
    again = run(changed(config, topology={"ep_size": 1}), tmp_path, options=("--resume", "auto"))
    assert again.digest == finished.digest
    evaluations = [
        [(e["round"], e["tier"], e["split"], e.get("client"), e["perplexity"]) for e in read_events(folder, "eval")]
        for folder in (again.folder, finished.folder)
    ]
    assert evaluations[0] == evaluations[1]
