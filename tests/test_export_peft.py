"""Adapters out: what PEFT and transformers load gives the run's own logits, for every family, format, tier and topology.

Random adapters stand for trained ones: every expert has a delta of its own and two have none, as if nobody had trained them. An
expert is narrower than the model, and E is not R: a mistake in the order of experts, rows or halves cannot hide.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_foundation_dense as dense
import torch
import yaml
from every import every
from federations import Result, alone, make_config, own_tensors, run_alone, write_inputs
from lora_folders import expert_blocks, random_values, write_folder
from peft import PeftModel
from safetensors.torch import load_file
from test_families import original_rotary
from test_foundation import FAMILIES, VOCAB, save_model
from test_logits import Hosted, rows_of, sequences
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from fedmoe_ds import __version__
from fedmoe_ds.adapter_formats import FORMATS, Format, names_of, read_adapter
from fedmoe_ds.adapter_formats.module_names import NAMES
from fedmoe_ds.checkpoint.reader import read_snapshot
from fedmoe_ds.checkpoint.state import State, save
from fedmoe_ds.checkpoint.writer import CheckpointWriter
from fedmoe_ds.config import AdapterConfig
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.distributed.topology import ParallelLayout, Topology
from fedmoe_ds.errors import UserError
from fedmoe_ds.export.card import fenced, write_card
from fedmoe_ds.export.command import main
from fedmoe_ds.export.lora import VLLM_RANKS, check_carried, rank_and_alpha, vllm_rank
from fedmoe_ds.export.written import Request, Written
from fedmoe_ds.methods.flora import FLoRA
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.adapter_moe_layer import INNER
from fedmoe_ds.model.batch import Rows
from fedmoe_ds.model.lora_linear import find_projections
from fedmoe_ds.model.moe_layer import GATE_UP, ROUTER
from fedmoe_ds.results import Selection, TrainedRun, open_run

TOLERANCE = 1e-5
UNTRAINED = (1, 5)
ALWAYS = ("mixtral", "deepseek_v2")
SPARSE = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.cluster) for name in FAMILIES if name != "minimax_m3"]
WORLDS = {"1": (1, 1), "2": (2, 2), "4": (4, 4), "2x2": (4, 2)}
"""World size and expert-parallel size."""
BOTH: dict[str, Any] = {
    "local": {"max_steps": 1},
    "adapters": {"rank": 6, "alpha": 9.0},
    "method": {"name": "hetlora"},
    "federation": {"rounds": 1, "budget": "both", "tiers": [{"top_k": k, "share": 1} for k in (8, 4, 2)]},
}


# Families, without a run


def theirs(folder: Path, adapter: Path, ids: np.ndarray, **changes: int) -> Tensor:
    """Logits [S, V] by PEFT on transformers' own model."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **changes)
    with original_rotary(), torch.no_grad():
        logits: Tensor = PeftModel.from_pretrained(model, str(adapter)).eval()(torch.from_numpy(ids)[None]).logits[0]
    return logits


@pytest.mark.parametrize("family", SPARSE)
def test_every_sparse_family(family: str, tmp_path: Path) -> None:
    """Both formats, at the model's own top-k and at a cap; PEFT converts keys of single experts for most families."""
    folder = tmp_path / family
    config = FAMILIES[family][0]()
    save_model(config, folder, **FAMILIES[family][1])
    train_tokenizer(["import this"], VOCAB).save_pretrained(folder)
    names = names_of(config.model_type, "test")
    hosted = Hosted(folder, 1, 0, merge=True, router="frozen")
    hosted.execution.rescaler = False
    bank = hosted.execution.bank
    blocks = [block for block in bank.specs.values() if block.pair]
    values = random_values(blocks, 8, seed=1, untrained=UNTRAINED)
    for key, block, place in bank.items(0, slot=0):
        if block.pair:
            place.copy_(0.2 * values[key])
    read = {key: place.clone() for key, _, place in bank.items(0, slot=0)}
    ids = sequences(0, 0)[0]
    for cap in (hosted.foundation.top_k, 1):
        with torch.no_grad():
            ours = hosted.logits([rows_of(0, 0, cap)], None)[0][0, : len(ids)]
        for fmt in FORMATS if names.converted else ("peft-fused",):
            adapter = write_folder(tmp_path / fmt, fmt, names, blocks, read, 8, 4, 2.0 * 4)
            found = theirs(folder, adapter, ids, num_experts_per_tok=cap)
            assert float((ours - found).abs().max()) <= TOLERANCE * max(1.0, float(ours.abs().max())), (fmt, cap)
            assert float((ours - bare(folder, ids, cap)).abs().max()) > 0.1, "the adapter changes what the model says"


