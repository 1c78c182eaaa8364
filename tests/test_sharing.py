"""Foundation weights that ranks of a host share: the file, what damages it, and two real ranks that map it."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from distributed import run_distributed
from every import every
from federations import joined, make_config, run_alone, run_joined, write_inputs

from fedmoe_ds.config import Config
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.stop_points import file_sha256
from fedmoe_ds.distributed.topology import build_topology
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.build import load_shared_foundation
from fedmoe_ds.foundation import Foundation, file_sums, load_foundation
from fedmoe_ds.foundation.host_sharing import FOLDER
from fedmoe_ds.foundation.mapped_weights import ALIGNMENT, DATA, HEADER, MappedWeights, Memory, Slot
from fedmoe_ds.kernels import compiling, lora_products, matrix, rows
from fedmoe_ds.report import Progress
from fedmoe_ds.storage import cache

SLOTS = [
    Slot("odd", (3, 5), torch.float32),
    Slot("half", (7,), torch.bfloat16),
    Slot("scale", (), torch.float32),
    Slot("large", (100, 300), torch.float32),
]


def values() -> Memory:
    draw = torch.Generator().manual_seed(0)
    return {slot.name: torch.randn(slot.shape, generator=draw).to(slot.dtype) for slot in SLOTS}


def fill(memory: Memory) -> None:
    for name, value in values().items():
        memory[name].copy_(value)


def refuse(memory: Memory) -> None:
    raise AssertionError("an intact file is written again")


@pytest.fixture
def weights(tmp_path: Path) -> MappedWeights:
    found = MappedWeights(tmp_path / "cache" / "shared", "f" * 64, "dense", SLOTS)
    found.ensure(fill)
    return found


def check(weights: MappedWeights) -> None:
    mapped, expected = weights.map(), values()
    assert mapped.keys() == expected.keys()
    for name, value in expected.items():
        assert mapped[name].dtype == value.dtype and torch.equal(mapped[name], value)
        assert mapped[name].data_ptr() % ALIGNMENT == 0
    assert list(weights.folder.parent.iterdir()) == [weights.folder]  # nothing unfinished is left


def test_a_file_is_written_once_and_gives_the_same_bits(weights: MappedWeights) -> None:
    check(weights)
    MappedWeights(weights.folder.parent, "f" * 64, "dense", SLOTS).ensure(refuse)
    others = [
        MappedWeights(weights.folder.parent, "e" * 64, "dense", SLOTS),
        MappedWeights(weights.folder.parent, "f" * 64, "experts of rank 0 of 2", SLOTS),
        MappedWeights(weights.folder.parent, "f" * 64, "dense", SLOTS[:3]),
    ]
    assert len({weights.folder, *(other.folder for other in others)}) == 4
    assert not any(other.intact() for other in others)


def test_who_writes_has_a_copy_of_its_own(weights: MappedWeights) -> None:
    mine, theirs = weights.map(), weights.map()
    mine["large"].zero_()
    assert not mine["large"].any() and torch.equal(theirs["large"], values()["large"])
    assert weights.intact()


def flip(weights: MappedWeights) -> None:
    data = bytearray((weights.folder / DATA).read_bytes())
    data[len(data) // 2] ^= 1
    (weights.folder / DATA).write_bytes(data)


def cut(weights: MappedWeights) -> None:
    with (weights.folder / DATA).open("r+b") as file:
        file.truncate(weights.nbytes // 2)


def mislabel(weights: MappedWeights) -> None:
    header = json.loads((weights.folder / HEADER).read_text())
    header["tensors"][0][2] = [5, 3]
    (weights.folder / HEADER).write_text(json.dumps(header))


def tear(weights: MappedWeights) -> None:
    (weights.folder / HEADER).write_text("{")


@pytest.mark.parametrize("damage", [flip, cut, mislabel, tear])
def test_a_damaged_file_is_found_and_written_again(weights: MappedWeights, damage: Any) -> None:
    damage(weights)
    assert not weights.intact()
    if damage is not flip:  # only a full look finds it, and one rank of a host takes that
        with pytest.raises((OSError, ValueError)):
            weights.map()
    weights.ensure(fill)
    check(weights)


def test_a_large_file_is_read_again_only_where_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written and remembered by the first start; the second reads nothing; what is changed afterwards is found."""
    read: list[Path] = []
    monkeypatch.setattr(file_sums, "file_sha256", lambda path: read.append(path) or file_sha256(path))
    monkeypatch.setattr(file_sums, "WORTH", 0)
    monkeypatch.setattr(file_sums, "_SETTLED_NS", 3600 * 10**9)
    weights = MappedWeights(tmp_path / "shared", "f" * 64, "dense", SLOTS, tmp_path / "sums")
    weights.ensure(fill)
    weights.ensure(refuse)
    assert not read
    check(weights)
    flip(weights)
    assert not weights.intact() and read == [weights.folder / DATA]
    weights.ensure(fill)
    check(weights)


