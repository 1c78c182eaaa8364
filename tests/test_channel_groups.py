"""Channel groups: a dense foundation whose feed-forward blocks become experts, against the same blocks sliced by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import FAMILIES, dense_config, write_dense
from every import every
from federations import alone, build, run_alone
from grouped_models import Grouped, dense_logits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from fedmoe_ds.config import Config
from fedmoe_ds.config.foundation_section import ConvertConfig, FoundationConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import session
from fedmoe_ds.federation.build import load_parts
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.run_spec import check_start
from fedmoe_ds.foundation import load_foundation, planned_sparse, resolve_foundation
from fedmoe_ds.foundation.channel_grouping import Plan, grouped, saliency, write
from fedmoe_ds.foundation.channel_groups import Grouping
from fedmoe_ds.foundation.loading import Skeleton

EXPERTS = 4
WIDTH = 48
GROUP = WIDTH // EXPERTS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    write_dense(folder, tuple(FAMILIES))
    return folder


def of_groups(root: Path, family: str, order: Any = "saliency") -> Path:
    convert = ConvertConfig(experts=EXPERTS, order=order)
    return grouped(root / family, convert, root / "cache", lambda line: None)


def hugging_face(folder: Path) -> Any:
    """In float64: what float32 rounds away would be as large as what these tests look for."""
    images = json.loads((folder / "config.json").read_text())["model_type"] == "vit"
    factory: Any = AutoModelForImageClassification if images else AutoModelForCausalLM
    return factory.from_pretrained(folder).double().eval()


def blocks(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.base_model.layers]


def matrices(block: Any) -> tuple[list[nn.Linear], nn.Linear]:
    if hasattr(block, "fc1"):
        return [block.fc1], block.fc2
    return [block.gate_proj, block.up_proj], block.down_proj


def by_hand(block: Any) -> list[int]:
    """Channels by saliency, from plain loops."""
    inner, outer = matrices(block)
    rows = [*(matrix.weight.tolist() for matrix in inner), outer.weight.t().tolist()]
    sums = [sum(abs(value) for matrix in rows for value in matrix[j]) for j in range(WIDTH)]
    return sorted(range(WIDTH), key=lambda j: -sums[j])


def sliced(model: Any, chosen: list[list[int]]) -> Any:
    """The model with some of the channels of every block, in smaller matrices."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block, channels in zip(blocks(model), chosen, strict=True):
            inner, outer = matrices(block)
            for linear in inner:
                linear.weight = nn.Parameter(linear.weight[channels])
                linear.bias = None if linear.bias is None else nn.Parameter(linear.bias[channels])
            outer.weight = nn.Parameter(outer.weight[:, channels])
    return model


def close(ours: list[Tensor], theirs: list[Tensor], bound: float = 1e-6) -> bool:
    assert max(float(each.abs().max()) for each in theirs) > 0.3
    return every(
        float((a - b).abs().max()) <= bound * max(1.0, float(b.abs().max())) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["saliency", "given"])
def test_all_groups_are_the_dense_model(root: Path, family: str, order: str) -> None:
    dense = hugging_face(root / family)
    for training in ("full",) if family == "vit" else ("full", "lora"):
        model = Grouped(of_groups(root, family, order), (EXPERTS, EXPERTS), training)
        parts = [model.rows(0), model.rows(1)]
        assert close(model.logits(parts), dense_logits(dense, parts)), training


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_what_is_written_is_the_same_function_to_others(root: Path, family: str) -> None:
    """The folder is a model of its family: whoever knows nothing of groups computes what it did before."""
    folder = of_groups(root, family)
    model = Grouped(folder, (EXPERTS,))
    theirs, before = hugging_face(folder), hugging_face(root / family)
    parts = [model.rows(0)]
    assert close(dense_logits(theirs, parts), dense_logits(before, parts))
    assert json.loads((folder / "config.json").read_text())["channel_groups"] == {"experts": EXPERTS, "always": 0}


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_a_cap_leaves_the_most_salient_channels(root: Path, family: str) -> None:
    """The clients of one pass have sub-models of their own, each as with sliced matrices."""
    dense = hugging_face(root / family)
    order = [by_hand(block) for block in blocks(dense)]
    model = Grouped(of_groups(root, family), (1, 3))
    parts = [model.rows(0), model.rows(1)]
    small, large = (sliced(dense, [channels[: k * GROUP] for channels in order]) for k in (1, 3))
    expected = dense_logits(small, parts[:1]) + dense_logits(large, parts[1:])
    assert close(model.logits(parts), expected)
    # And they are not the dense model, so that the caps were seen.
    assert not close(model.logits(parts), dense_logits(dense, parts), 1e-3)


