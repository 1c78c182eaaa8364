"""Small federations for tests: a random OLMoE with top-8 of 16 experts, unequal clients, runs inside this process.

`write_inputs` lays down model and data, `make_config` describes a run on them, `alone` / `joined` are the world, `run` is what
`launch/train.py` does without the printing.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

from fedmoe_ds.aggregation.postprocessors import Postprocessor
from fedmoe_ds.checkpoint.skipped_clients import SkippedClients
from fedmoe_ds.config import Config
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.distributed.collectives import TorchSumming
from fedmoe_ds.distributed.control import Alone, make_control
from fedmoe_ds.distributed.launcher import Launch
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.topology import ParallelLayout, Topology, build_topology
from fedmoe_ds.federation import session
from fedmoe_ds.federation.build import Parts, load_parts, memory_settings
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.randomness import generator

SAMPLES = (29, 19, 13, 9, 7, 5)
"""Rows per client before hold-outs: no two clients are equal, and the last ones have less than a batch."""

MODEL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "norm_topk_prob": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}

TREE: dict[str, Any] = {
    "adapters": {"rank": 4, "alpha": 8.0},
    "federation": {"rounds": 2},
    "local": {"max_steps": 3, "batch_size": 4, "lr": 5e-3, "clip": 0.5},
    "data": {
        "template": "instruction",
        "sequence_length": 40,
        "partition": {"kind": "natural", "column": "group"},
    },
    "execution": {"micro_batch_size": 3, "reproducible": "bitwise"},
    "evaluation": {"max_sequences": 3, "batch_size": 2, "client_sequences": 1},
}


@dataclass(frozen=True)
class Result:
    """What a run left behind; `adapters` are those that this rank holds."""

    digest: str
    adapters: dict[str, np.ndarray]
    events: list[dict[str, Any]]
    parts: Parts

    def scores(self) -> list[tuple[Any, ...]]:
        """Every evaluation row and generated answer, exact."""
        keys = ("round", "tier", "split", "client", "loss", "accuracy", "tokens", "exact_match", "samples", "answer")
        rows = [event for event in self.events if event["event"] in ("eval", "generation")]
        return [tuple(event.get(key) for key in keys) for event in rows]


def write_inputs(root: Path, samples: tuple[int, ...] = SAMPLES, **model: Any) -> None:
    """A random model with its tokenizer in `root/model`, instructions and answers of unequal lengths in `root/data.jsonl`."""
    rows = []
    for group, count in enumerate(samples):
        for row in range(count):
            draw = generator(7, "rows", group, row)
            words = [f"w{group}{word}" for word in draw.integers(0, 12, size=int(draw.integers(3, 13)))]
            cut = int(draw.integers(1, len(words)))
            texts = {"instruction": " ".join(words[:cut]), "output": " ".join(words[cut:])}
            rows.append({"group": f"client-{group:03d}", **texts})
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(OlmoeConfig(**MODEL | model)).save_pretrained(root / "model")
    train_tokenizer(["### Instruction:\n\n### Response:\n"] * 50, MODEL["vocab_size"]).save_pretrained(root / "model")


def make_config(root: Path, name: str, *changes: dict[str, Any]) -> Config:
    """The small federation with nested changes, later ones over earlier ones."""
    tree = copy.deepcopy(TREE)
    tree |= {"name": name, "output": str(root / "runs"), "foundation": {"path": str(root / "model"), "cache": str(root)}}
    tree["data"]["source"] = str(root / "data.jsonl")
    for change in changes:
        _merge(tree, change)
    return Config.model_validate(tree)


def _merge(tree: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = copy.deepcopy(value)


def alone() -> tuple[Runtime, Topology]:
    """A world of this process only; it needs no process group."""
    torch.set_num_threads(1)
    launch, none = Launch("test", 0, 1, 0), TorchSumming(None, 1)
    return Runtime(launch, torch.device("cpu"), Alone()), Topology(
        ParallelLayout(1, 1), 0, ["here"], None, None, none, none, Alone()
    )


def joined(rank: int, limit: timedelta = timedelta(minutes=5)) -> Runtime:
    """The world of `run_distributed`; `limit` is that of one message."""
    world_size = torch.distributed.get_world_size()
    launch = Launch("test", rank, world_size, rank)
    return Runtime(launch, torch.device("cpu"), make_control("torch", "test", rank, world_size, limit))


def build(config: Config, runtime: Runtime, topology: Topology) -> tuple[Parts, Journal]:
    """The parts of a run and its journal, at the beginning of round 1."""
    folder = Path(config.output) / config.name
    journal = Journal(folder, runtime)
    parts = load_parts(config, runtime, topology, journal.progress)
    session.begin(parts, journal, None)
    return parts, journal


def leave_out(parts: Parts, kept: dict[int, int]) -> None:
    """Let all clients of a round but the first `kept` ones be absent, as after a start that ran out of memory on them."""
    missing = [(index, c.index) for index, count in kept.items() for c in parts.participants(index)[count:]]
    settings = memory_settings(parts.config, parts.identity)
    key = parts.skipped.key
    parts.skipped = SkippedClients(parts.skipped.path.parent, settings, [json.dumps([key, *entry]) for entry in missing])
    assert parts.skipped.key == key


def finish(parts: Parts, journal: Journal, *steps: Postprocessor) -> Result:
    """Train all rounds, with more postprocessors of updates."""
    federation = Federation(parts, journal)
    federation.postprocessors += steps
    outcome = federation.run()
    journal.close()
    assert outcome.interrupted is None
    adapters = {key: value.cpu().clone().numpy() for key, _, value in parts.state.adapters.items(parts.first_expert)}
    return Result(outcome.digest, adapters, read_events(journal.folder), parts)


def run_alone(config: Config) -> Result:
    """A whole run on one rank."""
    return finish(*build(config, *alone()))


def run_joined(config: Config, runtime: Runtime) -> Result:
    """A whole run on the ranks of `run_distributed`."""
    return finish(*build(config, runtime, build_topology(config.topology, runtime)))


def read_events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
