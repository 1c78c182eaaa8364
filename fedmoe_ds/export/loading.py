"""Loading: what a card says about how an export is loaded: with transformers and PEFT, vLLM, SGLang, lm-evaluation-harness.

Commands that a server needs were read in the releases named in docs/results.md; the Python code is run by tests.
"""

from __future__ import annotations

import json

from fedmoe_ds.export.written import Request

HERE = "path/to/this/folder"
"""Where the reader of a card has put the export: no path of the machine that wrote it is told."""


def override(request: Request) -> dict[str, int]:
    """What the base model's configuration must be told: a tier of k < K; {} where its own value is right."""
    same = request.top_k == request.full_top_k or not request.run.spec.expert_layout.num_experts
    return {} if same else {"num_experts_per_tok": request.top_k}


def lora_loading(request: Request, max_lora_rank: int | None, in_peft: bool) -> str:
    """Markdown for an adapter.

    Args:
        max_lora_rank: that vLLM needs; None where vLLM and SGLang do not take it.
        in_peft: whether PEFT takes it.
    """
    model = _auto_class(request)
    setting = "".join(f", {key}={value}" for key, value in override(request).items())
    code = f"""from peft import PeftModel
from transformers import {model}

base = {json.dumps(request.base)}  # a hub id, or the folder of the base model
model = {model}.from_pretrained(base, dtype="auto"{setting})
model = PeftModel.from_pretrained(model, "{HERE}")"""
    parts = ["With transformers 5 and PEFT (0.19 or later):", f"```python\n{code}\n```"] if in_peft else []
    if max_lora_rank is not None:
        parts += _served(
            request,
            [f"vllm serve {request.base} --enable-lora --max-lora-rank {max_lora_rank}", f"--lora-modules tuned={HERE}"],
            [f"python -m sglang.launch_server --model-path {request.base} --enable-lora", f"--lora-paths tuned={HERE}"],
        )
    elif _is_text(request):
        parts.append("vLLM and SGLang load adapters with keys of single experts, which `--format peft` writes.")
    if _is_text(request) and in_peft:
        settings = [f"{key}={value}" for key, value in override(request).items()]
        parts += _harness([f"pretrained={request.base}", f"peft={HERE}", *settings])
    return "\n\n".join(parts)


def model_loading(request: Request) -> str:
    """Markdown for a whole model; its own configuration says how many experts are active."""
    model = _auto_class(request)
    code = f'from transformers import {model}\n\nmodel = {model}.from_pretrained("{HERE}", dtype="auto")'
    parts = ["With transformers:", f"```python\n{code}\n```"]
    if _is_text(request):
        parts += ["With vLLM:", shell([f"vllm serve {HERE}"])]
        parts += ["With SGLang:", shell([f"python -m sglang.launch_server --model-path {HERE}"])]
        parts += _harness([f"pretrained={HERE}"])
    return "\n\n".join(parts)


def _is_text(request: Request) -> bool:
    return request.run.outline.task == "causal_lm"


def _auto_class(request: Request) -> str:
    return "AutoModelForCausalLM" if _is_text(request) else "AutoModelForImageClassification"


def _served(request: Request, vllm: list[str], sglang: list[str]) -> list[str]:
    if changes := override(request):
        vllm = [*vllm, f"--hf-overrides '{json.dumps(changes)}'"]
        sglang = [*sglang, f"--json-model-override-args '{json.dumps(changes)}'"]
    return ["With vLLM:", shell(vllm), "With SGLang:", shell(sglang)]


def _harness(arguments: list[str]) -> list[str]:
    command = [f"lm_eval --model hf --model_args {','.join(arguments)}", "--tasks arc_easy"]
    return ["With lm-evaluation-harness:", shell(command)]


def shell(lines: list[str]) -> str:
    """A command, over several lines, as a code block."""
    return "```sh\n" + " \\\n  ".join(lines) + "\n```"
