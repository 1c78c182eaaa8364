"""Card: the README.md of an export, with the front matter that Hugging Face reads.

It says how the model was trained and how it is loaded, for people who have never seen the run. No client's name, no text of a
client and no path of this machine is in it: numbers of clients are counts, scores are those of the global hold-out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from fedmoe_ds import __version__
from fedmoe_ds.export.written import Request, Written
from fedmoe_ds.federation.server_training import epochs_of
from fedmoe_ds.foundation.channel_groups import GroupedLayer
from fedmoe_ds.model.adapter_bank import lora_pairs
from fedmoe_ds.report.history import History
from fedmoe_ds.report.record import expanded

CARD = "README.md"
CHAT_TEMPLATE = "chat_template.jinja"


def write_card(request: Request, written: Written) -> None:
    """Write the card and, of a run on chats, the chat template that its prompts were written with."""
    (request.out / CARD).write_text(card(request, written), encoding="utf-8")
    template = _reading(request).get("chat_template")
    if template is not None:
        (request.out / CHAT_TEMPLATE).write_text(template["text"], encoding="utf-8")


def card(request: Request, written: Written) -> str:
    """The card's text."""
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(request, written), sort_keys=False, allow_unicode=True)}---",
        f"# {request.run.config.name}",
        _what(request, written),
        _markdown_table(_facts(request)),
        "## Scores",
        _scores(request),
        *_active_experts(request, written),
        *_prompt(request),
        "## Load it",
        written.loading,
        # A whole model needs no other.
        *(_base(request) if written.library == "peft" else []),
        *(["## Notes", *written.notes] if written.notes else []),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(request: Request, written: Written) -> dict[str, Any]:
    spec = request.run.spec
    tags = ["federated-learning", "fedmoe-ds"]
    tags += ["lora"] if written.library == "peft" else []
    tags += ["mixture-of-experts"] if spec.expert_layout.num_experts else []
    task = "text-generation" if request.run.outline.task == "causal_lm" else "image-classification"
    return {"base_model": request.base, "library_name": written.library, "pipeline_tag": task, "tags": tags}


def _what(request: Request, written: Written) -> str:
    kind = "A LoRA adapter" if written.library == "peft" else "A model"
    whose = "the model of one client" if request.selection.client is not None else f"budget tier {request.selection.tier}"
    rounds = f"{request.run.round} round{'' if request.run.round == 1 else 's'}"
    return f"{kind} for `{request.base}`, trained by federated learning with fedmoe-ds {__version__}: {whose} after {rounds}."


def _facts(request: Request) -> list[tuple[str, str]]:
    run, config, adapters = request.run, request.run.config, request.run.config.adapters
    info = run.spec.method.info
    tiers = ", ".join(f"{len(members)} of tier {label}" for label, members in run.tiers.items())
    facts = [
        ("base model", f"`{request.base}`, family {run.spec.model_type}"),
        ("fingerprint", f"`{run.snapshot.identity.get('foundation')}` (SHA-256 over its configuration and weight files)"),
        ("method", f"{info.title} ({info.paper})"),
        ("rounds", str(run.round)),
        ("clients", f"{len(run.clients)}" + (f" ({tiers})" if len(run.tiers) > 1 else "")),
        ("trained", _trained(request)),
    ]
    if (start := _start(request)) is not None:
        # The counts of clients and rounds above are of this run alone.
        facts.append(("started from", start))
    if lora_pairs(run.spec.blocks):
        rank, full = request.selection.assignment.rank(adapters.rank), adapters.rank
        of = "" if rank == full else f" of the run's {full}"
        facts.append(("LoRA", f"rank {rank}{of}, scale {run.scale(request.selection):g}"))
    template = _reading(request).get("template")
    if template is not None:
        facts.append(("data", f"template `{template}`, at most {config.data.sequence_length} tokens per sample"))
    return facts


def _trained(request: Request) -> str:
    names = {block.pair or block.name.removesuffix(".weight") for block in request.run.spec.blocks}
    return ", ".join(f"`{name}`" for name in sorted(names))


