"""Loading: what a card says about how an export is loaded, for adapters; a model folder's words are with its format."""

from __future__ import annotations

import json

from fedmoe_ds.export.written import Request

HERE = "path/to/this/folder"
"""Where the reader of a card has put the export: no path of the machine that wrote it is told."""


def override(request: Request) -> dict[str, int]:
    """What the base model's configuration must be told: a tier of k < K; {} where its own value is right."""
    same = request.top_k == request.full_top_k or not request.run.spec.expert_layout.num_experts
    return {} if same else {"num_experts_per_tok": request.top_k}


def lora_loading(request: Request, max_lora_rank: int | None, fmt: str) -> str:
    """Markdown for an adapter. `max_lora_rank` is None where vLLM and SGLang do not serve it."""
    text = request.run.outline.task == "causal_lm"
    model = "AutoModelForCausalLM" if text else "AutoModelForImageClassification"
    setting = "".join(f", {key}={value}" for key, value in override(request).items())
    parts = [
        "With transformers and PEFT (0.19 or later):",
        f"""```python
from peft import PeftModel
from transformers import {model}

base = {json.dumps(request.base)}  # a hub id, or the folder of the base model
model = {model}.from_pretrained(base, dtype="auto"{setting})
model = PeftModel.from_pretrained(model, "{HERE}")
```""",
    ]
    if max_lora_rank is not None:
        parts += _served(request, max_lora_rank)
    elif fmt == "peft-fused" and text:
        parts.append("vLLM and SGLang load adapters of single experts: `fedmoe export RUN --format peft` writes them.")
    if text:
        arguments = ",".join([f"pretrained={request.base}", f"peft={HERE}", *_assigned(request)])
        parts += [
            "With lm-evaluation-harness:",
            f"```sh\nlm_eval --model hf --model_args {arguments} --tasks arc_easy\n```",
        ]
    return "\n\n".join(parts)


def _assigned(request: Request) -> list[str]:
    return [f"{key}={value}" for key, value in override(request).items()]


def _served(request: Request, max_lora_rank: int) -> list[str]:
    base = request.base
    vllm = [f"vllm serve {base} --enable-lora --max-lora-rank {max_lora_rank}", f"--lora-modules tuned={HERE}"]
    sglang = [f"python -m sglang.launch_server --model-path {base} --enable-lora", f"--lora-paths tuned={HERE}"]
    if changes := override(request):
        vllm.append(f"--hf-overrides '{json.dumps(changes)}'")
        sglang.append(f"--json-model-override-args '{json.dumps(changes)}'")
    return ["With vLLM:", shell(vllm), "With SGLang:", shell(sglang)]


def shell(lines: list[str]) -> str:
    """A command, over several lines, as a code block."""
    return "```sh\n" + " \\\n  ".join(lines) + "\n```"