def test_a_mask_chooses_groups_by_layer(root: Path) -> None:
    dense = hugging_face(root / "vit")
    order = [by_hand(block) for block in blocks(dense)]
    masks = np.array([[True, False, True, False], [False, True, True, True]])
    model = Grouped(of_groups(root, "vit"), (EXPERTS,))
    chosen = [
        [channel for e in np.flatnonzero(mask) for channel in channels[e * GROUP : (e + 1) * GROUP]]
        for channels, mask in zip(order, masks, strict=True)
    ]
    parts = [model.rows(0, masks)]
    assert close(model.logits(parts), dense_logits(sliced(dense, chosen), parts))


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_some_channels_may_always_work_and_others_be_in_two_groups(root: Path, family: str, tmp_path: Path) -> None:
    """The writer's plan: eight channels for every row, groups that overlap, and channels of no group."""
    dense = hugging_face(root / family)
    draw = np.random.default_rng(5)
    places = [draw.permutation(WIDTH) for _ in blocks(dense)]
    always, first, second = slice(0, 8), slice(8, 20), slice(12, 24)
    order_LW = np.stack([np.concatenate([one[always], one[first], one[second]]) for one in places])
    write(root / family, tmp_path, Plan(Grouping(2, always=8), torch.from_numpy(order_LW)))
    model = Grouped(tmp_path, (1, 1))
    only_second = np.array([[False, True]] * len(places))
    parts = [model.rows(0), model.rows(1, only_second)]
    expected = [
        *dense_logits(sliced(dense, [[*one[always], *one[first]] for one in places]), parts[:1]),
        *dense_logits(sliced(dense, [[*one[always], *one[second]] for one in places]), parts[1:]),
    ]
    assert close(model.logits(parts), expected)


def test_a_model_in_several_files(root: Path, tmp_path: Path) -> None:
    """A block's matrices may lie in several; further tensors go to the first, and the index says so."""
    source, plain, more = (tmp_path / name for name in ("source", "plain", "more"))
    dense = AutoModelForCausalLM.from_pretrained(root / "llama")
    dense.save_pretrained(source, max_shard_size="20KB")
    for path in root.joinpath("llama").glob("tokenizer*"):
        (source / path.name).symlink_to(path)
    assert len([*source.glob("*.safetensors")]) > 3
    order_LW = torch.stack([torch.tensor(by_hand(block)) for block in blocks(dense)])
    for folder, tensors in ((plain, None), (more, {"further": torch.zeros(3)})):
        folder.mkdir()
        write(source, folder, Plan(Grouping(EXPERTS), order_LW, tensors))
    model = Grouped(plain, (EXPERTS,))
    parts = [model.rows(0)]
    assert close(model.logits(parts), dense_logits(dense.double().eval(), parts))
    with pytest.raises(UserError, match="tensor 'further' has no place in a 'llama' model"):
        load_foundation(more, FoundationConfig(), 1, 0, "cpu")


def test_the_order_does_not_depend_on_the_initial_one() -> None:
    torch.manual_seed(3)
    inner, outer = [torch.randn(WIDTH, 20), torch.randn(WIDTH, 20)], torch.randn(20, WIDTH)
    shuffled = torch.randperm(WIDTH)
    before = saliency(inner, outer)
    after = saliency([matrix[shuffled] for matrix in inner], outer[:, shuffled])
    assert torch.equal(after, before[shuffled]) and len(before.unique()) == WIDTH


def test_every_shard_reads_its_own_groups(root: Path) -> None:
    folder = of_groups(root, "vit")
    whole = load_foundation(folder, FoundationConfig(), 1, 0, "cpu").layers
    for rank in range(2):
        skeleton = Skeleton(folder, torch.float32, 2, rank)
        skeleton.bind(skeleton.load(torch.device("cpu")), torch.device("cpu"))
        for mine, all_ in zip(skeleton.layers, whole, strict=True):
            here = slice(mine.experts.start, mine.experts.stop)
            assert len(mine.experts) == EXPERTS // 2
            assert torch.equal(mine.w13, all_.w13[here]) and torch.equal(mine.w2, all_.w2[here])
            assert torch.equal(mine.bias, all_.bias[here])  # type: ignore[attr-defined]


