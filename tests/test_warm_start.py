"""A federation begins with adapters that exist: the model is the old one, whatever method, rank or scale goes on with it."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_inputs import write_dense
from every import every
from federations import Result, alone, build, finish, make_config, run_alone, write_inputs
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedmoe_ds.config import Config
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.export.command import main as export
from fedmoe_ds.federation import session
from fedmoe_ds.federation.build import Parts, load_parts
from fedmoe_ds.federation.evaluation import Score
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.federation.start_source import find_start, open_source
from fedmoe_ds.planner.dry_run import describe
from fedmoe_ds.report import write_report

SHORT: dict[str, Any] = {
    "federation": {"rounds": 1},
    "local": {"max_steps": 1, "lr": 1e-2, "clip": None},
    "evaluation": {"client_sequences": 0, "max_sequences": 4},
    "method": {"name": "fedit"},
}
EXPERTS = ("gate_up", "down")


@dataclass
class World:
    """A folder with a model, data, and runs to start from."""

    root: Path
    runs: dict[str, Result]

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def config(self, name: str, start: Path | str | None, *changes: dict[str, Any]) -> Config:
        return make_config(self.root, name, SHORT, *changes, {"adapters": {"start": None if start is None else str(start)}})

    def begun(self, name: str, start: Path | str, *changes: dict[str, Any]) -> tuple[Parts, Journal, list[Score]]:
        """A run at the beginning of its first round, with the scores of round 0."""
        parts, journal = build(self.config(name, start, *changes), *alone())
        return parts, journal, parts.evaluator.scores(parts.state.personal, False, plain=False)

    def refusal(self, start: Path | str, *changes: dict[str, Any]) -> str:
        with pytest.raises(UserError) as caught:
            self.begun("refused", start, *changes)
        return str(caught.value)


SOURCES: dict[str, dict[str, Any]] = {
    "first": {},
    "router": {"adapters": {"router": "train"}},
    "full": {"adapters": {"expert_training": "full", "attention": []}},
    "flora": {"method": {"name": "flora"}},
    "own": {"method": {"name": "local-only"}},
    "flame": {"method": {"name": "flame"}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("warm")
    write_inputs(root, samples=(14, 9, 7, 5), num_hidden_layers=2, num_experts=4, num_experts_per_tok=2)
    return World(root, {name: run_alone(make_config(root, name, SHORT, changes)) for name, changes in SOURCES.items()})


def last(result: Result) -> dict[str, float]:
    """Loss per tier after the last round."""
    rows = [row for row in result.events if row["event"] == "eval" and row["split"] == "global"]
    return {row["tier_label"]: row["loss"] for row in rows if row["round"] == max(row["round"] for row in rows)}


def losses(rows: list[Score]) -> dict[str, float]:
    return {row.label: row.loss for row in rows if row.split == "global"}


def rest(*values: Any) -> list[Any]:
    """Values for the sweep alone."""
    return [pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.sweep) for value in values]


@pytest.mark.parametrize(
    "method", ["flame", "fedsa-lora", *rest("fedit", "ffa-lora", "lora-fair", "local-only", "centralised")]
)
def test_every_method_begins_with_the_old_model(method: str, world: World) -> None:
    """At every tier, to the bit; clients that keep adapters of their own begin with the global ones."""
    old = world.runs["first"]
    parts, _, rows = world.begun(f"to-{method}", world.folder("first"), {"method": {"name": method}})
    assert losses(rows) == pytest.approx(last(old), rel=0 if not parts.spec.method.personal_models else 1e-12, abs=0)
    new = {key: value for key, block, value in parts.state.adapters.items(0, with_personal=True) if block.pair}
    assert every(torch.equal(value, torch.from_numpy(old.adapters[key])) for key, value in new.items())
    foundation = [row["loss"] for row in old.events if row["event"] == "eval" and row["round"] == 0]
    assert foundation[0] != rows[0].loss, "a start that leaves the foundation as it is would show nothing"


def test_methods_that_spend_ranks_begin_with_it_at_the_largest_budget(world: World) -> None:
    for method in ("hetlora", "flexlora", "fslora"):
        _, _, rows = world.begun(f"to-{method}", world.folder("first"), {"method": {"name": method}})
        assert rows[0].loss == last(world.runs["first"])["2"]


def test_flora_moves_it_into_the_weights(world: World) -> None:
    """Also a rank that its own pairs could not hold; and a run of it goes on with the weights that it left, to the bit."""
    ranks = {"method": {"name": "flora"}, "adapters": {"rank": 2}}
    parts, _, rows = world.begun("to-flora", world.folder("first"), ranks)
    assert rows[0].loss == pytest.approx(last(world.runs["first"])["2"], abs=1e-6)
    assert every(not bool(value.any()) for key, _, value in parts.state.adapters.items(0) if key.endswith("_B"))
    parts, _, rows = world.begun("flora-on", world.folder("flora"), {"method": {"name": "flora"}})
    assert losses(rows) == last(world.runs["flora"])
    theirs = {key: value for key, _, value in world.runs["flora"].parts.state.server["base"].items(0)}
    assert every(torch.equal(value, theirs[key]) for key, _, value in parts.state.server["base"].items(0))


@pytest.mark.parametrize(("rank", "alpha"), [(8, 4.0), (6, 7.0), *rest((4, 2.0), (8, 16.0))])
def test_other_ranks_and_scales(rank: int, alpha: float, world: World) -> None:
    """The old alpha / rank is 2. A scale that differs by a power of two changes no bit; further rows learn."""
    changes = {"adapters": {"rank": rank, "alpha": alpha}}
    parts, journal, rows = world.begun(f"rank-{rank}-{alpha}", world.folder("first"), changes)
    exact = math.frexp(2 * rank / alpha)[0] == 0.5
    assert losses(rows) == pytest.approx(last(world.runs["first"]), rel=0 if exact else 1e-6, abs=0)
    assert parts.start is not None and ("rounded" in parts.start.notes[0]) == (not exact)
    bank = parts.state.adapters
    extra = {name: (bank.client(f"{name}.lora_A", 0)[..., 4:, :], bank.client(f"{name}.lora_B", 0)[..., 4:])
             for name in ("experts.down", "attention.q_proj")}  # fmt: skip
    assert every(bool(a.any()) == (rank > 4) and not bool(b.any()) for a, b in extra.values())
    if rank == 8 and exact:
        finish(parts, journal)
        assert every(bool(b.any()) for _, b in extra.values())


def test_trained_routers_and_whole_experts_are_carried(world: World) -> None:
    for name in ("router", "full"):
        parts, _, rows = world.begun(f"{name}-on", world.folder(name), SOURCES[name])
        assert losses(rows) == last(world.runs[name])
        assert every(
            torch.equal(value, torch.from_numpy(world.runs[name].adapters[key]))
            for key, _, value in parts.state.adapters.items(0)
        )
    # A router that nobody trained begins as the foundation's: the old model, and one more part to train.
    parts, _, rows = world.begun("router-new", world.folder("first"), SOURCES["router"])
    assert losses(rows) == last(world.runs["first"])
    assert parts.start is not None and "without adapters of router, which start as usual" in parts.start.notes[0]


def test_adapter_experts_are_carried(tmp_path: Path) -> None:
    """FFT-MoE, with another method's name on top: the blocks count, not who trained them."""
    write_dense(tmp_path, ("llama",))
    moe = {"method": {"name": "fft-moe"}, "adapters": {"moe": {"experts": 4, "width": 8, "top_k": 2}, "attention": []}}
    moe |= {"foundation": {"path": str(tmp_path / "llama")}, "execution": {"micro_batch_size": None}}
    old = run_alone(make_config(tmp_path, "old", SHORT, moe))
    world = World(tmp_path, {"old": old})
    _, _, rows = world.begun("new", world.folder("old"), moe, {"method": {"name": "fedit"}})
    assert losses(rows) == last(old)
    for top_k in (2, 1):
        fewer = {"adapters": {"moe": {"experts": 4, "width": 8, "top_k": top_k}}}
        parts, _, rows = world.begun(f"top-{top_k}", world.folder("old"), moe, fewer)
        said = f"adapters.moe.top_k was 2 there and is {top_k} here, so it is another model at that budget"
        assert parts.start is not None and (said in parts.start.notes[0]) == (top_k != 2) == (rows[0].loss != last(old)["2"])
    linear = {"adapters": {"moe": {"experts": 4, "width": 8, "top_k": 2, "linear": True}}}
    parts, _, rows = world.begun("linear", world.folder("old"), moe, linear)
    assert parts.start is not None and "adapters.moe.linear was false there and is true here" in parts.start.notes[0]
    assert rows[0].loss != last(old)["2"]
    wider = {"adapters": {"moe": {"experts": 4, "width": 16, "top_k": 2}}}
    assert "shape (8, 32), and this run needs (16, 32)" in world.refusal(world.folder("old"), moe, wider)
    line = world.refusal(world.folder("old"), {"foundation": moe["foundation"]})
    assert "adapters.moe as it was there" in line