def test_no_room_leaves_nothing_behind(tmp_path: Path) -> None:
    weights = MappedWeights(tmp_path, "f" * 64, "dense", SLOTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights.nbytes // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            weights.ensure(fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())


def test_a_damaged_checkpoint_leaves_nothing_behind(tmp_path: Path) -> None:
    def damaged(memory: Memory) -> None:
        raise UserError("foundation.path: here: damaged weight file")

    with pytest.raises(UserError):
        MappedWeights(tmp_path, "f" * 64, "dense", SLOTS).ensure(damaged)
    assert not any(tmp_path.iterdir())


def changed(root: Path, name: str, ep_size: int = 1, cache: Path | None = None, mapped: str = "shared") -> Config:
    """FLoRA, which writes into frozen weights, for one round; cached apart from the run of one rank."""
    folder = {"cache": str(cache or root / "shared-cache"), "mapped": mapped}
    rest = {"federation": {"rounds": 1}, "method": {"name": "flora"}, "topology": {"ep_size": ep_size}}
    return make_config(root, name, {"foundation": folder, **rest})


class Loaded:
    """A foundation as runs load it, with what the run said."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        stream = io.StringIO()
        progress = Progress(enabled=runtime.is_main, stream=stream)
        self.foundation: Foundation = load_shared_foundation(
            config, runtime, build_topology(config.topology, runtime), progress
        )
        self.said = stream.getvalue()
        self.total = sum(tensor.double().abs().sum().item() for tensor in self.foundation.model.parameters())  # every page

    def same(self, other: Foundation) -> bool:
        pairs = zip(self.foundation.model.state_dict().items(), other.model.state_dict().items(), strict=True)
        return self.foundation.fingerprint == other.fingerprint and all(
            mine == theirs and torch.equal(value, expected) for (mine, value), (theirs, expected) in pairs
        )


def mapped_files(cache: Path) -> list[Any]:
    """What /proc says about this process's mappings of shared files."""
    maps = psutil.Process().memory_maps(grouped=True)
    return [one for one in maps if one.path.startswith(str(cache)) and one.path.endswith(DATA)]


def on_two_ranks(rank: int, root: Path) -> dict[str, Any]:
    runtime, shared, found = joined(rank), root / "shared-cache" / FOLDER, {}
    config = changed(root, "load")
    own = load_foundation(root / "model", config.foundation, 1, 0, "cpu")
    first = Loaded(config, runtime)
    runtime.barrier()
    found["maps"] = [(one.path, one.rss, one.pss, one.private_dirty) for one in mapped_files(shared)]
    runtime.barrier()
    found["same"], found["said"] = first.same(own), first.said
    before = {path: path.read_bytes() for path in shared.glob(f"*/{DATA}")}
    result = run_joined(changed(root, "joined"), runtime)
    found["digest"] = result.digest
    found["written"] = sum(one.private_dirty for one in mapped_files(shared))
    found["kept"] = first.same(own) and before == {path: path.read_bytes() for path in shared.glob(f"*/{DATA}")}
    runtime.barrier()
    if rank == 0:
        for path in before:
            path.write_bytes(bytes(len(before[path])))
    runtime.barrier()
    found["repaired"] = Loaded(config, runtime).same(own) and all(path.read_bytes() == before[path] for path in before)
    (root / "file").touch()
    unusable = Loaded(changed(root, "unusable", cache=root / "file"), runtime)
    found["unusable"], found["complaint"] = unusable.same(own), unusable.said
    half = Loaded(changed(root, "half", ep_size=2), runtime)
    own_half = load_foundation(root / "model", config.foundation, 2, rank, "cpu")
    found["half"], found["half_said"] = half.same(own_half), half.said
    alone = Loaded(changed(root, "alone", ep_size=2, cache=root / "alone-cache", mapped="all"), runtime)
    found["alone"], found["alone_maps"] = alone.same(own_half), {one.path for one in mapped_files(root / "alone-cache")}
    return found | kernels_damaged_on_one_rank(rank, root, runtime)


def kernels_damaged_on_one_rank(rank: int, root: Path, runtime: Runtime) -> dict[str, Any]:
    """Every rank has compiled kernels in a cache of its own, and one of rank 1's is damaged; then it can build none at all."""
    common, mine = cache.place(cache.root(None), "native"), root / f"kernels-{rank}"
    for name, built in compiling.loaded().items():
        for entry in common.glob(f"{name}-{built.source[:24]}-*"):  # of every processor class that was asked for
            shutil.copytree(entry, mine / "native" / entry.name)
    os.environ["FEDMOE_CACHE"] = str(mine)
    before = {path: path.read_bytes() for path in mine.rglob(compiling.LIBRARY)}
    for path, content in before.items():
        if rank == 1 and path.parent.name.startswith("rows-"):
            path.write_bytes(content[: len(content) // 2] + bytes(64) + content[len(content) // 2 + 64 :])
    found: dict[str, Any] = {}
    for name in ("repaired", "refused"):
        for cached in (compiling.library, lora_products.compiled, matrix.kernel_of, matrix.best, rows._library):
            cached.cache_clear()
        try:
            found[f"kernels_{name}"] = run_joined(changed(root, name), runtime).digest
        except UserError as error:
            found[f"kernels_{name}"] = str(error)
        if rank == 1:
            os.environ["PATH"] = "/nowhere"
    unchanged = all(path.read_bytes() == content for path, content in before.items())
    return found | {"kernels_unchanged": unchanged, "kernels_told": cache.passed_over()}


def test_two_ranks_of_a_host_hold_weights_once(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    alone = run_alone(changed(tmp_path, "alone", cache=tmp_path / "other-cache"))
    ranks = run_distributed(on_two_ranks, 2, tmp_path)
    size = sum(path.stat().st_size for path in (tmp_path / "shared-cache" / FOLDER).glob(f"*/{DATA}"))
    for found in ranks:
        assert found["same"] and found["digest"] == alone.digest
        assert len(found["maps"]) == 2  # the dense part and the experts
        for _, rss, pss, dirty in found["maps"]:
            assert rss > 0 and dirty == 0 and pss <= rss * 0.6, found["maps"]
        assert sum(rss for _, rss, _, _ in found["maps"]) >= size  # whole pages; with ep_size 2 the dense part is the same file
        assert found["written"] > 0 and found["kept"], "merged weights are this rank's own"
        assert found["repaired"] and found["unusable"] and found["half"]
    assert [path for path, *_ in ranks[0]["maps"]] == [path for path, *_ in ranks[1]["maps"]]
    # With every part in a file, the dense part is common, and each rank maps its own experts.
    assert every(found["alone"] and len(found["alone_maps"]) == 2 for found in ranks)
    assert len(ranks[0]["alone_maps"] & ranks[1]["alone_maps"]) == 1
    assert "MiB of weights are in memory once per host, mapped from" in ranks[0]["said"]
    assert ranks[0]["complaint"].count("\n") == 1 and "warning: foundation.cache:" in ranks[0]["complaint"]
    assert (
        "every rank keeps foundation weights in memory of its own" in ranks[0]["complaint"]
        and "once per host" in ranks[0]["half_said"]
    )
    assert ranks[1]["said"] == ranks[1]["complaint"] == ""
    for rank, found in enumerate(ranks):
        assert found["kernels_repaired"] == alone.digest and found["kernels_unchanged"]
        assert found["kernels_refused"].startswith("execution.reproducible: bitwise: rank 1 on "), found["kernels_refused"]
        assert "than rank 0 on" in found["kernels_refused"]
        damaged = [line for line in found["kernels_told"] if line.endswith("is damaged: made anew") and "kernels-" in line]
        assert len(damaged) == rank, damaged
