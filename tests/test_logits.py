"""Zero adapters change nothing: logits of the federated model are Hugging Face's, for every family, ep_size and batching.

Every rank of an expert-parallel group has other sequences of other lengths, and one rank has none at all. Rows under a cap
equal a Hugging Face model whose own top-k is the cap. Legend: see `fedmoe_ds.model.moe_layer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_distributed
from every import every
from safetensors.torch import load_file, save_file
from test_foundation import EXPERTS, FAMILIES, TOLERANCE, VOCAB, save_model
from transformers import AutoModelForCausalLM

from fedmoe_ds.config import AdapterConfig, FoundationConfig
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.distributed import process_groups
from fedmoe_ds.foundation import Foundation, load_foundation
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.batch import Batch, Rows, make_batch
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.expert_layout import hosted_layout
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.install import adapter_blocks, initial_bank, install
from fedmoe_ds.model.pass_context import Execution, Pass

pytestmark = pytest.mark.timeout(600)

CLIENTS = 2
CAPS = (None, 2, 1)
"""Caps under test; None is the model's own top-k."""

Sequences = list[np.ndarray]


def sequences(rank: int, client: int) -> Sequences:
    """Two or three sequences of unequal lengths."""
    draw = np.random.default_rng([rank, client])
    return [draw.integers(2, VOCAB, size=length) for length in draw.integers(3, 21, size=2 + client)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model folder per family, and Hugging Face's logits of every sequence alone, without padding, for every cap."""
    folder = tmp_path_factory.mktemp("logits")
    tokenizer = train_tokenizer(["import this"], VOCAB)
    for family, (config, options) in FAMILIES.items():
        save_model(config(), folder / family, **options)
        tokenizer.save_pretrained(folder / family)
        expected = {}
        for cap in CAPS:
            own_k = {} if cap is None else {"num_experts_per_tok": cap}
            model: Any = AutoModelForCausalLM.from_pretrained(folder / family, **own_k).eval()
            for rank in range(4):
                for client in range(CLIENTS):
                    for i, ids in enumerate(sequences(rank, client)):
                        with torch.no_grad():
                            expected[f"{cap}/{rank}/{client}/{i}"] = model(torch.from_numpy(ids)[None]).logits[0].clone()
        save_file(expected, folder / f"{family}.logits")
    return folder


class Hosted:
    """A federated model with zero adapters (A random, B zero) for two clients per rank."""

    def __init__(
        self, folder: Path, ep_size: int, rank: int, merge: bool, dtype: str = "float32", router: str = "train"
    ) -> None:
        self.foundation: Foundation = load_foundation(folder, FoundationConfig(dtype=dtype), ep_size, rank % ep_size, "cpu")
        names = ["q_proj", "v_proj"] if "deepseek" not in folder.name else ["q_a_proj", "kv_b_proj"]
        adapters = AdapterConfig(rank=4, attention=names, router=router)
        blocks = adapter_blocks(self.foundation.model, hosted_layout(self.foundation.layers), adapters, "client")
        group = process_groups.create_groups(ep_size)[0] if ep_size > 1 else None
        pool = Pool(group, ep_size, EXPERTS, ep_size * CLIENTS, merge, shard=rank % ep_size)
        self.execution = Execution(Bank(blocks, EXPERTS // ep_size, CLIENTS, pool.wave_clients), pool, 2.0, rescaler=True)
        start = initial_bank(self.foundation, blocks, 0, self.foundation.layers[0].experts)
        for name, spec in self.execution.bank.specs.items():
            place = self.execution.bank.broadcast(name)
            place.fill_(1.0) if spec.personal else place.copy_(start.broadcast(name).expand_as(place))
        install(self.foundation, adapters, self.execution)

    def logits(self, rows: list[Rows], slot: int | None) -> tuple[torch.Tensor, Batch, Pass]:
        """One pass; [B, S, V] for all positions."""
        batch = make_batch(rows, torch.device("cpu"))
        result = AdaptedModel(self.foundation, self.execution).forward(batch, slot)
        model: Any = self.foundation.model
        return model.get_output_embeddings()(result.hidden_BSD).float(), batch, result.run


def rows_of(rank: int, client: int, cap: int) -> Rows:
    ids = sequences(rank, client)
    return Rows(client, cap, ids, [np.arange(len(seq)) > 0 for seq in ids])


def check(root: Path, family: str, ep_size: int, rank: int, merge: bool, caps: tuple[int | None, ...]) -> None:
    """Every client of this rank under every cap; the last rank of a world is idle in the passes of client 1."""
    hosted = Hosted(root / family, ep_size, rank, merge)
    expected = load_file(root / f"{family}.logits")
    idle = ep_size > 1 and rank == 3
    for cap in caps:
        with torch.no_grad():
            present = [client for client in range(CLIENTS) if not (idle and client == 1)]
            rows = {client: rows_of(rank, client, cap or hosted.foundation.top_k) for client in present}
            passes = (
                [(None, present)] if merge else [(client, [client] if client in present else []) for client in range(CLIENTS)]
            )
            for slot, members in passes:
                logits, batch, run = hosted.logits([rows[client] for client in members], slot)
                compare(logits, members, rank, cap, expected)
                check_counts(batch, run, [rows[client] for client in members])


def compare(logits: torch.Tensor, members: list[int], rank: int, cap: int | None, expected: dict[str, torch.Tensor]) -> None:
    row = 0
    for client in members:
        for i, ids in enumerate(sequences(rank, client)):
            theirs = expected[f"{cap}/{rank}/{client}/{i}"]
            largest = float(theirs.abs().max())
            assert largest > 0.3
            difference = float((logits[row, : len(ids)] - theirs).abs().max())
            # Of the largest where that is above one: what float32 can tell grows with it, and processors add in other orders.
            assert difference <= TOLERANCE * max(1.0, largest), (rank, client, i, cap, difference)
            row += 1


def check_counts(batch: Batch, run: Pass, rows: list[Rows]) -> None:
    """Each valid token is routed `cap` times, padding never."""
    assert not bool(batch.valid_T.all()) or sum(len(part.input_ids) for part in rows) <= 1, "padding takes part"
    for counts_CE in run.counts.values():
        routed = {part.slot: part.tokens * part.cap for part in rows}
        assert counts_CE.sum(1).tolist() == [routed.get(slot, 0) for slot in range(CLIENTS)]


@pytest.mark.parametrize("merge", [False, True], ids=["bitwise", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank(root: Path, family: str, merge: bool) -> None:
    check(root, family, 1, 0, merge, CAPS)


@pytest.mark.parametrize("router", ["frozen", "train"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(root: Path, family: str, router: str) -> None:
    """Families differ in what they keep in float32, and so do versions of transformers. A few tokens are routed otherwise."""
    own: Any = AutoModelForCausalLM.from_pretrained(root / family, dtype=torch.bfloat16).eval()
    hosted = Hosted(root / family, 1, 0, merge=True, dtype="bfloat16", router=router)
    ours, theirs = [], []
    with torch.no_grad():
        logits, _, _ = hosted.logits([rows_of(0, client, hosted.foundation.top_k) for client in range(CLIENTS)], None)
        for row, ids in enumerate(ids for client in range(CLIENTS) for ids in sequences(0, client)):
            ours.append(logits[row, : len(ids)])
            theirs.append(own(torch.from_numpy(ids)[None]).logits[0].float())
    distance_T = torch.cat(ours).sub(torch.cat(theirs)).norm(dim=1) / torch.cat(theirs).norm(dim=1)
    assert distance_T.median() < 0.03, distance_T


def every_family(rank: int, root: Path) -> None:
    torch.distributed.barrier()
    for ep_size in (2, 4):  # 1 is `test_one_rank`
        for merge in (False, True):
            for family in FAMILIES:
                check(root, family, ep_size, rank, merge, CAPS if family in ("olmoe", "qwen3_moe") else (None,))
    for family in ("qwen2_moe", "deepseek_v3"):
        check_training(root, family, rank)


def check_training(root: Path, family: str, rank: int) -> None:
    """Two ranks that share experts are two that have all of them, forward and backward, to the bit, where shared experts are
    computed while rows travel. What both ranks' clients do alone, either of them finds out by itself."""
    logits, together = trained(root / family, 2, rank)
    for home in (rank, rank ^ 1):
        theirs, alone = trained(root / family, 1, home)
        for name, spec in alone.specs.items():
            whole = part(alone.grads[name], spec, experts=of_rank(rank, EXPERTS // 2))
            ours = part(together.grads[name], spec, clients=of_rank(home, CLIENTS)) if spec.expert else together.grads[name]
            assert bool(whole.any()), name
            assert not (spec.expert or home == rank) or torch.equal(ours, whole), (family, name, home)
        assert home != rank or (len(theirs) <= len(logits) and every(map(torch.equal, theirs, logits)))


def trained(folder: Path, ep_size: int, rank: int) -> tuple[list[torch.Tensor], Bank]:
    """Logits of every client of a rank, and the bank with what all passes have added to the gradients of its adapters."""
    hosted, found = Hosted(folder, ep_size, rank, merge=False), []
    numbers, bank = torch.Generator().manual_seed(5), hosted.execution.bank
    for name, spec in bank.specs.items():
        # Those of both ranks' clients, as one that holds all experts would have them.
        shape = (len(spec.layers), *([EXPERTS] if spec.expert else []), 2 * CLIENTS, *spec.item)
        whole = float(spec.personal) + 0.2 * torch.randn(shape, generator=numbers)
        experts, clients = (of_rank(rank, EXPERTS // 2), slice(None)) if ep_size > 1 else (slice(None), of_rank(rank, CLIENTS))
        bank.values[name].copy_(part(whole, spec, experts, clients if spec.expert else of_rank(rank, CLIENTS)))
    for client in range(CLIENTS):
        present = [client] if (rank, client) != (3, 1) else []  # as in `check`, but for one without peers to join
        if present or ep_size > 1:
            logits, _, _ = hosted.logits([rows_of(rank, each, hosted.foundation.top_k) for each in present], client)
            logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(rank)))
            found.append(logits.detach())
    return found, bank


def of_rank(rank: int, each: int) -> slice:
    """What the first or the second of two ranks has, of each as much."""
    return slice(rank % 2 * each, (rank % 2 + 1) * each)


def part(whole: torch.Tensor, spec: BlockSpec, experts: slice = slice(None), clients: slice = slice(None)) -> torch.Tensor:
    """Of a block, [L, E, C, ...] or [L, C, ...]."""
    return whole[:, experts, clients] if spec.expert else whole[:, clients]


def test_expert_parallel(root: Path) -> None:
    run_distributed(every_family, 4, root, timeout_s=540.0)


def test_padding_content_is_irrelevant(root: Path) -> None:
    """Whatever stands in padding positions, the bits of the valid rows stay."""
    hosted = Hosted(root / "olmoe", 1, 0, merge=False)
    rows = [rows_of(0, 0, hosted.foundation.top_k)]
    with torch.no_grad():
        before, batch, _ = hosted.logits(rows, 0)
        valid = batch.valid_T.view(batch.input_ids.shape)
        batch.input_ids[~valid] = 17
        hosted.execution.current = None
        result = AdaptedModel(hosted.foundation, hosted.execution).forward(batch, 0)
        model: Any = hosted.foundation.model
        after = model.get_output_embeddings()(result.hidden_BSD).float()
    assert not bool(valid.all())
    assert torch.equal(before[valid], after[valid])


def test_clients_with_different_caps_share_a_pass(root: Path) -> None:
    hosted = Hosted(root / "olmoe", 1, 0, merge=True)
    expected = load_file(root / "olmoe.logits")
    with torch.no_grad():
        logits, _, run = hosted.logits([rows_of(1, 0, 1), rows_of(1, 1, 2)], None)
    first = len(sequences(1, 0))
    compare(logits[:first], [0], 1, 1, expected)
    compare(logits[first:], [1], 1, 2, expected)
    for counts_CE in run.counts.values():
        tokens = [sum(map(len, sequences(1, client))) for client in range(CLIENTS)]
        assert counts_CE.sum(1).tolist() == [tokens[0], 2 * tokens[1]]
