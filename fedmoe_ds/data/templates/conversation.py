"""Conversation: the turns of a row, whichever of the usual formats it is written in.

OpenAI's `messages` (role, content; content as text or as a list of text parts; tool calls and tool turns), ShareGPT's
`conversations` (from, value), and TRL's `prompt` and `completion`, as text or as lists of turns; a list may be JSON text, as
CSV has it. All of them become turns as a chat template expects them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedmoe_ds.data.table import Table
from fedmoe_ds.errors import UserError, nearest
from fedmoe_ds.storage.strict_json import parse_json

ASSISTANT = "assistant"
# ShareGPT's names, and those of its descendants, beside the roles that templates know.
ROLES = {
    **{name: name for name in ("system", "developer", "user", ASSISTANT, "tool", "function", "ipython")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "function_call"), ASSISTANT),
    "observation": "tool",
}
Turn = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Turns of a row: `messages` are what the template sees, `learned[i]` whether message i is to be learned."""

    messages: list[Turn]
    learned: list[bool]
    tools: list[Any] | None = None

    @property
    def has_answer(self) -> bool:
        """Whether there is anything to learn: a turn of the assistant that says or calls something."""
        turns = zip(self.messages, self.learned, strict=True)
        return any(learned and (turn["content"].strip() or turn.get("tool_calls")) for turn, learned in turns)


class Reader:
    """The conversations of a table, in row order; UserError names the row that cannot be read."""

    def __init__(self, table: Table, columns: dict[str, str]) -> None:
        self._table, self._columns = table, columns

    def __iter__(self) -> Iterator[Conversation]:
        fields = list(self._columns)
        rows = zip(*(self._table[self._columns[field]] for field in fields), strict=True)
        for row, values in enumerate(rows):
            try:
                yield _conversation(dict(zip(fields, values, strict=True)))
            except _BadTurnError as bad:
                where = f"data.columns.{bad.field}: {self._table.place(row)}: column '{self._columns[bad.field]}'"
                raise UserError(f"{where}: {bad}; mend or drop the row") from None


class _BadTurnError(Exception):
    """What is wrong with a field of a row."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(what)
        self.field = field


def _conversation(row: dict[str, Any]) -> Conversation:
    if "messages" in row:
        turns = _turns(row["messages"], "messages")
        learned = _learned(turns, "messages")
    else:
        before, after = _side(row["prompt"], "prompt", "user"), _side(row["completion"], "completion", ASSISTANT)
        # The prompt may hold answers of the assistant; only the completion is learned, as in TRL.
        learned = [False] * len(_learned(before, "prompt")) + _learned(after, "completion")
        turns = before + after
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise _BadTurnError("system", f"holds {system!r:.40}, not text")
    if system and system.strip():
        if turns and turns[0]["role"] == "system":
            raise _BadTurnError("system", "a system text, and the conversation begins with a system turn as well")
        turns, learned = [{"role": "system", "content": system}, *turns], [False, *learned]
    return Conversation(turns, learned, _tools(row.get("tools")))


def _learned(turns: list[Turn], field: str) -> list[bool]:
    """Whether each turn is an answer to learn; OpenAI's `weight`, 0 or 1, takes one out and is taken off the turn."""
    learned = []
    for index, turn in enumerate(turns):
        weight = turn.pop("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise _BadTurnError(field, f"turn {index + 1}: weight {weight!r:.40}: neither 0 nor 1")
        learned.append(turn["role"] == ASSISTANT and weight == 1)
    return learned


def _side(value: Any, field: str, role: str) -> list[Turn]:
    if isinstance(value, str) and not _says_turns(value):
        return [{"role": role, "content": value}]
    if value is None and field == "prompt":
        raise _BadTurnError(field, "is missing")
    return _turns(value, field)


def _says_turns(text: str) -> bool:
    """Whether a text is the JSON of turns: a text may be any other JSON, or begin like it."""
    if not text.lstrip().startswith("[{"):
        return False
    try:
        value = parse_json(text)
    except ValueError:
        return False
    return all(isinstance(turn, dict) and not turn.keys().isdisjoint(("role", "from")) for turn in value)


def _turns(value: Any, field: str) -> list[Turn]:
    if isinstance(value, str):
        value = _from_json(value, field)
    if value is None:  # a missing conversation has no answer, which is counted
        return []
    if not isinstance(value, Sequence):
        raise _BadTurnError(field, f"holds {value!r:.40}, not a list of turns")
    return [_turn(turn, f"turn {index + 1}", field) for index, turn in enumerate(value)]


def _from_json(text: str, field: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        raise _BadTurnError(field, f"holds {text!r:.40}, neither a list of turns nor JSON of one") from None


def _turn(given: Any, where: str, field: str) -> Turn:
    if not isinstance(given, dict):
        raise _BadTurnError(field, f"{where}: {given!r:.40}: not a turn with role and content")
    # Columns of Parquet files have every key in every turn, None where the turn has none.
    turn = _without_none(given)
    named, spoken = turn.pop("role", None), turn.pop("content", None)
    if named is None and "from" in turn:
        named, spoken = turn.pop("from"), turn.pop("value", None)
    if not isinstance(named, str) or named.lower() not in ROLES:
        known = "" if not isinstance(named, str) else nearest(named, list(ROLES))
        raise _BadTurnError(field, f"{where}: role {named!r:.40}: not one of {', '.join(ROLES)}{known}")
    calls = turn.pop("tool_calls", None) or []
    if not isinstance(calls, list):
        raise _BadTurnError(field, f"{where}: tool_calls {calls!r:.40}: not a list")
    if calls:
        turn["tool_calls"] = [_call(call, where, field) for call in calls]
    return {"role": ROLES[named.lower()], "content": _text(spoken, where, field), **turn}


def _text(content: Any, where: str, field: str) -> str:
    """Text, or the text parts of a list one after the other; a turn that only calls tools has none."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise _BadTurnError(field, f"{where}: content {content!r:.40}: neither text nor a list of text parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise _BadTurnError(field, f"{where}: a part {part!r:.60}: not text, and a language model reads nothing else")
    return "".join(part["text"] for part in content)


def _call(call: Any, where: str, field: str) -> Any:
    """A tool call with its arguments as a mapping: OpenAI writes them as JSON text, templates expect them as they are."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _BadTurnError(field, f"{where}: tool call {call!r:.40}: without a function and its name")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        arguments = _from_json(arguments, field)
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str):
        value = _from_json(value, "tools") if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _BadTurnError("tools", f"holds {value!r:.40}, not a list of tools, each a mapping")
    return [_without_none(tool) for tool in value] or None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