def trained_with_peft(world: World, folder: Path, **settings: Any) -> float:
    """Train an adapter with PEFT and save it; its loss on what the federation is scored on."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(world.root / "model", dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings))
    optimizer = torch.optim.AdamW((p for p in peft.parameters() if p.requires_grad), lr=2e-2)
    held = world.runs["first"].parts.data.global_holdout()
    for ids in held.input_ids[:3]:
        tokens = torch.from_numpy(ids.copy())[None]
        peft(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft.save_pretrained(folder)
    nll, count = 0.0, 0
    with torch.no_grad():
        for ids, mask in zip(held.input_ids[:4], held.loss_mask[:4], strict=True):
            logits = peft(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].double()
            told = torch.from_numpy(mask[1:])
            nll += float(torch.nn.functional.cross_entropy(logits[told], torch.from_numpy(ids[1:])[told], reduction="sum"))
            count += int(told.sum())
    return nll / count


PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("experts", [False, True])
def test_an_adapter_trained_with_peft(experts: bool, world: World, tmp_path: Path) -> None:
    """The federation begins at the adapter's own loss."""
    parameters = {"target_parameters": PARAMETERS} if experts else {}
    loss = trained_with_peft(world, tmp_path / "adapter", r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], **parameters)
    parts, _, rows = world.begun(f"peft-{experts}", tmp_path / "adapter")
    assert rows[0].loss == pytest.approx(loss, abs=1e-5)
    assert abs(rows[0].loss - losses_before(world)) > 1e-2
    assert parts.start is not None and parts.start.facts["kind"] == ("peft-fused" if experts else "peft")
    assert ("which start as usual" in parts.start.notes[0]) != experts
    line = world.refusal(tmp_path / "adapter", {"adapters": {"attention": ["v_proj"]}})
    assert "has adapted attention.q_proj" in line and "set adapters.attention=[v_proj, q_proj]" in line


