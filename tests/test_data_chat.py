"""Chats: tokens and targets are those of transformers, whatever the format; what cannot be learned whole is cut or counted."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import chats
import numpy as np
import pytest
from chats import STYLES, turns
from datasets import Dataset
from every import every
from federations import alone, make_config, read_events, write_inputs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.data import templates
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.federated import prepare
from fedmoe_ds.data.omissions import CUT, EMPTY, NAMED, NO_ROOM, REFUSED, UNMARKED
from fedmoe_ds.data.table import Column, Table
from fedmoe_ds.data.templates.chat_template import chat_template
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import session
from fedmoe_ds.planner.dry_run import describe

DATE = "26 Jul 2024"
Turns = list[dict[str, str]]


def table(rows: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(names, {name: Column([[row.get(name) for row in rows]]) for name in names}, len(rows))


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], **data: Any) -> templates.Samples:
    data = {"sequence_length": 4096, **data}
    read = table(rows)
    config = templates.resolve_template(read, DataConfig(**data))
    columns = templates.resolve_columns(read, config)
    templates.check_rows(read, columns, config)
    return templates.encode(read, columns, config, Encoder(tokenizer))


def with_template(name: str, text: str, tmp_path: Path) -> dict[str, str]:
    path = tmp_path / f"{name}.jinja"
    path.write_text(text, encoding="utf-8")
    return {"chat_template": str(path)}


def reference(tokenizer: PreTrainedTokenizerFast, style: chats.Style, messages: Turns) -> tuple[list[int], list[int]]:
    """Ids and assistant mask of transformers; the date is the one that we write."""
    found = tokenizer.apply_chat_template(
        messages, chat_template=style.marked.replace("strftime_now('%d %b %Y')", f"'{DATE}'"),
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    return found["input_ids"], found["assistant_masks"]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, style: chats.Style, messages: Turns) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        messages, chat_template=style.plain.replace("strftime_now('%d %b %Y')", f"'{DATE}'"),
        tokenize=True, return_dict=False, add_generation_prompt=True,
    )  # fmt: skip
    return ids


SAFE = turns("a", "b")
NAMES = ("<s>", "</s>")
"""Special tokens whose names these letters can write: in a message they are text to us, and special tokens to transformers."""
WORDS = (
    st.text(st.sampled_from("abet st.\n<|>/_é2I[]"), min_size=1, max_size=14)
    .filter(str.strip)
    .filter(lambda text: not any(name in text for name in NAMES))
)


@pytest.mark.parametrize("name", STYLES)
def test_masks_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """With marks always; by prefixes too, where a prompt's ids are the beginning of the whole, and otherwise it is left out."""
    style, tokenizer = STYLES[name], chats.tokenizer(name)
    marked = with_template(name, style.marked, tmp_path)
    kept = []

    @settings(max_examples=25, deadline=None, database=None)
    @given(st.lists(WORDS, min_size=2, max_size=7), st.none() | WORDS)
    @example(["a", "\n\nb", "c", "d"], "You are helpful.")
    def check(contents: list[str], system: str | None) -> None:
        messages = turns(*contents, system=system if name != "gemma" else None)
        ids, mask = reference(tokenizer, style, messages)
        # A second row that serves: where no conversation does, the run is refused.
        by_marks, by_prefixes = (
            encode(tokenizer, [{"messages": m} for m in (messages, SAFE)], **kind) for kind in (marked, {})
        )
        assert by_marks.tokens[0].tolist() == ids and by_marks.loss_mask[0].tolist() == [bool(bit) for bit in mask]
        last = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
        prompts = [prompt_ids(tokenizer, style, messages[:index]) for index in last]
        exact = all(ids[: len(prompt)] == prompt for prompt in prompts)
        assert by_prefixes.rows == [0, 1][not exact :] and by_prefixes.omissions == [(0, UNMARKED)] * (not exact)
        kept.append(exact)
        if exact:
            assert by_prefixes.tokens[0].tolist() == ids
            assert by_prefixes.loss_mask[0].tolist() == [bool(bit) for bit in mask]
            starts = np.flatnonzero(np.diff(by_prefixes.loss_mask[0].astype(int)) == 1) + 1
            assert starts.tolist() == [len(prompt) for prompt in prompts], "an answer begins where its prompt ends"

    check()
    assert sum(kept) >= len(kept) / 3
    # Line breaks at the beginning of an answer melt into the one before them; Llama 3 and others trim them.
    assert (len(kept) > sum(kept)) >= (name == "chatml")


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "deepseek"])
def test_a_long_chat_ends_with_the_last_turn_that_fits(name: str) -> None:
    tokenizer = chats.tokenizer(name)
    messages = turns("ab", "cd e", "a test", "the end", "sad", "pets", system="You are helpful.")
    whole = encode(tokenizer, [{"messages": messages}])
    ends = [int(end) + 1 for end in np.flatnonzero(np.diff([*whole.loss_mask[0].astype(int), 0]) == -1)]
    assert len(ends) == 3
    for length in range(8, len(whole.tokens[0]) + 1):
        cut = encode(tokenizer, [{"messages": messages}], sequence_length=length)
        fits = [end for end in ends if end <= length]
        if length >= len(whole.tokens[0]):
            assert not cut.omissions
        elif fits:
            assert cut.omissions == [(0, CUT)] and len(cut.tokens[0]) == fits[-1]
            assert np.array_equal(cut.tokens[0], whole.tokens[0][: fits[-1]])
            assert np.array_equal(cut.loss_mask[0], whole.loss_mask[0][: fits[-1]]) and cut.loss_mask[0][-1]
        else:
            assert cut.omissions == [(0, NO_ROOM)] and cut.rows == []


