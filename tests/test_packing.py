"""Packing: every sample whole and by itself, the gradients of unpacked passes, nobody's bits changed by company.

Legend: see `fedmoe_ds.model.packing`.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_foundation as sparse
import test_foundation_dense as dense
import torch
from dense_inputs import dense_config, write_dense
from every import every
from federations import alone, build, make_config, run_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from test_logits import Hosted

from fedmoe_ds.bench.harness.shapes import find_shape
from fedmoe_ds.bench.packing import command
from fedmoe_ds.bench.packing.systems import make_worker
from fedmoe_ds.bench.packing.workload import PackingWorkload
from fedmoe_ds.clients.batches import Packing, pass_bounds
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.config import Config
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.sequence_checks import check_packing
from fedmoe_ds.foundation.dense import DECODERS
from fedmoe_ds.foundation.families import FAMILIES, packs
from fedmoe_ds.model import per_client_attention
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.batch import Rows
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.packing import PackedSamples
from fedmoe_ds.model.pass_context import Execution
from fedmoe_ds.model.per_client_attention import use_per_client_attention
from fedmoe_ds.planner.workload import resolve

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(LENGTHS)
def test_every_sample_is_whole_and_by_itself(lengths: list[int]) -> None:
    packed = PackedSamples.of(lengths, CPU)
    tokens = sum(lengths)
    assert packed.position_T1.flatten().tolist() == [s for length in lengths for s in range(length)]
    assert len(set(packed.place_T.tolist())) == tokens
    assert sum(samples for samples, _ in packed.groups) == len(lengths)
    # Little padding, whatever the mixture.
    assert sum(samples * width for samples, width in packed.groups) <= sum(max(16, 1.5 * length) for length in lengths)
    # A token holds (sample, position); in its group every row is one sample from its first position on.
    marks = [(1.0 + sample, 1.0 + position) for sample, length in enumerate(lengths) for position in range(length)]
    heads_TH1K = torch.tensor(marks).view(tokens, 1, 1, 2).requires_grad_()
    parts = packed.apart(heads_TH1K)
    seen = []
    for part, (samples, width) in zip(parts, packed.groups, strict=True):
        assert part.shape == (samples, 1, width, 2)
        for row_SK in part.detach()[:, 0].tolist():
            sample = int(row_SK[0][0]) - 1
            seen.append(sample)
            inside = [[1.0 + sample, 1.0 + position] for position in range(lengths[sample])]
            assert row_SK == inside + [[0.0, 0.0]] * (width - lengths[sample])
    assert sorted(seen) == list(range(len(lengths)))
    back_T1HK = packed.together([part.transpose(1, 2) for part in parts])
    assert torch.equal(back_T1HK, heads_TH1K.transpose(1, 2))
    back_T1HK.backward(factor := torch.arange(1.0, 2.0 * tokens + 1).view_as(back_T1HK))
    assert torch.equal(heads_TH1K.grad, factor.transpose(1, 2))


@settings(deadline=None, max_examples=100)
@given(LENGTHS, st.one_of(st.none(), st.integers(1, 6)))
def test_passes_hold_whole_samples_in_order_as_many_as_fit(lengths: list[int], size: int | None) -> None:
    full, tokens = 90, np.array(lengths, dtype=np.int64)
    batch = np.random.default_rng(0).permutation(len(lengths))
    bounds = pass_bounds(batch, size, Packing(full, lambda client: tokens), 7)
    assert bounds[0] == 0 and bounds[-1] == len(batch) and bounds == sorted(set(bounds))
    room = full * (size or len(batch))
    used = [int(tokens[batch[a:b]].sum()) for a, b in itertools.pairwise(bounds)]
    assert every(part <= room for part in used)
    for part, first in zip(used[:-1], bounds[1:-1], strict=True):
        assert part + tokens[batch[first]] > room, "the next sample would have fitted"
    assert len(bounds) <= len(pass_bounds(batch, size))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    write_dense(folder, ("llama",), (13, 9, 5))
    return folder


ONE_STEP: dict[str, Any] = {
    "federation": {"rounds": 1},
    "local": {"max_steps": 1, "batch_size": 6, "clip": None},
    "evaluation": {"client_sequences": 0, "every": 9},
}
TRAINED: dict[str, dict[str, Any]] = {
    "sparse": {"adapters": {"router": "train"}, "local": {"z_loss": 0.1}},
    "dense": {"adapters": {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "method": {"auxiliary": "none"}},
}


def gradients(root: Path, kind: str, packing: bool, micro: int | None) -> tuple[dict[str, torch.Tensor], int]:
    """Of every block of every client after one step of a wave of three; and the passes it took."""
    found: dict[str, torch.Tensor] = {}

    def keep(view: ClientView) -> None:
        for spec in view.blocks():
            found[f"{view.client.name}/{spec.name}"] = view.grad(spec).clone()

    change = {"execution": {"packing": packing, "micro_batch_size": micro}}
    make = make_config if kind == "sparse" else lambda *rest: dense_config(rest[0], "llama", *rest[1:])
    parts, journal = build(make(root, f"{kind}-{packing}-{micro}", ONE_STEP, TRAINED[kind], change), *alone())
    passes, inner = [], parts.trainer._run
    parts.trainer._run = lambda *rest: (passes.append(1), inner(*rest))[1]  # type: ignore[method-assign]
    parts.trainer.hooks = replace(parts.trainer.hooks, adjust=(keep,))
    parts.trainer.train([parts.clients], 1, parts.state.adapters, parts.state.personal.state, parts.training_data.train)
    journal.close()
    return found, len(passes)


@pytest.mark.parametrize("kind", TRAINED)
def test_gradients_are_those_of_unpacked_passes(root: Path, kind: str) -> None:
    expected, _ = gradients(root, kind, False, None)
    assert len({key.split("/")[0] for key in expected}) == 3 and any("attention" in key for key in expected)
    taken = {}
    for micro in (None, 2):
        found, taken[micro] = gradients(root, kind, True, micro)
        assert found.keys() == expected.keys()
        for client in {key.split("/")[0] for key in found}:
            ours, theirs = (
                torch.cat([part[key].flatten().double() for key in sorted(part) if key.startswith(f"{client}/")])
                for part in (found, expected)
            )
            assert float(theirs.norm()) > 1e-3
            assert float((ours - theirs).norm() / theirs.norm()) <= 1e-6, (client, micro)
    assert taken[2] > taken[None]


def test_company_leaves_no_trace_in_a_dense_model(root: Path) -> None:
    """Waves of one and of three clients: the same bits, in training and in evaluation; OLMoE's: tests/test_topologies.py."""
    change: dict[str, Any] = {"federation": {"rounds": 1}, "execution": {"packing": True, "micro_batch_size": 1}}
    flights = [{"execution": {"clients_in_flight": flight}} for flight in (1, 3)]
    results = [
        run_alone(dense_config(root, "llama", f"flight-{i}", change, TRAINED["dense"], one)) for i, one in enumerate(flights)
    ]
    assert results[0].digest == results[1].digest and results[0].scores() == results[1].scores()


