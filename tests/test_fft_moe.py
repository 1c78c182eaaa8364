"""FFT-MoE: the foundation's logits at the start, budgets, routing losses, equal bits on any topology, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_inputs import DIGITS, EXPERTS, FAMILIES, TOP_K, TREE, WIDTH, dense_config, write_dense
from distributed import run_distributed
from federations import Result, alone, build, finish, joined, make_config, run_alone, run_joined
from launching import refused, run
from test_methods_resume import StopsAfter, start
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from fedmoe_ds.config import AdapterConfig, Config, FoundationConfig, MoEAdapterConfig
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.topology import Topology, build_topology
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.federation.run_spec import check_plan
from fedmoe_ds.foundation import load_foundation
from fedmoe_ds.methods import Method, ModelFacts, method_for
from fedmoe_ds.methods.fft_moe import divergence, unevenness
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.adapter_moe_layer import INNER, OUTER, AdapterMoELayer, SelectedSoftmax
from fedmoe_ds.model.batch import Rows, make_batch
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.expert_layout import adapter_layout
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.install import adapter_blocks, initial_bank, install
from fedmoe_ds.model.moe_layer import ROUTER
from fedmoe_ds.model.pass_context import Execution, Pass
from fedmoe_ds.model.router import Routing, route

pytestmark = pytest.mark.timeout(600)

CAPS = (1, 4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fft-moe")
    write_dense(folder, tuple(FAMILIES))
    return folder


class Hosted:
    """A dense model with adapter experts for two clients of unequal budgets, in one fused pass."""

    def __init__(self, folder: Path, scored: bool = False, **forms: Any) -> None:
        self.foundation = load_foundation(folder, FoundationConfig(), 1, 0, "cpu")
        self.images = self.foundation.images
        moe = MoEAdapterConfig(**{"experts": EXPERTS, "width": WIDTH, "top_k": TOP_K} | forms)
        adapters = AdapterConfig(attention=[], moe=moe)
        places = adapter_layout(self.foundation.sites, moe, 1, 0)
        blocks = adapter_blocks(self.foundation.model, places, adapters, None, scored)
        pool = Pool(None, 1, moe.experts, len(CAPS), merge=True)
        self.bank = Bank(blocks, moe.experts, len(CAPS))
        self.execution = Execution(self.bank, pool, 1.0)
        start = initial_bank(self.foundation, blocks, 0, places.held)
        for name in self.bank.specs:
            place = self.bank.broadcast(name)
            place.copy_(start.broadcast(name).expand_as(place))
        install(self.foundation, adapters, self.execution)

    def rows(self, client: int) -> Rows:
        draw = np.random.default_rng(client)
        if self.images is not None:
            pixels = draw.standard_normal((2 + client, *self.images.shape)).astype(np.float32)
            labels = np.zeros(len(pixels), dtype=np.int64)
            return Rows(client, CAPS[client], [], [], pixels=pixels, labels=labels, positions=self.images.positions)
        ids = [draw.integers(2, 300, size=length) for length in draw.integers(3, 21, size=2 + client)]
        return Rows(client, CAPS[client], ids, [np.arange(len(seq)) > 0 for seq in ids])

    @torch.no_grad()
    def logits(self, parts: list[Rows]) -> tuple[list[torch.Tensor], Pass]:
        """Per sample, of the positions that predict, and what the pass counted."""
        batch = make_batch(parts, torch.device("cpu"), self.images)
        result = AdaptedModel(self.foundation, self.execution).forward(batch, None)
        sizes = [len(ids) - 1 for part in parts for ids in part.input_ids] if self.images is None else 1
        return list(result.logits_NV.split(sizes)), result.run


def hugging_faces(folder: Path, parts: list[Rows]) -> list[torch.Tensor]:
    """The dense model's own logits of every sample, each of them alone."""
    factory: Any = AutoModelForImageClassification if folder.name == "vit" else AutoModelForCausalLM
    model = factory.from_pretrained(folder).eval()
    with torch.no_grad():
        if folder.name == "vit":
            return [model(pixel_values=torch.from_numpy(p)[None]).logits for part in parts for p in part.pixels]  # type: ignore[union-attr]
        return [model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1] for part in parts for ids in part.input_ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_foundation(root: Path, family: str) -> None:
    """V = 0: whatever router and budget, nothing is added; and with V it is."""
    hosted = Hosted(root / family)
    hosted.bank.values[ROUTER].copy_(torch.randn(hosted.bank.values[ROUTER].shape, generator=torch.Generator().manual_seed(1)))
    assert bool(hosted.bank.values[INNER].any()) and not bool(hosted.bank.values[OUTER].any())
    parts = [hosted.rows(0), hosted.rows(1)]
    expected = hugging_faces(root / family, parts)
    found, run_ = hosted.logits(parts)
    assert max(float(theirs.abs().max()) for theirs in expected) > 0.3
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5
    for counts_CE in run_.counts.values():
        assert counts_CE.sum(1).tolist() == [part.tokens * cap for part, cap in zip(parts, CAPS, strict=True)]
    hosted.bank.values[OUTER].copy_(torch.randn(hosted.bank.values[OUTER].shape, generator=torch.Generator().manual_seed(2)))
    changed, _ = hosted.logits(parts)
    for ours, theirs in zip(changed, expected, strict=True):
        assert float((ours - theirs).abs().max()) > 1e-2