def _scores(request: Request) -> str:
    """Before and after, on the global hold-out at this tier; of a client's own model, on its hold-out. Before is the
    base model or, of a run that went on from adapters or whose server had warmed up, the model with these."""
    if request.selection.client is None and request.run.spec.method.personal_models:
        return "The run scored its clients' own models, each with the experts that it uses, and not this one with all of them."
    before, after = (_row(request, last) for last in (0, request.run.round))
    if before is None or after is None:
        return "This model was not evaluated in its run."
    figures = [key for key in ("perplexity", "accuracy", "exact_match", "ranked_choice") if after.get(key) is not None]
    rows = [(key.replace("_", " "), _number(before.get(key)), _number(after.get(key))) for key in figures]
    hold_out = "the client's hold-out" if request.selection.client is not None else "the global hold-out"
    later = "" if after["round"] == request.run.round else f" (last evaluated after round {after['round']})"
    # Round 0 is scored after what the server has trained by itself.
    warmed = epochs_of(request.run.config, 0) > 0
    begun = "start" if _start(request) else "after the server's warm-up" if warmed else "base model"
    return f"On {hold_out}, {after.get('targets', after.get('tokens'))} predictions{later}:\n\n" + _markdown_table(
        rows, ("", begun, "trained")
    )


def _start(request: Request) -> str | None:
    """What the run's adapters began as, by name; None: at nothing."""
    history = History.of([event for event in request.run.events if event["event"] == "run"])
    return history.started_from


def _row(request: Request, last: int) -> dict[str, Any] | None:
    """The newest evaluation up to a round; of what the run began with for round 0."""
    selection, found = request.selection, None
    split = "global" if selection.client is None else "client"
    for event in _evaluations(request, split):
        if event["split"] != split or event["round"] > last or (last and not event["round"]):
            continue
        if str(event.get("tier_label", event.get("tier"))) != selection.tier:
            continue
        if selection.client is None or event.get("client") == selection.client.name:
            found = event
    return found


def _evaluations(request: Request, split: str) -> Iterator[dict[str, Any]]:
    """The `eval` events; those of single clients out of their tables, where one of them is asked for."""
    for event in request.run.events:
        if event["event"] == "eval":
            yield event
        elif event["event"] == "table" and event["of"] == "eval" and split == "client":
            yield from expanded(event)


def _active_experts(request: Request, written: Written) -> list[str]:
    # To whoever loads it, groups of channels are the blocks of a dense model.
    grouped = any(isinstance(layer, GroupedLayer) for layer in request.run.outline.layers)
    if grouped or not request.run.spec.expert_layout.num_experts:
        return []
    chosen, full = request.top_k, request.full_top_k
    if request.run.config.adapters.moe is not None:
        pool = request.run.spec.expert_layout.num_experts
        words = (
            f"Beside every feed-forward block are {pool} adapter experts with a router, {chosen} of them active per token; "
            "`adapter_moe.top_k` in `config.json` says so."
        )
    elif chosen == full:
        words = f"It was trained and evaluated with {chosen} active experts per token, as many as the base model has."
    elif written.library == "transformers":
        words = f"It is for {chosen} active experts per token; the base model has {full}. Its `config.json` says so."
    else:
        words = (
            f"It is for {chosen} active experts per token, where the base model's configuration says {full}: whatever loads "
            f"it must be told `num_experts_per_tok: {chosen}`, as below. With {full} it runs, too, and is another model."
        )
    return ["## Active experts", words]


def _prompt(request: Request) -> list[str]:
    reading = _reading(request)
    if "chat_template" in reading:
        words = f"Chats were written with the template in `{CHAT_TEMPLATE}`; use it at inference (SHA-256 "
        return ["## Chat template", f"{words}`{reading['chat_template']['sha256']}`)."]
    if "prompt" in reading:
        words = (
            "Prompts had these pieces, in this order, around the instruction and its input. Repeat them to the letter; "
            "the answer begins right after `response_header` and `answer_lead`."
        )
        return ["## Prompt", words, fenced(json.dumps(reading["prompt"], indent=1, ensure_ascii=False), "json")]
    return []


def _base(request: Request) -> list[str]:
    if "/" in request.base:
        return []
    return [
        f"`{request.base}` is the name of the folder in which the base model was. Give its place wherever it is named above; "
        "the fingerprint tells whether it is the same."
    ]


def _reading(request: Request) -> dict[str, Any]:
    event = next((event for event in request.run.events if event["event"] == "data"), {})
    reading: dict[str, Any] = event.get("reading") or {}
    return reading


def fenced(text: str, language: str = "") -> str:
    """A code block that the text cannot end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _markdown_table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ("", "")) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