@pytest.mark.parametrize("name", STYLES)
def test_names_of_special_tokens_in_turns_stay_text(name: str) -> None:
    tokenizer, specials = chats.tokenizer(name), [s for s in STYLES[name].specials if s != "<unk>"]
    ids = dict(zip(specials, tokenizer.convert_tokens_to_ids(specials), strict=True))

    @settings(max_examples=20, deadline=None, database=None)
    @given(st.lists(st.tuples(WORDS, st.sampled_from(specials), WORDS), min_size=2, max_size=5))
    def check(contents: list[tuple[str, str, str]]) -> None:
        # A letter around each: no template trims it, and no answer is a question.
        messages = turns(*("xy"[n % 2] + "".join(parts) + "xy"[n % 2] for n, parts in enumerate(contents)))
        samples = encode(tokenizer, [{"messages": messages}])
        harmless = turns(*("x" + before + "?" + after + "x" for before, _, after in contents))
        plain = encode(tokenizer, [{"messages": harmless}])
        assert samples.omissions == [(0, NAMED)] and plain.rows == [0]
        for special in specials:
            assert (samples.tokens[0] == ids[special]).sum() == (plain.tokens[0] == ids[special]).sum(), special
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(samples.tokens[0]).strip() == text.strip() or "strftime_now" in STYLES[name].text
        # What is learned is the answers, names and all.
        learned = tokenizer.decode(samples.tokens[0][samples.loss_mask[0]])
        assert every(turn["content"] in learned for turn in messages if turn["role"] == "assistant")
        assert not any(turn["content"] in learned for turn in messages if turn["role"] == "user")

    check()