WINDOW = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}
SPARSE = {name: config for name, (config, _) in sparse.FAMILIES.items() if packs(config().model_type) and "-" not in name}
DENSE = {name: config for name, (config, _) in dense.FAMILIES.items() if packs(config().model_type)}
WINDOWED = {"mixtral", "qwen3_moe", "qwen2_moe", "mistral", "qwen2", "qwen3"}


def test_every_family_packs_or_is_refused_by_name() -> None:
    refused = {name for name, family in FAMILIES.items() if not family.packs}
    assert refused == {"minimax_m3_vl_text", "qwen3_5_moe_text"}
    assert {config().model_type for config in SPARSE.values()} == set(FAMILIES) - refused
    assert {config().model_type for config in DENSE.values()} == set(DECODERS)
    for config in [*sparse.FAMILIES.values(), dense.FAMILIES["vit"]]:
        model = config[0]()
        if packs(model.model_type):
            check_packing(packing_config(), model)
            continue
        with pytest.raises(
            UserError, match=rf"^execution.packing: true: the foundation is a '{model.model_type}' model: .*; use"
        ):
            check_packing(packing_config(), model)


def packing_config(template: str = "instruction") -> Config:
    return Config.model_validate({"execution": {"packing": True}, "data": {"template": template}})


def test_documents_are_packed_already(root: Path) -> None:
    with pytest.raises(UserError, match=r"^execution.packing: true: documents \(data.template=text\) .*; use false"):
        check_packing(packing_config("text"), None)
    # With `auto` only the data say that they are documents.
    for template in ("text", "auto"):
        change = {"execution": {"packing": True}, "data": {"template": template, "columns": {"text": "output"}}}
        with pytest.raises(UserError, match=r"^execution.packing: true: documents"):
            resolve(make_config(root, "documents", change))
    check_packing(Config.model_validate({"data": {"template": "text"}}), dense.FAMILIES["vit"][0]())