def test_one_active_expert_is_the_best_one_alone(root: Path) -> None:
    """With k = 1 every row gets its best expert with weight one, next to a client whose rows use four."""
    hosted = Hosted(root / "llama")
    hosted.bank.values[OUTER].copy_(torch.randn(hosted.bank.values[OUTER].shape, generator=torch.Generator().manual_seed(2)))
    layer = hosted.foundation.sites[0].module(hosted.foundation.model)
    assert isinstance(layer, AdapterMoELayer)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output - module.frozen(inputs[0]))))  # type: ignore[operator]
    parts = [hosted.rows(0), hosted.rows(1)]
    _, run_ = hosted.logits(parts)
    ((x_BSD, added_BSD),) = seen
    used = torch.zeros(EXPERTS, dtype=torch.int64)
    for b, ids in enumerate(parts[0].input_ids):
        for x_D, added_D in zip(x_BSD[b, : len(ids)], added_BSD[b, : len(ids)], strict=True):
            best = int((hosted.bank.value(ROUTER, 0)[0] @ x_D).argmax())
            inner, outer = hosted.bank.value(INNER, 0)[best, 0], hosted.bank.value(OUTER, 0)[best, 0]
            assert torch.allclose(added_D, outer @ torch.nn.functional.gelu(inner @ x_D), atol=1e-4)
            used[best] += 1
        assert not bool(added_BSD[b, len(ids) :].any()), "padding is not routed"
    assert run_.counts[0][0].tolist() == used.tolist() and int((used > 0).sum()) > 1