SAID = turns("What is 2 + 2?", "It is 4.", "the end", "a test")
FORMATS: dict[str, list[dict[str, Any]]] = {
    "parts": [{"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in SAID]}],
    "sharegpt": [{"conversations": [{"from": "human" if t["role"] == "user" else "gpt", "value": t["content"]} for t in SAID]}],
    "conversations": [{"conversations": SAID}],
    "none": [{"messages": [{**turn, "name": None, "tool_calls": None, "weight": None} for turn in SAID]}],
    "json": [{"messages": json.dumps(SAID)}],
    "completion": [{"prompt": SAID[:3], "completion": SAID[3:]}],
    "completion text": [{"prompt": SAID[:3], "completion": "a test"}],
    "weights": [{"messages": [{**turn, "weight": int(index == 3)} for index, turn in enumerate(SAID)]}],
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_every_format_gives_the_same(kind: str, name: str) -> None:
    twin, found = (encode(chats.tokenizer(name), rows) for rows in ([{"messages": SAID}], FORMATS[kind]))
    assert np.array_equal(found.tokens[0], twin.tokens[0])
    mask = twin.loss_mask[0].copy()
    if kind in ("completion", "completion text", "weights"):  # the first answer belongs to the prompt
        mask[: np.flatnonzero(np.diff(mask.astype(int)) == -1)[0] + 1] = False
    assert np.array_equal(found.loss_mask[0], mask) and mask.any()


def test_prompt_and_completion_as_text_and_a_system_column() -> None:
    tokenizer = chats.tokenizer("chatml")
    twin = encode(tokenizer, [{"messages": turns("a", "b", system="You are helpful.")}])
    for row in (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b", "system": "You are helpful."},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "You are helpful."},
    ):
        found = encode(tokenizer, [row])
        assert np.array_equal(found.tokens[0], twin.tokens[0]) and np.array_equal(found.loss_mask[0], twin.loss_mask[0])


def test_a_text_may_be_json() -> None:
    """Prompts that begin like a list of turns and completions that are other JSON are texts."""
    tokenizer = chats.tokenizer("chatml")
    for prompt, answer in (('[{"id": 1}] What is this?', '[{"name": "Ann", "age": 3}]'), ("List them", '[{"name": "Ann"}]')):
        twin = encode(tokenizer, [{"messages": turns(prompt, answer)}])
        found = encode(tokenizer, [{"prompt": prompt, "completion": answer}])
        assert np.array_equal(found.tokens[0], twin.tokens[0]) and np.array_equal(found.loss_mask[0], twin.loss_mask[0])


def test_a_completion_has_weights_too() -> None:
    after = [{"role": "assistant", "content": "no", "weight": 0}, *turns("Sure?"), {"role": "assistant", "content": "yes"}]
    tokenizer = chats.tokenizer("chatml")
    found = encode(tokenizer, [{"prompt": turns("Is it?"), "completion": after}])
    assert tokenizer.decode(found.tokens[0][found.loss_mask[0]]) == "yes<|im_end|>"


def test_what_is_left_out_is_counted() -> None:
    rows = [
        {"messages": turns("a", "b")},
        {"messages": turns("a")},
        {"messages": turns("a", " ")},
        {"messages": []},
        {"messages": None},
        {"messages": [*turns("a"), *turns("a", "b")]},
        {"messages": [{"role": "tool", "content": "x"}, *turns("a", "b")]},
    ]
    samples = encode(chats.tokenizer("mistral"), rows)
    assert samples.rows == [0]
    assert samples.omissions == [(1, EMPTY), (2, EMPTY), (3, EMPTY), (4, EMPTY), (5, REFUSED), (6, REFUSED)]


TOOLS: Turns = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},  # type: ignore[dict-item]
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]
CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + ' ' + (c.function.arguments | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_tools_are_written_by_the_template_or_the_chat_is_left_out(tmp_path: Path) -> None:
    tokenizer = chats.tokenizer("chatml")
    found = encode(tokenizer, [{"messages": TOOLS}], **with_template("calls", CALLS, tmp_path))
    learned = tokenizer.decode(found.tokens[0][found.loss_mask[0]])
    assert learned == 'add {"a": 2}<|im_end|>It is 4.<|im_end|>'
    assert encode(tokenizer, [{"messages": SAID}, {"messages": TOOLS}]).omissions == [(1, REFUSED)]


def test_a_turn_that_the_template_passes_over_leaves_the_chat_out(tmp_path: Path) -> None:
    """Else an instruction would vanish, and the answer to it be learned."""
    deaf = CALLS.replace("{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}")
    told = [{"role": "system", "content": "Answer in French."}, *turns("a", "b")]
    found = encode(
        chats.tokenizer("chatml"), [{"messages": turns("a", "b")}, {"messages": told}], **with_template("deaf", deaf, tmp_path)
    )
    assert found.rows == [0] and found.omissions == [(1, REFUSED)]


def test_a_model_without_a_template_gets_chatml(tmp_path: Path) -> None:
    """Its turns end with the model's own end of text where the vocabulary has no <|im_end|>."""
    plain = train_tokenizer(chats.TEXT, 300)
    found = encode(plain, [{"messages": SAID}])
    assert plain.decode(found.tokens[0][found.loss_mask[0]]) == "It is 4.<|endoftext|>a test<|endoftext|>"
    assert plain.decode(found.tokens[0]).startswith("<|im_start|>user\nWhat is 2 + 2?<|endoftext|>\n<|im_start|>assistant\nIt")
    with_tokens = chats.tokenizer("chatml")
    bare = PreTrainedTokenizerFast(tokenizer_object=with_tokens.backend_tokenizer, eos_token="<|endoftext|>")
    found = encode(bare, [{"messages": SAID}])
    assert bare.decode(found.tokens[0][found.loss_mask[0]]) == "It is 4.<|im_end|>a test<|im_end|>"
    assert chat_template(DataConfig(template="chat"), plain, False).origin == "ChatML"


@pytest.mark.parametrize(
    ("columns", "template"),
    [
        (["text"], "text"),
        (["messages"], "chat"),
        (["conversations", "id"], "chat"),
        (["prompt", "completion"], "chat"),
        (["text", "messages"], "text"),
        (["prompt"], "text"),
        (["body"], "text"),
    ],
)
def test_auto_is_text_where_it_was(columns: list[str], template: str) -> None:
    read = table([dict.fromkeys(columns, "x")])
    assert templates.resolve_template(read, DataConfig()).template == template


def test_columns_that_are_named_decide() -> None:
    read = table([{"text": "x", "chat": SAID}])
    config = templates.resolve_template(read, DataConfig(columns={"messages": "chat"}))
    assert config.template == "chat" and templates.resolve_columns(read, config) == {"messages": "chat"}
    both = table([{"messages": SAID, "q": "a", "a": "b"}])
    config = templates.resolve_template(both, DataConfig(columns={"prompt": "q", "completion": "a"}))
    assert templates.resolve_columns(both, config) == {"prompt": "q", "completion": "a"}


def bad(row: Any) -> list[dict[str, Any]]:
    return [{"messages": SAID}, {"messages": row}]


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        (bad(5), {}, r"data\.columns\.messages: row 2: column 'messages': holds 5, not a list of turns"),
        (bad("hello"), {}, r"row 2: .*neither a list of turns nor JSON"),
        (bad(["hello"]), {}, r"turn 1: 'hello': not a turn with role and content"),
        (bad([{"role": "usre", "content": "a"}]), {}, r"turn 1: role 'usre': not one of .*did you mean 'user'"),
        (bad([{"content": "a"}]), {}, r"turn 1: role None"),
        (bad([{"role": "user", "content": 5}]), {}, r"turn 1: content 5: neither text nor a list"),
        (bad([{"role": "user", "content": [{"type": "image_url"}]}]), {}, r"a part .*image_url.*: not text"),
        (bad([{"role": "assistant", "tool_calls": [{"id": "a"}]}]), {}, r"tool call .*: without a function and its name"),
        (bad([{"role": "assistant", "content": "a", "tool_calls": True}]), {}, r"turn 1: tool_calls True: not a list"),
        (bad([{"role": "assistant", "content": "a", "weight": "0"}]), {}, r"turn 1: weight '0': neither 0 nor 1"),
        ([{"messages": SAID}], {"chat_template": "~nobody.here/x.jinja"}, r"chat_template: .*: no such user's home"),
        ([{"prompt": None, "completion": "b"}], {}, r"data\.columns\.prompt: row 1: column 'prompt': is missing"),
        ([{"messages": turns("a", "b", system="x"), "system": "y"}], {}, r"data\.columns\.system: row 1: .*as well"),
        ([{"messages": SAID, "tools": [5]}], {}, r"data\.columns\.tools: row 1: .*not a list of tools"),
        ([{"instruction": "a", "output": "b"}], {"template": "chat"}, r"for template 'chat'.*data\.template=instruct"),
        ([{"messages": SAID}], {"template": "text"}, r"text: no such column .*or set data\.template=chat"),
        ([{"messages": SAID, "prompt": "a", "completion": "b"}], {"columns": {"messages": "messages", "prompt": "prompt"}},
         r"a row is one conversation"),
        ([{"text": "a"}], {"chat_template": "x.jinja"}, r"data\.chat_template: the data are read as text"),
        ([{"messages": SAID}], {"chat_template": "/nowhere/x.jinja"}, r"chat_template: /nowhere/x\.jinja: cannot be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(rows: list[dict[str, Any]], data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        encode(chats.tokenizer("chatml"), rows, **data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in %}", r"data\.chat_template: .*no Jinja template: "),
        ("{{ raise_exception('no\nchats') }}", r"the template refuses 2 of 2 conversations, the first with: .*no"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
            r"generation %} marks",
        ),
    ],
)
def test_a_template_that_serves_nothing_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        encode(chats.tokenizer("chatml"), [{"messages": SAID}] * 2, **with_template("bad", text, tmp_path))
    assert "\n" not in str(caught.value)


