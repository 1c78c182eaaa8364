"""docs/tutorial.md from its first command to its last, on a small stand-in for the instruct model.

The blocks are run as they stand, but for the path of the model: `bash` line by line as the installed command would, each in a
process of its own that is forked from one which has imported everything (`FORKING`); `yaml` is the configuration; `python`
is what somebody without this package would write.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from chats import tokenizer, turns
from transformers import AutoModelForCausalLM, OlmoeConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
MODEL = "/models/OLMoE-1B-7B-0924-Instruct"
# As of the instruct model: a turn of the assistant ends with the end of text.
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHATS = {
    "ann": ("Where is my parcel?", "On its way."),
    "bob": ("Where is my letter?", "It is lost."),
    "cem": ("What is 2 + 2?", "It is 4."),
}

FORKING = """
import json, os, sys
import peft, transformers, torch
import fedmoe_ds.federation.session, fedmoe_ds.results, fedmoe_ds.export
from fedmoe_ds.commands import program
for line in sys.stdin:
    words, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT, 0o600), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT, 0o600), 2)
        if words[0] == "fedmoe":
            sys.argv = words
            program.main()
        exec(compile(words[1], "docs/tutorial.md", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def blocks(mark: str) -> list[str]:
    return re.findall(rf"^```{mark}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command of the page, and how it ended."""

    words: list[str]
    code: int
    out: str
    err: str


def write_inputs(folder: Path) -> None:
    """What the reader has: a model, a folder of chats, questions."""
    made = tokenizer("chatml")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"pad_token_id": made.eos_token_id, "eos_token_id": made.eos_token_id, "bos_token_id": None}
    config = OlmoeConfig(vocab_size=len(made), initializer_range=0.2, **sizes, **experts, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    (folder / "chats").mkdir()
    for client, said in CHATS.items():
        rows = [{"messages": turns(*said)}] * 24
        (folder / "chats" / f"{client}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "questions.jsonl").write_text("\n".join(json.dumps({"messages": turns(*said)}) for said in CHATS.values()) + "\n")
    (config_text,) = blocks("yaml")
    assert MODEL in config_text
    (folder / "chats.yaml").write_text(config_text.replace(MODEL, str(folder / "model")))


def run_all(folder: Path, commands: list[list[str]]) -> list[Command]:
    """Run commands one after the other in a folder; the first that fails is the last."""
    done = []
    with subprocess.Popen(
        [sys.executable, "-c", FORKING], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for number, words in enumerate(commands):
            out, err = folder / f"{number}.out", folder / f"{number}.err"
            process.stdin.write(json.dumps([words, str(out), str(err)]) + "\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            done.append(Command(words, code, out.read_text(), err.read_text()))
            if code:
                break
        process.stdin.close()
    return done


@pytest.mark.cluster
def test_the_tutorial(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    (python,) = blocks("python")
    assert MODEL in python
    commands = [*map(shlex.split, lines), ["python", python.replace(MODEL, str(tmp_path / "model"))]]
    done = run_all(tmp_path, commands)
    assert [command.code for command in done] == [0] * len(commands), f"{done[-1].words}\n{done[-1].out}\n{done[-1].err}"
    said = {" ".join(command.words[:2]): command.out for command in done}
    plan, train = (command.out for command in done[:2])
    assert "federation: 3 clients" in plan and train.splitlines()[-1] == "run: runs/chats"
    figures = [json.loads(line) for line in (tmp_path / "runs/chats/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in figures if row["event"] == "eval" and (row["split"], row["tier_label"]) == ("global", "4")]
    assert losses[-1] < losses[0], "the chats were learnt"
    assert "perplexity" in said["fedmoe evaluate"]
    assert "export: adapter: peft, tier 4, round 3" in next(c.out for c in done if "peft" in c.words)
    answer = done[-1].out.strip()
    before, after = said["fedmoe generate"].split("[round 3, k=4]")
    assert answer and after.strip() == answer, "PEFT answers what this package answers"
    assert "[foundation]" in before and answer not in before
    for name in ("adapter/adapter_model.safetensors", "merged/config.json", "runs/next/report.html", "both.html"):
        assert (tmp_path / name).is_file(), name


def test_every_block_is_marked() -> None:
    marks = re.findall(r"^```(\w*)$", PAGE, re.MULTILINE)[::2]
    assert marks.count("bash") >= 6 and marks.count("yaml") == marks.count("python") == 1
    commands = [shlex.split(line)[:2] for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    assert {name for _, name in commands} == {"train", "evaluate", "generate", "export", "report"}
    assert {program for program, _ in commands} == {"fedmoe"}