def test_the_gates_are_a_softmax_over_the_selected() -> None:
    logits_TE = torch.randn(6, EXPERTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    cap_T = torch.tensor([1, 1, 2, 3, 4, 4])
    valid_T = torch.tensor([True] * 5 + [False])
    routing = route(logits_TE, SelectedSoftmax(EXPERTS, TOP_K), cap_T, valid_T)
    assert routing.kept_TK.sum(1).tolist() == [1, 1, 2, 3, 4, 0]
    for row, cap in enumerate(cap_T.tolist()[:5]):
        best = logits_TE[row].topk(cap)
        assert routing.experts_TK[row, :cap].tolist() == best.indices.tolist()
        assert torch.allclose(routing.weights_TK[row, :cap].double(), best.values.softmax(0), atol=1e-6)


def test_an_expert_that_nobody_uses_keeps_its_value(root: Path) -> None:
    moe = {"experts": 64, "width": 8, "top_k": 1}
    few = {"adapters": {"moe": moe}, "method": {"auxiliary": "none"}, "federation": {"rounds": 1}, "local": {"max_steps": 2}}
    parts, journal = build(dense_config(root, "llama", "unused", few), *alone())
    before = {key: value.clone().numpy() for key, _, value in parts.state.adapters.items(0)}
    after = finish(parts, journal).adapters
    used_LE = parts.state.utilisation_LE
    assert used_LE is not None and 0 < int((used_LE == 0).sum()) < used_LE.size
    for layer, row in enumerate(used_LE):
        for expert, count in enumerate(row):
            inner, outer = (f"layers.{layer}.experts.{expert}.{name}.weight" for name in ("inner", "outer"))
            same = [np.array_equal(before[key], after[key]) for key in (inner, outer)]
            assert count > 0 or same == [True, True], (layer, expert)
            # In the last layer, rows that predict nothing teach nothing; in the first one they reach later rows.
            assert layer > 0 or count < 8 or not same[1], (layer, expert, count)
    assert used_LE[0].max() >= 8


def method(**params: Any) -> Method:
    tree = TREE | {"method": {"name": "fft-moe", **params}}
    found = method_for(Config.model_validate(tree))
    found.facts = ModelFacts(2, 4, 8, 0, True, (0, 3))
    return found


def test_targets_prefer_what_is_used_too_little() -> None:
    found: Any = method(auxiliary="global", epsilon=0.1)
    assert torch.equal(found.targets(None), torch.full((2, 4), 0.25))
    q_LE = found.targets(np.array([[70, 20, 10, 0], [5, 5, 5, 5]]))
    assert torch.allclose(q_LE.sum(1), torch.ones(2))
    # 1/4 - (0.7, 0.2, 0.1, 0), not below 0, plus 0.1/4; their sum is 0.55
    assert torch.allclose(q_LE[0], torch.tensor([0.025, 0.075, 0.175, 0.275]) / 0.55)
    assert torch.allclose(q_LE[1], torch.full((4,), 0.25)), "even use has an even target"
    assert torch.allclose(found.targets(np.zeros((2, 4), dtype=np.int64))[0], torch.full((4,), 0.25)), "no use at all"


def routing_of(experts_TK: list[list[int]], probs_TE: torch.Tensor, kept: bool = True) -> Routing:
    chosen_TK = torch.tensor(experts_TK)
    return Routing(probs_TE, torch.ones(chosen_TK.shape), chosen_TK, torch.full(chosen_TK.shape, kept))


def test_unevenness_and_divergence() -> None:
    even_TE = torch.full((4, 4), 0.25)
    assert unevenness(routing_of([[0, 1], [2, 3], [1, 0], [3, 2]], even_TE)) == 0.0
    assert unevenness(routing_of([[0, 1]] * 4, even_TE)) == pytest.approx(1.0)  # counts 4 4 0 0: mean 2, deviation 2
    assert unevenness(routing_of([[2]] * 4, even_TE)) == pytest.approx(3**0.5)
    assert unevenness(routing_of([[0]] * 4, even_TE, kept=False)) == 0.0
    p_TE = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.2, 0.2, 0.3, 0.3], [1.0, 0.0, 0.0, 0.0]], requires_grad=True)
    valid_T = torch.tensor([True, True, False])
    routing = routing_of([[0]] * 3, p_TE)
    equal = divergence(routing, valid_T, torch.tensor([0.4, 0.2, 0.2, 0.2]))
    assert float(equal.detach()) == pytest.approx(0.0, abs=1e-7)
    value = divergence(routing, valid_T, torch.full((4,), 0.25))
    assert float(value.detach()) == pytest.approx(0.4 * np.log(1.6) + 0.6 * np.log(0.8), rel=1e-5)
    value.backward()  # type: ignore[no-untyped-call]
    assert p_TE.grad is not None and not bool(p_TE.grad[2].any()), "padding does not count"
    assert float(divergence(routing, torch.zeros(3, dtype=torch.bool), torch.full((4,), 0.25)).detach()) == 0.0


# Topologies and resuming.

SMALL: dict[str, Any] = {
    "federation": {"rounds": 2, "participation": 0.8},
    "local": {"max_steps": 2},
    "execution": {"clients_in_flight": 2},
    "evaluation": {"max_sequences": 2, "client_sequences": 0, "every": 9},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "global": ("llama", {"method": {"auxiliary": "global", "coefficient": 0.1}, "federation": {"rounds": 3}}),
    "adaptive": ("llama", {"method": {"coefficient": 0.1}, "adapters": {"attention": ["q_proj", "v_proj"]}}),
    "switch": ("vit", {"method": {"auxiliary": "switch", "coefficient": 0.1}}),
    "images-global": ("vit", {"method": {"auxiliary": "global", "coefficient": 0.1}}),
    "none": ("vit", {"method": {"auxiliary": "none"}, "adapters": {"moe": {"width": 20}}}),
    # With widths and numbers of rows that no rank has whole units of.
    "ranks": (
        "vit",
        {
            "method": {"name": "mor", "alpha": 0.1},
            "adapters": {"moe": {"width": 1, "linear": True, "shared": 3, "zero": 3, "router_input": "sample"}},
            "data": {"form": {"kind": "degraded"}},
        },
    ),
}