def test_the_template_is_part_of_the_cache_key(tmp_path: Path) -> None:
    """By what it says, not by where it lies."""
    path, tokenizer = tmp_path / "a.jsonl", chats.tokenizer("chatml")
    path.write_text("".join(json.dumps({"messages": turns(f"a{n}", "b")}) + "\n" for n in range(8)))
    iid = PartitionConfig(kind="iid", clients=2)
    found = [
        prepare(DataConfig(source=str(path), partition=iid, **extra), 0, tokenizer, tmp_path / "cache")
        for extra in ({}, with_template("same", chats.CHATML.plain, tmp_path), with_template("other", CALLS, tmp_path))
    ]
    assert found[0].path == found[1].path != found[2].path and found[0].fingerprint != found[2].fingerprint
    assert found[2].reading["chat_template"]["text"] == CALLS


def test_files_of_every_kind_hold_the_same_chats(tmp_path: Path) -> None:
    """Parquet fills the keys that a turn lacks with null, and CSV has text only."""
    rows = [{"messages": turns(f"What is {n}?", "a"), "id": "x"} for n in range(6)]
    rows += [{"messages": TOOLS, "id": "x"}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages", "id"], *([json.dumps(row["messages"]), row["id"]] for row in rows)])
    extra: dict[str, Any] = {"partition": PartitionConfig(kind="iid", clients=2), **with_template("calls", CALLS, tmp_path)}
    found = [
        prepare(DataConfig(source=str(tmp_path / f"a.{kind}"), **extra), 0, chats.tokenizer("chatml"), tmp_path / "cache")
        for kind in ("jsonl", "parquet", "csv")
    ]
    assert len({data.fingerprint for data in found}) == 1 and found[0].omissions.total == {}


def test_a_run_on_messages(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps per client; the run's record says how to repeat the template."""
    write_inputs(tmp_path, samples=(9, 7))
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    chat = [{"messages": turns(row["instruction"], row["output"]), "group": row["group"]} for row in rows]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    tree = make_config(
        tmp_path,
        "chat",
        {"federation": {"rounds": 1}, "local": {"max_steps": 2}, "data": {"template": "auto", "sequence_length": 96}},
    )
    planned = describe(tree, 1)
    runtime, topology = alone()
    monkeypatch.setattr(session, "build_topology", lambda *_: topology)
    session.train(tree, runtime, "never", StopRequest())
    events = read_events(tmp_path / "runs" / "chat")
    (event,) = [event for event in events if event["event"] == "data"]
    reading = event["reading"]
    assert reading["template"] == "chat" and reading["columns"] == {"messages": "messages"}
    assert reading["chat_template"]["origin"] == "ChatML" and len(reading["chat_template"]["sha256"]) == 64
    line = "data: chats of messages, written by ChatML, because the tokenizer has no chat template"
    assert line in " ".join(planned) and line in " ".join(capfd.readouterr().err.split())
    steps = [event["steps"] for event in events if event["event"] == "client"]
    assert steps and set(steps) == {2}
