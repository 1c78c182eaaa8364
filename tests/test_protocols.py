"""Published protocols: `configs/protocols/` says what was published, passes a dry run, and trains two steps on a stand-in.

A stand-in is a file with the columns of the hub's data set, and a small random model of the family with a tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from every import every
from federations import MODEL, run_alone
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from fedmoe_ds.clients.lr_schedule import round_rate
from fedmoe_ds.config import Config, load_config
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.federation.sampling import participant_count
from fedmoe_ds.planner.dry_run import describe
from fedmoe_ds.randomness import generator

FOLDER = Path(__file__).parents[1] / "configs" / "protocols"
ALPACA = ("instruction", "input", "output", "text")


@dataclass(frozen=True)
class Protocol:
    """What was published."""

    clients: int
    per_round: int
    columns: tuple[str, ...]
    rank: int = 32
    dropout: float = 0.075
    length: int = 512
    lr: float = 5e-5
    family: str = "mistral"


FIELDS = ("input", "output", "instruction")
PUBLISHED = {
    "flowertune-general": Protocol(20, 2, ALPACA),
    "flowertune-finance": Protocol(50, 5, FIELDS),
    "flowertune-medical": Protocol(20, 2, FIELDS),
    "flowertune-code": Protocol(10, 2, FIELDS),
    "openfedllm": Protocol(20, 2, ALPACA, dropout=0.05, family="llama"),
    "fed-aya": Protocol(38, 4, ("client", "instruction", "response"), 16, 0.05, 1024, 2e-5, "llama"),
}
QUICK = ("flowertune-finance", "fed-aya")
"""What `make test` trains; the others' runs are in `make test-cluster`."""


def test_every_file_is_a_known_protocol() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PUBLISHED)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder per family, and a file per protocol."""
    folder = tmp_path_factory.mktemp("protocols")
    sizes = {key: value for key, value in MODEL.items() if "expert" not in key and key != "norm_topk_prob"}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 1024}
    for family, kind in (("mistral", MistralConfig), ("llama", LlamaConfig)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**sizes)).to(torch.bfloat16)
        model.save_pretrained(folder / family)
        train_tokenizer(["### Instruction:\n### Response: word"] * 20, MODEL["vocab_size"]).save_pretrained(folder / family)
    for name, protocol in PUBLISHED.items():
        lines = [json.dumps(_row(protocol, name, number)) for number in range(4 * protocol.clients)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _row(protocol: Protocol, name: str, number: int) -> dict[str, str]:
    draw = generator(3, name, number)
    words = {column: " ".join(f"w{word}" for word in draw.integers(0, 9, size=4)) for column in protocol.columns}
    return words | ({"client": f"annotator {number % protocol.clients}"} if "client" in words else {})


def standing_in(name: str, root: Path, *more: str) -> Config:
    """The protocol's file with model and data on the command line."""
    places = (f"foundation.path={root / PUBLISHED[name].family}", f"data.source={root / name}.jsonl")
    # Enough rows for a hold-out on either side: the stand-in has four per client.
    shares = ("data.holdout=0.25", "data.global_holdout=0.05")
    return load_config(
        FOLDER / f"{name}.yaml", [*places, *shares, f"foundation.cache={root}", f"output={root / 'runs'}", *more]
    )


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_it_says_what_was_published(name: str) -> None:
    config, known = load_config(FOLDER / f"{name}.yaml", []), PUBLISHED[name]
    adapters, local = config.adapters, config.local
    assert (adapters.rank, adapters.alpha, adapters.dropout) == (known.rank, 2.0 * known.rank, known.dropout)
    assert (config.federation.rounds, local.steps, local.batch_size, local.schedule) == (200, 10, 16, "constant")
    assert participant_count(known.clients, config.federation.participation) == known.per_round
    assert config.data.sequence_length == known.length and config.data.partition.clients in (known.clients, None)
    assert round_rate(local, 200, 200) == 1e-6 and round_rate(local, 1, 200) == pytest.approx(known.lr, rel=1e-3)
    # PEFT's own choice for these families, where a LoraConfig names none.
    assert adapters.attention == ["q_proj", "v_proj"] and adapters.moe is None
    prompt = config.data.prompt.resolved()
    assert prompt.end_of_text is (not name.startswith("flowertune")) and "### Instruction:" in prompt.question("a", "b")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_dry_run(name: str, root: Path) -> None:
    lines = "\n".join(describe(standing_in(name, root), 1))
    assert f"federation: {PUBLISHED[name].clients} clients" in lines and "total" in lines


def _runs(name: str) -> Any:
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.cluster)


@pytest.mark.parametrize("name", [_runs(name) for name in sorted(PUBLISHED)])
def test_two_steps(name: str, root: Path) -> None:
    quick = (
        "federation.rounds=1",
        "local.steps=2",
        "local.batch_size=2",
        "execution.micro_batch_size=1",
        "evaluation.max_sequences=2",
    )
    result = run_alone(standing_in(name, root, *quick))
    clients = [event for event in result.events if event["event"] == "client"]
    assert len(clients) == PUBLISHED[name].per_round
    assert every(event["steps"] == 2 and event["targets"] > 0 and event["status"] == "ok" for event in clients)
    trained = [key for key, value in result.adapters.items() if key.endswith("lora_B") and abs(value).max() > 0]
    assert len(trained) == 2 * MODEL["num_hidden_layers"], "q and v of every layer have moved"