def variant(root: Path, name: str, tag: str, ep_size: int = 1, *changes: dict[str, Any]) -> Config:
    family, change = VARIANTS[name]
    return dense_config(root, family, f"{name}-{tag}", SMALL, change, {"topology": {"ep_size": ep_size}}, *changes)


def told(result: Result) -> tuple[str, list[tuple[Any, ...]]]:
    return result.digest, result.scores()


@pytest.fixture(scope="module")
def single(root: Path) -> dict[str, Result]:
    return {name: run_alone(variant(root, name, "single")) for name in VARIANTS}


@pytest.fixture(scope="module")
def stopped(root: Path, single: dict[str, Result]) -> list[str]:
    """Tags of runs that have stopped: inside round 2, after the first of its waves, and after round 1."""
    parts, journal = start(variant(root, "global", "inside"), *alone(), "never")
    per_round = len(parts.participants(1))
    parts.training_data = StopsAfter(parts, per_round + 2)
    outcome = Federation(parts, journal).run()
    journal.close()
    assert outcome.interrupted == "SIGTERM" and parts.state.partial is not None and parts.state.round == 1
    assert 0 < len(parts.state.partial.done) < per_round
    one_round = {"federation": {"rounds": 1}, "evaluation": {"every": 1}}
    run_alone(variant(root, "global", "between", 1, one_round))
    return ["inside", "between"]


def resumed(root: Path, tag: str, again: str, ep_size: int, runtime: Runtime, topology: Topology | None = None) -> Result:
    """The end of a stopped run, from a copy of its folder."""
    config = variant(root, "global", again, ep_size)
    if runtime.is_main:
        folder = Path(config.output)
        shutil.copytree(folder / variant(root, "global", tag).name, folder / config.name)
    runtime.gather(None)
    return finish(*start(config, runtime, topology or build_topology(config.topology, runtime), "auto"))


def on_ranks(rank: int, root: Path, ep_sizes: list[int], tags: list[str]) -> dict[str, Any]:
    runtime = joined(rank)
    found: dict[str, Any] = {}
    for ep_size in ep_sizes:
        for name in VARIANTS:
            config = variant(root, name, f"{runtime.world_size}-{ep_size}", ep_size)
            found[f"{name}/{ep_size}"] = told(run_joined(config, runtime))
    for tag in tags:
        found[f"global/{tag}"] = resumed(root, tag, f"{tag}-2", 2, runtime).digest
    return found


def check(found: list[dict[str, Any]], single: dict[str, Result]) -> None:
    for by_job in found:
        for job, outcome in by_job.items():
            expected = single[job.split("/")[0]]
            assert outcome == (expected.digest if isinstance(outcome, str) else told(expected)), job


def test_the_variants_differ(single: dict[str, Result]) -> None:
    assert len({result.digest for result in single.values()}) == len(VARIANTS)
    for result in single.values():
        assert {client.top_k for client in result.parts.clients} == {4, 2, 1}


def test_two_ranks(root: Path, single: dict[str, Result], stopped: list[str]) -> None:
    check(run_distributed(on_ranks, 2, root, [1, 2], stopped, timeout_s=540.0), single)


@pytest.mark.cluster
def test_four_ranks(root: Path, single: dict[str, Result]) -> None:
    check(run_distributed(on_ranks, 4, root, [2], [], timeout_s=540.0), single)


@pytest.mark.parametrize("tag", ["inside", "between"])
def test_resume(root: Path, single: dict[str, Result], stopped: list[str], tag: str) -> None:
    result = resumed(root, tag, f"{tag}-again", 1, *alone())
    assert result.digest == single["global"].digest
    used = result.parts.state.utilisation_LE
    assert used is not None and np.array_equal(used, single["global"].parts.state.utilisation_LE)  # type: ignore[arg-type]