def losses_before(world: World) -> float:
    """Of the foundation, at its own top-k."""
    rows = world.runs["first"].events
    return next(float(row["loss"]) for row in rows if row["event"] == "eval" and row["round"] == 0 and row["tier"] == 2)


@pytest.mark.parametrize("fmt", ["peft", "peft-fused"])
def test_export_start_export_changes_no_bit(fmt: str, world: World, tmp_path: Path) -> None:
    export([str(world.folder("first")), "--format", fmt, "--out", str(tmp_path / "once")])
    parts, journal, rows = world.begun(f"again-{fmt}", tmp_path / "once")
    assert losses(rows) == last(world.runs["first"])
    parts.stop.name = "SIGTERM"  # asked before the first round: a checkpoint of what it begins with
    assert Federation(parts, journal).run().interrupted == "SIGTERM"
    export([str(world.folder(f"again-{fmt}")), "--format", fmt, "--out", str(tmp_path / "twice")])
    once, twice = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("once", "twice"))
    assert once.keys() == twice.keys() and every(torch.equal(value, twice[key]) for key, value in once.items())


def going_on(config: Config, resume: str) -> tuple[Parts, Journal]:
    """As `session.train` does it."""
    runtime, topology = alone()
    folder = Path(config.output) / config.name
    source = session.claim_folder(folder, resume)
    journal = Journal(folder, runtime)
    parts = load_parts(config, runtime, topology, journal.progress, resume=source["checkpoint"])
    session.begin(parts, journal, source["checkpoint"])
    return parts, journal


def _trained_on(run: Path) -> None:
    """With blocks that whoever started from it does not have."""
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(run.parent / "on" / "checkpoints", run / "checkpoints")


def _damaged(run: Path) -> None:
    for path in run.glob("checkpoints/*/adapters-*"):
        path.write_bytes(b"!")