@pytest.mark.parametrize("fmt", FORMATS)
def test_experts_alone(fmt: Format, tmp_path: Path) -> None:
    """Without any projection: PEFT's merged weights are W + s B A of every expert, and those of two experts as they were."""
    save_model(FAMILIES["olmoe"][0](), tmp_path / "olmoe")
    blocks = expert_blocks((0, 1), 3, 32, 16)
    values = random_values(blocks, 8, seed=6, untrained=UNTRAINED)
    adapter = write_folder(tmp_path / "a", fmt, NAMES["olmoe"], blocks, values, 8, 3, 6.0)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "olmoe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    assert set(merged) == set(before)
    for name, value in merged.items():
        found = re.fullmatch(r"model\.layers\.(\d)\.mlp\.experts\.(gate_up|down)_proj", name)
        for e in range(8 if found else 1):
            if found is None:
                assert torch.equal(value, before[name])
                continue
            key = f"layers.{found[1]}.experts.{e}.{found[2]}"
            expected = before[name][e] + 2.0 * values[f"{key}.lora_B"] @ values[f"{key}.lora_A"]
            assert torch.allclose(value[e], expected, atol=TOLERANCE)
            assert torch.equal(value[e], before[name][e]) == (e in UNTRAINED)


def bare(folder: Path, ids: np.ndarray, cap: int) -> Tensor:
    with original_rotary(), torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, num_experts_per_tok=cap).eval()
        logits: Tensor = model(torch.from_numpy(ids)[None]).logits[0]
    return logits


@pytest.mark.parametrize(
    "family", ["llama", "vit", *(pytest.param(name, marks=pytest.mark.cluster) for name in ("qwen3", "olmo2"))]
)
def test_every_dense_family(family: str, tmp_path: Path) -> None:
    """PEFT's merged weights are W + s B A under the names that we say, and nothing else has changed."""
    folder = tmp_path / family
    dense.save(dense.FAMILIES[family][0](), folder)
    factory: Any = AutoModelForImageClassification if family == "vit" else AutoModelForCausalLM
    model = factory.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    feed_forward = ["fc1", "fc2"] if family == "vit" else ["gate_proj", "up_proj", "down_proj"]
    projections = find_projections(model, AdapterConfig(attention=["q_proj", "v_proj"], feed_forward=feed_forward))
    blocks: list[BlockSpec] = []
    for name in dict.fromkeys(projection.block_a for projection in projections):
        members = [projection for projection in projections if projection.block_a == name]
        layers, first = tuple(one.layer for one in members), members[0]
        blocks += [
            BlockSpec(first.block_a, layers, (3, first.width_in)),
            BlockSpec(first.block_b, layers, (first.width_out, 3)),
        ]
    values = random_values(blocks, 0, seed=2)
    adapter = write_folder(tmp_path / "a", "peft", names_of(family, "test"), blocks, values, 0, 3, 6.0, task_type=None)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    changed = {f"{one.path}.weight": one for one in projections}
    assert set(merged) == set(before) and len(changed) == 2 * (2 + len(feed_forward))
    for name, value in merged.items():
        expected = before[name]
        if name in changed:
            one = changed[name]
            key = f"layers.{one.layer}.{one.part}.{one.name}"
            expected = expected + 2.0 * values[f"{key}.lora_B"] @ values[f"{key}.lora_A"]
            assert not torch.allclose(value, before[name], atol=0.1)
        assert torch.allclose(value, expected, atol=TOLERANCE), name


# A run, from checkpoints of several topologies


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_inputs(folder, num_experts=8, num_experts_per_tok=8)
    return folder