def test_a_forgotten_utilisation_would_show(root: Path, single: dict[str, Result], stopped: list[str]) -> None:
    config = variant(root, "global", "forgets")
    shutil.copytree(Path(config.output) / variant(root, "global", "inside").name, Path(config.output) / config.name)
    parts, journal = start(config, *alone(), "auto")
    assert parts.state.utilisation_LE is not None
    parts.state.utilisation_LE = None
    assert finish(parts, journal).digest != single["global"].digest


# Refusals.

LLAMA: dict[str, Any] = {"foundation": {"path": None, "preset": "tiny-llama"}}
VIT: dict[str, Any] = {"foundation": {"path": None, "preset": "tiny-vit"}}
OLMOE: dict[str, Any] = {"foundation": {"path": None, "preset": "tiny-olmoe"}}
NO_POOL: dict[str, Any] = {"adapters": {"moe": None}}
FLAME: dict[str, Any] = {"method": {"name": "flame"}}
REFUSALS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "two pools": ([OLMOE], r"adapters\.moe: tiny-olmoe has experts of its own; drop the section, or use a dense foundation"),
    "no pool": (
        [LLAMA, NO_POOL, FLAME],
        r"adapters\.attention: \[\]: tiny-llama is dense and has no experts, so nothing would be trained; name projections",
    ),
    "no section": ([LLAMA, NO_POOL], r"adapters\.moe: null: FFT-MoE trains adapter experts .*; add the section"),
    "text for a ViT": (
        [VIT],
        r"data\.source: .*: plain text, and the foundation is an image classifier.*; use data\.source=digits",
    ),
    "images for a Llama": (
        [LLAMA, {"data": DIGITS}],
        r"data\.source: digits: labelled images.*; use foundation\.preset=tiny-vit",
    ),
    "images for an OLMoE": (
        [OLMOE, NO_POOL, FLAME, {"data": DIGITS}],
        r"data\.source: digits: labelled images, and the foundation is a causal language model; ",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(root: Path, tmp_path: Path, case: str) -> None:
    changes, expected = REFUSALS[case]
    cache = {"foundation": {"cache": str(tmp_path)}, "output": str(tmp_path / "runs")}
    config = make_config(root, "refused", json.loads(json.dumps(TREE)), *json.loads(json.dumps(changes)), cache)
    with pytest.raises(UserError, match=expected) as refused:
        build(config, *alone())
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "foundations").exists(), "refused before any pre-training"


def test_experts_must_divide(root: Path) -> None:
    config = dense_config(root, "llama", "shards", {"topology": {"ep_size": 3}})
    with pytest.raises(UserError, match=r"^adapters\.moe\.experts: 8: not divisible by topology\.ep_size 3; "):
        check_plan(config, bitwise=True)


COMMAND: dict[str, tuple[int, dict[str, Any], str]] = {
    "two pools": (0, OLMOE, "adapters.moe: tiny-olmoe has experts of its own"),
    "budget": (0, {**LLAMA, "adapters": {"moe": {"top_k": 9}}}, "adapters.moe.top_k: 9: more than the 8 experts"),
    "shards": (
        2,
        {**LLAMA, "topology": {"ep_size": 2}, "adapters": {"moe": {"experts": 7}}},
        "adapters.moe.experts: 7: not divisible by topology.ep_size 2",
    ),
}


@pytest.mark.parametrize("case", COMMAND)
def test_the_command_refuses_before_any_pre_training(tmp_path: Path, case: str) -> None:
    ranks, change, expected = COMMAND[case]
    tree: dict[str, Any] = json.loads(json.dumps({**TREE, **change, "name": "refused", "output": str(tmp_path / "runs")}))
    tree["adapters"] = json.loads(json.dumps(TREE["adapters"]))
    tree["adapters"]["moe"].update(change.get("adapters", {}).get("moe", {}))
    tree["foundation"]["cache"] = str(tmp_path / "cache")
    line = run(tree, tmp_path, ranks).mistake() if ranks else refused(tree, tmp_path)
    assert line.startswith(f"error: {expected}"), line
    assert not (tmp_path / "cache" / "foundations").exists()