def test_an_entry_of_the_cache_is_made_once(root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = FoundationConfig(path=str(root / "vit"), convert=ConvertConfig(experts=EXPERTS), cache=str(tmp_path))
    first, again = (resolve_foundation(config, 0, said.append) for _ in range(2))
    other = resolve_foundation(config.model_copy(update={"convert": ConvertConfig(experts=2)}), 0, said.append)
    assert first == again != other and len(said) == 2
    prints = [load_foundation(folder, config, 1, 0, "cpu").fingerprint for folder in (first, other, root / "vit")]
    # Twice the same channels in the same order: what tells them apart is how these are grouped.
    assert len({*prints}) == 3
    # Given as a path, the folder says by itself that there are experts.
    assert planned_sparse(FoundationConfig(path=str(first))) and not planned_sparse(FoundationConfig(path=str(root / "vit")))


def config_of(root: Path, family: str, *changes: dict[str, Any]) -> Config:
    base: dict[str, Any] = {
        "foundation": {"convert": {"experts": EXPERTS}, "cache": str(root / "cache")},
        "adapters": {"moe": None, "expert_training": "full"},
        "method": {"name": "fedit"},
    }
    return dense_config(root, family, "groups", base, *changes)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "width": ("vit", {"foundation": {"convert": {"experts": 5}}}, "foundation.convert.experts: 5: the 48 channels of a block"),
    "router": ("llama", {"adapters": {"router": "train"}}, "adapters.router: train: groups of channels have gates of one"),
    "balance": ("llama", {"local": {"balance_loss": 0.1}}, "local.balance_loss: 0.1: groups of channels have no router"),
    "lora": ("vit", {"adapters": {"expert_training": "lora"}}, "adapters.expert_training: lora: groups of channels of a block"),
    "beside": (
        "llama",
        {"adapters": {"expert_training": "lora", "moe": {"experts": 4, "top_k": 2}}},
        "adapters.moe: .* has experts of its own; drop the section",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_before_anything_is_loaded(root: Path, name: str) -> None:
    family, changes, start = REFUSED[name]
    check_start(config_of(root, family), "cpu")
    with pytest.raises(UserError, match=f"^{start}"):
        check_start(config_of(root, family, changes), "cpu")


def test_no_method_moves_a_choice_that_nobody_makes(root: Path) -> None:
    with pytest.raises(UserError, match=r"^method\.name: ub-smoe: it moves which experts a router chooses, and groups of"):
        build(config_of(root, "llama", {"method": {"name": "ub-smoe"}}), *alone())


def test_a_mixture_is_not_converted(root: Path) -> None:
    with pytest.raises(UserError, match=r"^foundation.convert: channel-groups: a 'olmoe' model has experts of its own"):
        check_start(Config.model_validate({"foundation": {"preset": "nano-olmoe", "convert": {"experts": 4}}}), "cpu")
    with pytest.raises(UserError, match="grouped already"):
        grouped(of_groups(root, "vit"), ConvertConfig(experts=2), root / "cache", lambda line: None)


BROKEN: dict[str, Any] = {
    "type": [4, 0],
    "names": {"experts": 4},
    "kinds": {"experts": 4.0, "always": 0},
    "none": {"experts": 0, "always": 0},
    "uneven": {"experts": 5, "always": 0},
    "more": {"experts": 4, "always": 48},
}


@pytest.mark.parametrize("name", BROKEN)
def test_groups_that_cannot_be_are_refused(root: Path, tmp_path: Path, name: str) -> None:
    source = of_groups(root, "llama")
    for path in source.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text()) | {"channel_groups": BROKEN[name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json: channel_groups: .*; get the file again"):
        load_foundation(tmp_path, FoundationConfig(), 1, 0, "cpu")


@pytest.mark.parametrize("change", [{"experts": 2}, {"order": "given"}])
def test_a_run_goes_on_with_its_groups_alone(root: Path, change: dict[str, Any]) -> None:
    """Also where the channels of a group are those of two others: the same numbers in the same order."""
    tag = next(iter(change))
    once: dict[str, Any] = {"federation": {"rounds": 1, "tiers": [{"share": 1.0}]}, "name": f"resumed-{tag}"}
    first = run_alone(config_of(root, "vit", once)).parts
    config = config_of(root, "vit", once, {"federation": {"rounds": 2}, "foundation": {"convert": change}})
    runtime, topology = alone()
    journal = Journal(root / "scratch", runtime)
    parts = load_parts(config, runtime, topology, journal.progress)
    with pytest.raises(UserError, match=rf"^--resume: foundation.convert.{tag}: .*another name"):
        session.begin(parts, journal, str(first.checkpoints / "round-00001"))
