"""What docs/outputs.md says about the tensors of a checkpoint holds for those of every kind of method; clients by name; FLoRA's
weights only where something was merged."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_inputs import dense_config, write_dense
from federations import alone, make_config, write_inputs
from method_variants import BESIDE, GROUPED, IMAGES, PLAIN, RANKED, VARIANTS, variant_config
from safetensors import safe_open
from safetensors.torch import load_file

from fedmoe_ds.checkpoint import state
from fedmoe_ds.checkpoint.reader import PRIVATE, client_names, find_damage, read_snapshot
from fedmoe_ds.checkpoint.state import PartialRound
from fedmoe_ds.checkpoint.writer import CheckpointWriter
from fedmoe_ds.config import Config
from fedmoe_ds.distributed.topology import Topology
from fedmoe_ds.federation import session
from fedmoe_ds.federation.build import Parts, load_parts
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.federation.server import BASE
from fedmoe_ds.foundation.pre_gate import pre_gate_of
from fedmoe_ds.model.lora_linear import ClientLoRALinear
from fedmoe_ds.report import Progress

PAGE = Path(__file__).parents[1] / "docs" / "outputs.md"
PLACEHOLDERS = {"<l>": r"(?:\d+)", "<e>": r"(?:\d+)", "<c>": r"(?:\d+)", "<p>": r"(?P<projection>\w+)"}
SIDES = {"values": (2,), "weights": (2,), "value-windows": (1,), "weight-windows": (1,)}
TALLIES = {"tally-way": (2,), "tally-share": (2,), "tally-h": (2,), "tally-arrivals": (2,)}
SIDES |= TALLIES | {f"{side}-windows": (1,) for side in TALLIES}
KINDS = ["flame", "flame-layers", "hfedmoe-full", "hetlora", "flora", "fedsa-lora", "scaffold", "fedyogi", "plain-flora"]
KINDS += ["ewwa-fl", "fednova", "prism", "fedfm", "ub-smoe", "plain-fl-games", "read-me", "fedbe"]
DEGRADED: dict[str, Any] = {"data": {"form": {"kind": "degraded"}}}
TRAINED = (0, 2)
"""Clients that have been."""
KINDS += ["beside", "ranks"]  # adapter experts beside dense blocks, and forms of them
"""Together they have every kind of tensor and file."""
OTHERS = [variant for variant in (*VARIANTS, *BESIDE, *RANKED, *IMAGES, *PLAIN, *GROUPED) if variant not in KINDS]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensors")
    write_dense(folder, ("llama", "vit"), samples=(5, 4, 3))
    return folder


class Row:
    """One row of the table of tensors."""

    def __init__(self, tensor: str, shape: str, kinds: str) -> None:
        pattern = re.escape(tensor)
        for placeholder, expression in PLACEHOLDERS.items():
            pattern = pattern.replace(re.escape(placeholder), expression)
        self.pattern, self.kinds = re.compile(pattern), kinds.split(", ")
        self.axes = [re.fullmatch(r"(\d*)([A-Z]?)", axis) for axis in shape.split(", ")]

    def match(self, name: str, kind: str) -> re.Match[str] | None:
        return self.pattern.fullmatch(name) if kind in self.kinds else None

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        found = [axis for axis in self.axes if axis is not None]
        assert len(found) == len(self.axes), self.pattern
        return tuple(int(axis[1] or 1) * (sizes[axis[2]] if axis[2] else 1) for axis in found)


ROWS = [
    Row(*found) for found in re.findall(r"^\| `([\w.<>]+)` \| `\[([^\]]+)\]` \| ([a-z, ]+) \|", PAGE.read_text(), re.MULTILINE)
]


def specified(name: str, kind: str, parts: Parts) -> tuple[int, ...]:
    """The shape that the page says, without the axes before it; the name must fit one row."""
    found = [(row, match) for row in ROWS if (match := row.match(name, kind)) is not None]
    assert len(found) == 1, f"{kind}: {name}: {[row.pattern.pattern for row, _ in found]}"
    (row, match) = found[0]
    layout, config = parts.spec.expert_layout, parts.config
    sizes = {"H": layout.width, "F": layout.ffn, "E": layout.num_experts, "R": config.adapters.rank}
    sizes |= {"S": parts.spec.method.facts.sequences, "V": parts.spec.method.facts.classes}
    sizes["M"] = layout.num_experts + layout.zero
    if (moe := config.adapters.moe) is not None:
        sizes |= {"W": moe.width, "N": moe.width * moe.shared}
    if (gate := pre_gate_of(parts.foundation.model)) is not None:
        sizes |= {"V": gate.shape.vocabulary, "Z": gate.shape.width}
    if "projection" in match.groupdict():
        widths = {m.projection.name: m.projection for m in parts.foundation.model.modules() if isinstance(m, ClientLoRALinear)}
        shapes = {name: (one.width_out, one.width_in) for name, one in widths.items()}
        shapes |= {spec.name.split(".")[-2]: spec.item for spec in parts.spec.blocks if spec.owned and len(spec.item) > 1}
        sizes["O"], sizes["I"] = shapes[match["projection"]]
    return row.shape(sizes)


def checked(file: str, name: str, parts: Parts, participants: int) -> tuple[tuple[int, ...], torch.dtype]:
    """(shape, type) of one tensor by the page."""
    kind = re.fullmatch(r"([a-z.]+)(?:-\d+)*(?:-\d{5}-of-\d{5})+\.safetensors", file)[1]  # type: ignore[index]
    if kind == "sums":
        name, side = name.split("/")
        side = side.removeprefix("control-").removeprefix("weighting-2-")  # FLood's second mean
        item = specified(name, "statistics" if name.startswith("keys.") else "adapters", parts)
        if side in ("factors", "factor-weights"):
            dtype = torch.float32 if side == "factors" else torch.float64
            return (participants, *(item if side == "factors" else ())), dtype
        full = side == "values" or (side == "weights" and parts.spec.method.weighing.elements)
        return (*SIDES[side], *(item if full else ())), torch.int64
    before = ()
    if kind == "personal":
        # Level 0 has what everybody begins with, level 1 the clients that were trained.
        before, name = (
            (1 if "-00000-000-" in file else len(TRAINED),),
            re.sub(r"\b(control|ewwa-first|ewwa-second|own|others-\d+)\.", "", name, count=1),
        )
        if name == "clients":
            return before, torch.int64
    group = {"server.base": "base", "server.statistics": "statistics", "personal": "personal", "adapters": "adapters"}.get(
        kind, "server"
    )
    return (*before, *specified(name, group, parts)), torch.float32


def begun(config: Config) -> Parts:
    return load_parts(config, *alone(), Progress(enabled=False))


def saved(parts: Parts, topology: Topology | None = None) -> Path:
    """A checkpoint in the middle of round 1, in which everything is that there can be."""
    personal = parts.state.personal
    for index, (name, value) in itertools.product(TRAINED if personal else (), personal.state(0).items()):
        personal.store(index, name, value)
    personal.share(parts.runtime, parts.topology.control)
    writer = CheckpointWriter(parts.checkpoints, parts.runtime, 1, background=False)
    parts.state.partial, parts.state.sums = PartialRound(), parts.new_sums()
    names = [client.name for client in parts.clients]
    if BASE in parts.state.server:
        parts.state.server[BASE].changed = None  # as if something had been merged everywhere
    state.save(writer, topology or parts.topology, parts.state, parts.identity, parts.config_text, 0, names)
    writer.finish()
    return parts.checkpoints / "round-00000-partial"


def tensors(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(file, name, its slice) of everything in a checkpoint."""
    for file in sorted(name for name in read_snapshot(path).files if name.endswith(".safetensors")):
        with safe_open(path / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no dictionary)
                yield file, name, opened.get_tensor(name)