def _emptied(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def test_a_run_goes_on_without_its_start(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(world.folder("full"), tmp_path / "on")
    start = tmp_path / "start"
    shutil.copytree(world.folder("first"), start)
    two = {"federation": {"rounds": 2}}
    straight = finish(*going_on(world.config("straight", start, two), "never"))
    again = world.config("again", start)
    finish(*going_on(again, "never"))
    # Elsewhere, it is the same content.
    shutil.copytree(start, tmp_path / "elsewhere")
    going_on(world.config("again", tmp_path / "elsewhere", two), "auto")
    for other, words in (
        (None, "--resume: adapters.start: None: the checkpoint was started from"),
        (world.folder("flame"), f"{world.folder('flame')}: the checkpoint was started from {start}; set it back"),
    ):
        with pytest.raises(UserError) as caught:
            going_on(world.config("again", other, two), "auto")
        assert words in str(caught.value)
    # Another folder that nothing can be compared with refuses nothing.
    going_on(world.config("again", tmp_path / "typed-wrongly", two), "auto")
    assert "typed-wrongly: no such folder; give a run, " in (said := capsys.readouterr().err) and "; not compared: " in said
    for spoilt in (_trained_on, _damaged, _emptied, shutil.rmtree):
        spoilt(start)
        parts, journal = going_on(world.config("again", f"{start}/", two), "auto")
        assert f"{start}/: not read again, the checkpoint holds what the run began with" in capsys.readouterr().err
        assert parts.identity["adapters.start"] == straight.parts.identity["adapters.start"]
    assert finish(parts, journal).digest == straight.digest
    # The next checkpoint says it, too: nothing is forgotten.
    assert parts.identity["adapters.start"] == straight.parts.identity["adapters.start"] != ""
    with pytest.raises(UserError, match=r"adapters\.start: .*: no such folder; give a run"):
        going_on(again.model_copy(update={"name": "new"}), "auto")


def test_merged_weights_go_on(world: World, tmp_path: Path) -> None:
    """The first checkpoint holds the weights that the start has changed, and they come back with the start and without it."""
    start = tmp_path / "start"
    shutil.copytree(world.folder("first"), start)
    shutil.copytree(world.folder("flora"), tmp_path / "on")
    flora = {"method": {"name": "flora"}, "federation": {"rounds": 1}}
    first = finish(*going_on(world.config("flora-again", start, flora), "never")).parts.state.server["base"]
    expected = {key: value.clone() for key, _, value in first.items(0)}
    # With the start, when that has merged weights of its own, and without it.
    for spoil in (lambda: None, lambda: _trained_on(start), lambda: shutil.rmtree(start)):
        spoil()
        parts, journal = going_on(world.config("flora-again", start, flora, {"federation": {"rounds": 2}}), "auto")
        journal.close()
        assert every(torch.equal(value, expected[key]) for key, _, value in parts.state.server["base"].items(0))


def test_the_record_says_so(world: World) -> None:
    parts, journal = build(world.config("told", world.folder("flame")), *alone())
    result = finish(parts, journal)
    begun = next(row for row in result.events if row["event"] == "run")["start"]
    assert begun["kind"] == "run" and begun["name"] == "flame" and begun["method"] == "flame" and begun["round"] == 1
    assert begun["sha256"] == parts.identity["adapters.start"] and begun["left"] == ["rescaler"]
    assert "rescaler stays with its clients" in parts.start.notes[0] if parts.start else False
    page = write_report(world.folder("told")).read_text()
    assert "Before is what the run started from (flame after round 1)" in page
    # Trained on: no round of it is the foundation's.
    assert last(result) != last(world.runs["flame"])


def test_what_is_refused(world: World, tmp_path: Path) -> None:
    first = world.folder("first")
    (tmp_path / "empty").mkdir()
    assert "no such folder; give a run, a checkpoint" in world.refusal(tmp_path / "none")
    assert "expected a run, a checkpoint or a folder with adapter_config.json, and it is none" in world.refusal(
        tmp_path / "empty"
    )
    assert "it is a model, which foundation.path takes" in world.refusal(world.root / "model")
    assert "export one client's model (--format peft --client NAME)" in world.refusal(world.folder("own"))
    assert "and no adapter of method fedit holds them; export it (--format merged)" in world.refusal(world.folder("flora"))
    assert "router, which this run does not train and would lose; set adapters.router=train" in world.refusal(
        world.folder("router")
    )
    assert "set adapters.expert_training=full" in world.refusal(world.folder("full"))
    assert "set adapters.expert_training=lora" in world.refusal(first, {"adapters": {"expert_training": "full"}})
    assert "set adapters.experts=true" in world.refusal(first, {"adapters": {"experts": False}})
    assert "adapters.attention=[q_proj, v_proj]" in world.refusal(first, {"adapters": {"attention": []}})
    line = world.refusal(first, {"adapters": {"rank": 2}})
    assert line.startswith("adapters.rank: 2: run first (fedit, round 1)") and "set adapters.rank=4 or more" in line
    shutil.copytree(world.root / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1.0
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    line = world.refusal(first, {"foundation": {"path": str(tmp_path / "model")}})
    assert "was trained on another model (fingerprint " in line
    damaged = tmp_path / "damaged" / "checkpoints" / "round-00001"
    shutil.copytree(first / "checkpoints" / "round-00001", damaged)
    with (damaged / "adapters-00000-of-00001.safetensors").open("ab") as file:
        file.write(b"!")
    assert "the checkpoint is damaged: adapters-" in world.refusal(damaged)
    assert "this run holds no intact checkpoint (checkpoint round-00001 is damaged" in world.refusal(tmp_path / "damaged")


def test_what_is_its_clients_own_is_not_needed(world: World, tmp_path: Path) -> None:
    """Neither by a start nor by its check: it may be unreadable, or damaged."""
    shutil.copytree(world.folder("flame"), tmp_path / "flame")
    folder = tmp_path / "flame" / "checkpoints" / "round-00001"
    next(folder.glob("personal-*")).write_bytes(b"!")
    for start in (tmp_path / "flame", folder):
        parts, _, rows = world.begun("of-another", start, {"method": {"name": "flame"}})
        assert parts.start is not None and parts.start.facts["left"] == []
        assert "what its clients keep for themselves cannot be read here, and stays with them" in parts.start.notes[0]
    whole, _, same = world.begun("of-mine", world.folder("flame"), {"method": {"name": "flame"}})
    assert losses(rows) == losses(same) and whole.start is not None and whole.start.digest == parts.start.digest


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_run(world: World) -> None:
    place = Path(tempfile.mkdtemp(prefix="fedmoe-test-"))
    run = place / "theirs"
    shutil.copytree(world.folder("flame"), run)
    place.chmod(0o755)
    closed = run / "checkpoints" / "round-00001" / "manifest.json"
    try:
        os.setresuid(12345, 12345, 0)
        source = open_source(find_start(str(run)))
        assert source.closed and source.left == () and source.keys
        for path in (closed, run):
            os.setresuid(0, 0, 0)
            path.chmod(0o600)
            os.setresuid(12345, 12345, 0)
            with pytest.raises(UserError, match=r"^adapters\.start: .*Permission denied; ask its owner for an export"):
                find_start(str(run))
    finally:
        os.setresuid(0, 0, 0)
        shutil.rmtree(place)


def test_a_plan_refuses_it_early(world: World, tmp_path: Path) -> None:
    assert describe(world.config("planned", world.folder("first")), 1)
    for start, words in ((tmp_path / "none", "no such folder"), (world.folder("router"), "adapters.router=train")):
        with pytest.raises(UserError, match=words):
            describe(world.config("planned", start), 1)


def on_two_ranks(rank: int, config: Config) -> tuple[str, dict[str, float]]:
    from federations import joined, run_joined

    runtime: Runtime = joined(rank)
    result = run_joined(config, runtime)
    assert result.parts.start is not None
    return result.parts.start.digest, last(result)


@pytest.mark.cluster
def test_two_ranks_begin_with_the_same(world: World) -> None:
    """Each reads the experts that it holds; the digest knows no topology."""
    from distributed import run_distributed

    one = run_alone(world.config("one-rank", world.folder("first")))
    config = world.config("two-ranks", world.folder("first"), {"topology": {"ep_size": 2}})
    assert one.parts.start is not None
    assert run_distributed(on_two_ranks, 2, config) == [(one.parts.start.digest, last(one))] * 2