@pytest.fixture(scope="module")
def trained(root: Path) -> Result:
    """One round of clients whose budgets buy active experts and rank, then random adapters, saved by four worlds."""
    result = run_alone(make_config(root, "run", BOTH))
    snapshot = read_snapshot(root / "runs" / "run" / "checkpoints" / "round-00001")
    config = (root / "runs" / "run" / "checkpoints" / "round-00001" / "config.yaml").read_text()
    adapters = result.parts.state.adapters
    values = random_values(list(adapters.specs.values()), 8, seed=4, untrained=UNTRAINED)
    for key, _, place in adapters.items(0):
        place.copy_(0.2 * values[key])
    for name, (world, ep_size) in WORLDS.items():
        folder = root / "worlds" / name
        folder.mkdir(parents=True)
        shutil.copy(root / "runs" / "run" / "metrics.jsonl", folder)
        writer = CheckpointWriter(folder / "checkpoints", alone()[0], 1, background=False)
        writer.begin(snapshot, shards(result, world, ep_size), {"config.yaml": config})
        writer.finish()
    return result


def shards(result: Result, world: int, ep_size: int) -> dict[str, dict[str, Tensor]]:
    """The files that all ranks of a world write, by the code that they run."""
    files: dict[str, dict[str, Tensor]] = {}

    class Recorder:
        def begin(self, snapshot: Any, tensors: dict[str, dict[str, Tensor]], *texts: Any) -> None:
            assert not files.keys() & tensors.keys()
            shared = {name: content for name, content in tensors.items() if not callable(content)}
            files.update({name: {k: v.contiguous() for k, v in content.items()} for name, content in shared.items()})

    whole, state = result.parts.state.adapters, result.parts.state
    for rank in range(world):
        topology = Topology(ParallelLayout(world, ep_size), rank, [""] * world, *[None] * 5)  # type: ignore[arg-type]
        held = Bank(list(whole.specs.values()), 8 // ep_size, clients=1, with_grad=False)
        values = {key: value for key, _, value in whole.items(0, with_personal=True)}
        for key, _, place in held.items(topology.shard * held.experts, with_personal=True):
            place.copy_(values[key])
        save(Recorder(), topology, State(1, held, state.personal), {}, "", 0, [])  # type: ignore[arg-type]
    assert len([name for name in files if name.startswith("adapters-")]) == ep_size
    if own := own_tensors(result.parts):
        files["personal-00000-of-00001.safetensors"] = own  # of all clients, as earlier versions wrote it
    return files


def run_logits(result: Result, run: TrainedRun, selection: Selection, ids: np.ndarray) -> Tensor:
    """Logits [S, V] of the run's own model."""
    parts = result.parts
    bank = Bank(list(run.spec.blocks), 8, clients=1, with_grad=False)
    for key, block, place in bank.items(0, with_personal=True):
        place.copy_(run.value(key, block, selection))
    execution, model = parts.execution, parts.trainer.model
    before = execution.bank, execution.pool
    execution.bank, execution.pool = bank, replace(execution.pool, wave_clients=1, merge=False, shared=True)
    try:
        with torch.no_grad():
            hidden = model.forward(model.batch([Rows(0, selection.assignment.cap, [ids], [ids >= 0])]), 0).hidden_BSD
            logits: Tensor = parts.foundation.model.get_output_embeddings()(hidden)[0].float()  # type: ignore[operator]
    finally:
        execution.bank, execution.pool = before
    return logits


def exported(run: Path, out: Path, *options: str) -> Path:
    assert main([str(run), "--out", str(out), *options]) == 0
    return out


@pytest.mark.parametrize("fmt", [FORMATS[0], pytest.param(FORMATS[1], marks=pytest.mark.cluster)])
def test_the_topology_leaves_no_trace(trained: Result, root: Path, tmp_path: Path, fmt: str) -> None:
    folders = [exported(root / "worlds" / name, tmp_path / name, "--format", fmt, "--tier", "4") for name in WORLDS]
    for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert len({(folder / file).read_bytes() for folder in folders}) == 1, file
    assert sorted(path.name for path in folders[0].iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_every_tier_says_what_the_run_says(
    trained: Result, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the code of the card, with the names of two folders put in; a smaller rank is a smaller file of the same scale."""
    folder = root / "worlds" / "4"
    run, ids = open_run(folder), np.arange(2, 30)
    for tier, rank in (("8", 6), ("4", 3), ("2", 1)):
        ours = run_logits(trained, run, run.select(tier), ids)
        for fmt in FORMATS if tier == "4" else FORMATS[:1]:
            out = exported(folder, tmp_path / f"{fmt}-{tier}", "--format", fmt, "--tier", tier, "--base", str(root / "model"))
            line = capsys.readouterr().out
            assert f"{fmt}, tier {tier}, round 1, " in line and f"LoRA of rank {rank}, alpha {1.5 * rank:g}, " in line
            assert (f"vLLM needs --max-lora-rank {1 if rank == 1 else 8}" in line) == (fmt == "peft")
            code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
            space: dict[str, Any] = {}
            exec(code[1].replace("path/to/this/folder", str(out)), space)  # type: ignore[index] # noqa: S102
            with original_rotary(), torch.no_grad():
                found = space["model"].eval()(torch.from_numpy(ids)[None]).logits[0]
            assert float((ours - found).abs().max()) <= TOLERANCE * max(1.0, float(ours.abs().max())), (tier, fmt)
            assert read_adapter(out).rank == rank


def test_rules_of_vllm_and_sglang(trained: Result, root: Path, tmp_path: Path) -> None:
    """Our table of their rules (read in vLLM 0.33.0, `lora/peft_helper.py`, `lora/utils.py`, `lora/layers/fused_moe`, and in
    SGLang 0.5.23, `srt/lora`), without these packages."""
    out = exported(root / "worlds" / "2x2", tmp_path / "out", "--format", "peft")
    config, tensors = json.loads((out / "adapter_config.json").read_text()), load_file(out / "adapter_model.safetensors")
    assert isinstance(config["r"], int) and isinstance(config["lora_alpha"], int) and config["bias"] == "none"
    assert isinstance(config["target_modules"], list) and "target_parameters" not in config
    assert not any(config.get(key) for key in ("modules_to_save", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"))
    experts: dict[str, set[str]] = {}
    for name, value in tensors.items():
        prefix, module, half, weight = name[:17], name[17:].rsplit(".", 2)[0], *name.split(".")[-2:]
        assert prefix == "base_model.model." and weight == "weight" and half in ("lora_A", "lora_B")
        # One rank for everything, on the right axis.
        assert value.shape[0 if half == "lora_A" else 1] == config["r"] and value.dtype == torch.float32
        assert module.rsplit(".", 1)[1] in config["target_modules"]
        if found := re.fullmatch(r"(model\.layers\.\d+\.mlp)\.experts\.(\d+\.\w+)", module):
            experts.setdefault(found[1], set()).add(f"{found[2]}.{half}")
    assert len(experts) == 2
    # All experts of a layer and all three projections: E x 3 x 2.
    wanted = {f"{e}.{name}_proj.lora_{half}" for e in range(8) for name in ("gate", "up", "down") for half in "AB"}
    assert every(found == wanted for found in experts.values())
    place = "base_model.model.model.layers.1.mlp.experts"
    assert every(not tensors[f"{place}.{e}.up_proj.lora_B.weight"].any() for e in UNTRAINED)
    assert every(torch.equal(tensors[f"{place}.{e}.gate_proj.lora_A.weight"], tensors[f"{place}.{e}.up_proj.lora_A.weight"])
                 for e in range(8))  # fmt: skip
    assert [vllm_rank(rank) for rank in (1, 2, 8, 9, 129, 257, 512, 513)] == [1, 8, 8, 16, 256, 320, 512, None]
    assert set(VLLM_RANKS) == {1, 8, 16, 32, 64, 128, 256, 320, 512}


def test_the_card_names_no_client(trained: Result, root: Path, tmp_path: Path) -> None:
    """What it says of clients are counts; nothing of their texts, no name, and no path of this machine."""
    out = exported(root / "worlds" / "1", tmp_path / "out", "--format", "peft", "--tier", "4")
    text = (out / "README.md").read_text()
    matter = yaml.safe_load(text.split("---\n")[1])
    assert matter == {
        "base_model": "model",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["federated-learning", "fedmoe-ds", "lora", "mixture-of-experts"],
    }
    rows = [json.loads(line) for line in (root / "data.jsonl").read_text().splitlines()]
    said = {row["group"] for row in rows} | {
        word for row in rows for key in ("instruction", "output") for word in row[key].split()
    }
    assert len(said) > 20 and not [word for word in said if word in text]
    assert str(root) not in text and "/" + str(root).split("/")[1] + "/" not in (out / "adapter_config.json").read_text()
    run = open_run(root / "worlds" / "1")
    scores = {event["round"]: event for event in run.events if event["event"] == "eval" and event["split"] == "global"
              and event["tier_label"] == "4"}  # fmt: skip
    for words in (
        "4 active experts per token, where the base model's configuration says 8",
        "--hf-overrides '{\"num_experts_per_tok\": 4}'",
        "peft=path/to/this/folder,num_experts_per_tok=4",
        f"A LoRA adapter for `model`, trained by federated learning with fedmoe-ds {__version__}: budget tier 4 after 1 round.",
        "| LoRA | rank 3 of the run's 6, scale 1.5 |",
        "| clients | 6 (2 of tier 8, 2 of tier 4, 2 of tier 2) |",
        f"| perplexity | {scores[0]['perplexity']:.6g} | {scores[1]['perplexity']:.6g} |",
        '"response_header": "\\n\\n### Response:\\n"',
        trained.parts.foundation.fingerprint,
        "HetLoRA (arXiv 2401.06432)",
    ):
        assert words in text, words


def test_a_card_of_chats_and_of_a_run_without_scores(trained: Result, root: Path, tmp_path: Path) -> None:
    """The template goes along as a file, and no text can end the code block that it is shown in."""
    chats = {"template": "chat", "columns": {}, "chat_template": {"origin": "file", "sha256": "5eed", "text": "{{ messages }}"}}
    run = replace(open_run(root / "worlds" / "1"), events=[{"event": "data", "clients": [], "reading": chats}])
    request = Request(run, run.select(), tmp_path, "someone/model")
    write_card(request, Written("peft", "", "as usual", ("One note.",)))
    text = (tmp_path / "README.md").read_text()
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}" and "SHA-256 `5eed`" in text
    assert "This model was not evaluated in its run." in text and text.endswith("as usual\n\n## Notes\n\nOne note.\n")
    assert fenced("a ```` b", "json").startswith("`````json\n")


def test_what_a_lora_file_has_no_place_for(trained: Result, root: Path, tmp_path: Path) -> None:
    run = open_run(root / "worlds" / "2")
    selection, blocks = run.select(), run.spec.blocks
    scaled = replace(selection, assignment=replace(selection.assignment, rescale=2.0))
    masked = replace(selection, assignment=replace(selection.assignment, allowed_LE=np.arange(8)[None] < 4))
    more = {name: [*blocks, BlockSpec(name, (0, 1), (2, 2))] for name in (ROUTER, GATE_UP, INNER, "own.gain")}
    cases: list[tuple[dict[str, Any], Selection, str]] = [
        ({"blocks": more[ROUTER]}, selection, "a trained router is whole weights; use --format merged"),
        ({"blocks": more[GATE_UP]}, selection, "(adapters.expert_training: full) are whole weights; use --format merged"),
        ({"blocks": more[INNER]}, selection, "(adapters.moe) are layers of their own; use --format merged"),
        ({"blocks": more["own.gain"]}, selection, "own.gain is no LoRA pair; use --format merged"),
        ({"method": FLoRA(FLoRA.Params())}, selection, "moves its products into the base model"),
        ({}, masked, "lets tier 8 use some of the experts alone, and neither a LoRA file nor"),
        ({}, scaled, "the rescaler of tier 8 multiplies the experts' output by 2, which no LoRA file can say; use --format"),
    ]  # fmt: skip
    for changes, chosen, words in cases:
        request = Request(replace(run, spec=replace(run.spec, **changes)), chosen, tmp_path, "base")
        with pytest.raises(UserError) as error:
            check_carried("--format: peft", "peft", names_of("olmoe", "test"), request)
        assert str(error.value).startswith("--format: peft: ") and words in str(error.value)
    # Rows in between stay where they are, and the factor of a method is part of the scale.
    rows = np.array([True, False, True, True, False, False])
    between = replace(selection, assignment=replace(selection.assignment, rows_R=rows, scale=2.0))
    assert rank_and_alpha(Request(run, between, tmp_path, "base")) == (6, 18.0)
    odd = replace(
        run, spec=replace(run.spec, config=run.config.model_copy(update={"adapters": AdapterConfig(rank=3, alpha=0.1)}))
    )
    assert 0.1 * 3 / 3 != 0.1 and rank_and_alpha(Request(odd, selection, tmp_path, "base")) == (3, 0.1)


def test_options_are_refused_in_one_line(trained: Result, root: Path, tmp_path: Path) -> None:
    folder, full = root / "worlds" / "1", tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    for options, words in (
        (["--client", "client-000"], "--client: client-000: method hetlora keeps no model per client; drop --client"),
        (["--tier", "3"], "--tier: 3: is no tier of this run; choose among '8', '4', '2'"),
        (["--round", "7"], "--round: 7: no checkpoint of it is kept; there are 1"),
        (["--out", str(full)], "exists already; give another folder, or remove it"),
        (["--out", str(full / "file" / "x")], "cannot be made"),
        (["--dtype", "float16", "--format", "merged"], "--dtype: float16: format merged keeps the types"),
    ):
        with pytest.raises(UserError) as error:
            main([str(folder), "--format", "peft", *options])
        assert words in str(error.value)
    assert sorted(path.name for path in full.iterdir()) == ["file"]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "metrics.jsonl"], "no draft is left behind"


def test_a_number_that_the_type_cannot_hold(
    trained: Result, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "worlds" / "1"
    half = exported(folder, tmp_path / "half", "--format", "peft", "--dtype", "bfloat16")
    assert {value.dtype for value in load_file(half / "adapter_model.safetensors").values()} == {torch.bfloat16}
    value = TrainedRun.value
    monkeypatch.setattr(TrainedRun, "value", lambda *args: 1e6 * value(*args))
    with pytest.raises(UserError, match=r"--dtype: torch.float16: .* has numbers that it cannot hold; use float32"):
        main([str(folder), "--format", "peft", "--dtype", "float16", "--out", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["half"], "nothing half written is left"


# Models of clients, and the rescaler


def test_a_clients_own_model(root: Path, tmp_path: Path) -> None:
    """FedSA-LoRA: A is everybody's, B is the client's; the folder is this user's alone and names nobody."""
    result = run_alone(make_config(root, "own", BOTH, {"method": {"name": "fedsa-lora"}, "federation": {"budget": "method"}}))
    folder, personal = root / "runs" / "own", result.parts.state.personal
    out = exported(folder, tmp_path / "out", "--format", "peft", "--client", "client-002")
    read = read_adapter(out)
    for key, block, value in result.parts.state.adapters.items(0):
        if not block.personal:
            assert torch.equal(read.read(key), value)
    assert torch.equal(read.read("layers.1.experts.3.down.lora_B"), personal.state(2)["experts.down.lora_B"][1, 3])
    assert "client-00" not in (out / "README.md").read_text() and (out.stat().st_mode & 0o777) == 0o700
    with pytest.raises(UserError, match=r"--client: missing: with method fedsa-lora every client has a model of its own"):
        main([str(folder), "--format", "peft"])


@pytest.mark.cluster
def test_a_learnt_rescaler_is_refused(root: Path, tmp_path: Path) -> None:
    run_alone(make_config(root, "flame", BOTH, {"method": {"name": "flame"}, "federation": {"budget": "method"}}))
    with pytest.raises(
        UserError, match=r"the rescaler of tier 4 multiplies .* by \d\.\d+, which no LoRA file can say; use --fo"
    ):
        main([str(root / "runs" / "flame"), "--format", "peft", "--tier", "4", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