def model_of(family: str, folder: Path, **keys: Any) -> AdaptedModel:
    """A model of a family with zero adapters, whose configuration also says this."""
    if family in DENSE:
        dense.save(type(DENSE[family]())(**{**dense.TEXT, **keys}), folder)
        execution = Execution(Bank([], 1, 2), Pool(None, 1, 1, 2, merge=True), 1.0)
        return AdaptedModel(dense.load(folder), execution)
    config = SPARSE[family]()
    sparse.save_model(type(config)(**{**config.to_dict(), "layer_types": None, **keys}), folder)
    train_tokenizer(["import this"], sparse.VOCAB).save_pretrained(folder)
    hosted = Hosted(folder, 1, 0, merge=True)
    return AdaptedModel(hosted.foundation, hosted.execution)


@pytest.mark.parametrize("family", [*SPARSE, *DENSE])
def test_a_sample_sees_itself_alone(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients with samples of many lengths, against every sample in a pass of its own; windows stay what they are."""
    model = model_of(family, tmp_path / family, **(WINDOW if family in WINDOWED else {}))
    draw = np.random.default_rng(0)
    ids = [draw.integers(2, sparse.VOCAB, size=length) for length in (5, 21, 9, 34, 2, 17)]
    parts = [Rows(slot, model.foundation.top_k or 1, some, [np.arange(len(seq)) > 0 for seq in some])
             for slot, some in enumerate((ids[:4], ids[4:]))]  # fmt: skip
    alone = [replace(part, input_ids=[seq], loss_mask=[mask])
             for part in parts for seq, mask in zip(part.input_ids, part.loss_mask, strict=True)]  # fmt: skip
    with torch.no_grad():
        expected_N = torch.cat([model.forward(model.batch([one]), None).nll_N for one in alone])
        use_per_client_attention(model.foundation.model, model.execution)
        packed, windows = replace(model, packing=True), []
        inner = per_client_attention._banded
        monkeypatch.setattr(
            per_client_attention,
            "_banded",
            lambda width, window, device: (windows.append(window), inner(width, window, device))[1],
        )
        batch = packed.batch(parts)
        found_N = packed.forward(batch, None).nll_N
        # An idle rank's stand-in goes through the same functions, unpacked.
        assert packed.forward(packed.batch([]), None).hidden_BSD.isfinite().all()
    assert batch.input_ids.shape == (sum(map(len, ids)), 1) and bool(batch.valid_T.all())
    assert set(windows) == ({6} if family in WINDOWED else set())
    assert len(expected_N) == len(found_N) and float((found_N - expected_N).abs().max()) <= 1e-5


def test_the_planner_knows_the_passes(root: Path) -> None:
    changes = [{"execution": {"packing": packing, "micro_batch_size": 2}} for packing in (False, True)]
    unpacked, packed = (resolve(make_config(root, "plan", ONE_STEP, change)) for change in changes)
    passes = [int(packed.steps(client, 1).passes[0]) for client in packed.clients]
    assert max(passes) == gradients(root, "sparse", True, 2)[1]
    for client, few in zip(unpacked.clients, passes, strict=True):
        steps = unpacked.steps(client, 1)
        assert few <= steps.passes.tolist()[0] == -(-steps.samples[0] // 2)
        assert steps.rows.tolist() == packed.steps(client, 1).rows.tolist()


class Here:
    """A system of the benchmark in this process."""

    def __init__(self, name: str) -> None:
        self.worker = make_worker(name)

    def ask(self, do: str, **request: Any) -> Any:
        return getattr(self.worker, do)(**request)


def test_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "workers", lambda module, names: nullcontext({name: Here(name) for name in names}))
    workload = PackingWorkload(find_shape("tiny"), 2, 1, 6, 30, 60, 128, 0)
    rows = command.run_packing(workload, [1], 1, lambda text: None)
    assert [row["system"] for row in rows] == ["unpacked, whole steps", "packed, whole steps", "unpacked, 1", "packed, 1"]
    assert [row["passes"] for row in rows[:3]] == [1, 1, 6] and 2 <= rows[3]["passes"] < 6
    assert [row["padding"] > 0 for row in rows] == [True, False, True, False]
    assert "2 clients in flight, micro_batch_size=1: packed runs" in command.COMMAND.show(rows).text()
    with pytest.raises(UserError, match=r"^--longest: 70: use 64 or less"):
        PackingWorkload(find_shape("tiny"), 1, 1, 2, 30, 70, 64, 0)