def compare(root: Path, variant: str) -> set[str]:
    """Every tensor of a checkpoint with the page; the rows of the page that fit one."""
    if variant == "beside":
        config = dense_config(root, "llama", "beside", {"adapters": {"attention": ["q_proj"]}})
    elif variant == "ranks":
        moe = {"linear": True, "width": 1, "shared": 2, "zero": 2, "router_input": "sample"}
        config = dense_config(root, "vit", "ranks", {"adapters": {"moe": moe}, "method": {"name": "mor"}}, DEGRADED)
    else:
        config = variant_config(root, variant, "spec", {"federation": {"participation": 1.0}})
    parts = begun(config)
    path = saved(parts)
    assert find_damage(path) is None
    fitting, count = set(), 0
    for file, name, tensor in tensors(path):
        shape, dtype = checked(file, name, parts, len(parts.participants(1)))
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), f"{variant}: {file}: {name}"
        fitting |= {row.pattern.pattern for row in ROWS if row.pattern.fullmatch(name)}
        count += 1
    assert count > 4, variant
    files = read_snapshot(path).files
    names = [client.name for client in parts.clients] if parts.state.personal else None
    assert client_names(path, files) == names and any(file.startswith(PRIVATE[0]) for file in files) == (names is not None)
    return fitting


def test_the_page_has_every_tensor_and_no_other(root: Path) -> None:
    assert len(ROWS) == 39
    assert set().union(*(compare(root, variant) for variant in KINDS)) == {row.pattern.pattern for row in ROWS}


@pytest.mark.cluster
@pytest.mark.parametrize("variant", OTHERS)
def test_the_tensors_of_every_other_method(root: Path, variant: str) -> None:
    assert compare(root, variant)


def test_a_gate_comes_first(root: Path) -> None:
    """Rows of gate_up: what the page says of axis 2F, by the weights of the model on disk."""
    parts = begun(variant_config(root, "hfedmoe-full", "gate"))
    stored = load_file(root / "model" / "model.safetensors")
    layer = parts.spec.expert_layout.layers[0]
    found = {key: value for key, _, value in parts.state.adapters.items(0)}[f"layers.{layer}.experts.3.gate_up.weight"]
    fused = [value for name, value in stored.items() if name.endswith(f"layers.{layer}.mlp.experts.gate_up_proj")]
    apart = [stored.get(f"model.layers.{layer}.mlp.experts.3.{name}_proj.weight") for name in ("gate", "up")]
    assert torch.equal(found, fused[0][3] if fused else torch.cat([part for part in apart if part is not None]))


def test_checkpoints_of_before_have_no_names(root: Path, tmp_path: Path) -> None:
    parts = begun(variant_config(root, "flame", "before"))
    writer = CheckpointWriter(tmp_path, parts.runtime, 1, background=False)
    files = {"personal-00000-of-00001.safetensors": {"model.rescaler": torch.ones(3, 1)}}
    writer.begin(state.Snapshot(1, {}, 0), files, {})
    writer.finish()
    assert client_names(tmp_path / "round-00001", files) is None
    assert client_names(tmp_path / "round-00001", ["config.yaml"]) is None


# FLoRA

MERGING: dict[str, Any] = {
    "method": {"name": "flora"},
    "adapters": {"attention": ["q_proj"]},
    "federation": {"rounds": 3, "participation": 0.5, "tiers": [{"top_k": 2, "share": 1.0}]},
    "local": {"max_steps": 1, "batch_size": 1},
    "execution": {"micro_batch_size": 1},
    "evaluation": {"max_sequences": 1, "client_sequences": 0, "every": 9},
    "checkpoint": {"keep": 9},
}


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short texts and many experts: some of them see no token in a round."""
    folder = tmp_path_factory.mktemp("merging")
    write_inputs(folder, samples=(3, 3), num_hidden_layers=2, num_experts=32, num_experts_per_tok=2)
    return folder


def train(config: Config, resume: str = "never") -> tuple[Parts, str]:
    runtime, topology = alone()
    folder = Path(config.output) / config.name
    source = session.claim_folder(folder, resume)
    journal = Journal(folder, runtime)
    parts = load_parts(config, runtime, topology, journal.progress, resume=source["checkpoint"])
    session.begin(parts, journal, source["checkpoint"])
    federation = Federation(parts, journal)
    federation.checkpoints.save()  # before the first round, too
    federation.checkpoints.finish()
    digest = federation.run().digest
    journal.close()
    return parts, digest


def bases(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file, name, tensor in tensors(path) if file.startswith("server.base-")}


@pytest.fixture(scope="module")
def straight(merging: Path) -> tuple[Parts, str]:
    return train(make_config(merging, "straight", MERGING))


def test_weights_without_a_product_are_not_written(merging: Path, straight: tuple[Parts, str]) -> None:
    parts, digest = straight
    fresh = {key: value.clone() for key, _, value in begun(parts.config).state.server[BASE].items(0)}
    assert bases(parts.checkpoints / "round-00000") == {}
    before: set[str] = set()
    for round_index in (1, 2, 3):
        written = bases(parts.checkpoints / f"round-{round_index:05d}")
        assert before <= written.keys() and 0 < len(written) < len(fresh), "experts that nobody has used are the foundation's"
        assert not [key for key, value in written.items() if torch.equal(value, fresh[key])], "and no other"
        before = set(written)
    for key, _, value in parts.state.server[BASE].items(0):
        assert (key in before) != torch.equal(value, fresh[key]), key
        assert key not in before or torch.equal(value, written[key])
    # Continued from the middle: what is not there is the foundation's.
    shorter = make_config(merging, "again", MERGING, {"federation": {"rounds": 2}})
    train(shorter)
    continued, again = train(make_config(merging, "again", MERGING), "auto")
    assert again == digest
    assert bases(continued.checkpoints / "round-00003").keys() == before


def test_a_checkpoint_of_before_is_continued(
    merging: Path, straight: tuple[Parts, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds all weights."""
    with monkeypatch.context() as patch:
        patch.setattr("fedmoe_ds.model.adapter_bank.Bank.note_change", lambda bank, *what: setattr(bank, "changed", None))
        parts, _ = train(make_config(merging, "old", MERGING, {"federation": {"rounds": 2}}))
        full = bases(parts.checkpoints / "round-00002")
        assert full.keys() == {key for key, _, _ in parts.state.server[BASE].items(0)}
    _, continued = train(make_config(merging, "old", MERGING), "auto")
    assert continued == straight[1]


def test_what_a_warm_start_has_merged_is_written(merging: Path) -> None:
    """So that the run goes on without the folder that it has started from."""
    fedit: dict[str, Any] = {"method": {"name": "fedit"}, "federation": {"rounds": 1}, "local": {"lr": 0.05}}
    giver, _ = train(make_config(merging, "giver", MERGING, fedit))
    warm: dict[str, Any] = {"adapters": {"start": str(giver.checkpoints.parent)}, "federation": {"rounds": 2}}
    parts, digest = train(make_config(merging, "warm", MERGING, warm))
    first = bases(parts.checkpoints / "round-00000")
    assert 0 < len(first) < len(list(parts.state.server[BASE].items(0))), "of experts that had a product"
    train(make_config(merging, "alone", MERGING, warm, {"federation": {"rounds": 1}}))
    shutil.rmtree(giver.checkpoints.parent)
    _, continued = train(make_config(merging, "alone", MERGING, warm), "auto")
    assert continued == digest
