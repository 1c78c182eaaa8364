"""Chat template: the Jinja text that writes a conversation, and where in what it wrote the answers stand.

The template is the one of `data.chat_template`, else the tokenizer's own, else ChatML. Answers are found by the template's
generation marks (`{% generation %}`) where it has them. Otherwise by prefixes: what the template writes up to a turn, with the
prompt for a generation, and what it writes with that turn must both be beginnings of the whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.data.templates.conversation import ASSISTANT, Conversation, Turn
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]
"""First and last + 1 character of an answer, its end-of-turn token included."""
END = "<|im_end|>"
CHATML = (
    "{{% for message in messages %}}"
    "{{% if message['role'] == 'assistant' %}}"
    "{{{{ '<|im_start|>assistant\\n' }}}}"
    "{{% generation %}}{{{{ message['content'] + {end} }}}}{{% endgeneration %}}{{{{ '\\n' }}}}"
    "{{% else %}}{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + {end} + '\\n' }}}}{{% endif %}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
)
"""The template of a model without one; `end` is what ends a turn."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates write today's date, and a run must be repeatable on another day: this one is what Llama 3 falls back to.
_TODAY = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') | "
    "replace('%m', '07') | replace('%Y', '2024') | replace('%y', '24') | replace('%A', 'Friday') | replace('%a', 'Fri') | "
    "replace('%H', '00') | replace('%M', '00') | replace('%S', '00') }}{%- endmacro -%}"
)
_MARK = "\U0010ffff#"


class RefusedError(Exception):
    """The template does not write this conversation; the text says why."""


class UnmarkedError(Exception):
    """What the template wrote does not tell where an answer begins and ends."""


class Written(NamedTuple):
    """A conversation as text, and its answers in order."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with the values that it may use. `origin` says where it comes from: file, tokenizer or ChatML."""

    text: str
    origin: str
    values: dict[str, Any]
    specials: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def has_marks(self) -> bool:
        """Whether the template itself says what is generated."""
        return _MARKS.search(self.text) is not None

    def write(self, chat: Conversation) -> Written:
        """Return the text and the spans of the learned turns.

        Raises RefusedError where the template refuses or passes over a turn, UnmarkedError where the answers cannot be found.
        """
        if self.has_marks:
            text, spans = self._render(chat, chat.messages, marks=True)
            turns = [learned for turn, learned in zip(chat.messages, chat.learned, strict=True) if turn["role"] == ASSISTANT]
            # Marks carry no turn: only where there are as many does each belong to one.
            if not spans or (len(spans) != len(turns) and not all(turns)):
                raise UnmarkedError
            spans = [span for span, learned in zip(spans, turns, strict=True) if learned] if not all(turns) else spans
            written = Written(text, [span for span in spans if span[0] < span[1]])
        else:
            written = self._by_prefixes(chat)
        _check_whole(chat, written.text)
        return written

    def text_of(self, chat: Conversation, asking: bool = False) -> str:
        """Return the text alone; `asking`: with what stands before the next answer."""
        return self._render(chat, chat.messages, prompt=asking)[0]

    def _by_prefixes(self, chat: Conversation) -> Written:
        text, spans = self.text_of(chat), []
        for index, learned in enumerate(chat.learned):
            if learned:
                start = self._beginning(chat, index, text)
                spans.append((start, self._end(chat, index, text, start)))
        return Written(text, spans)

    def _beginning(self, chat: Conversation, index: int, text: str) -> int:
        try:
            before = self._render(chat, chat.messages[:index], prompt=True)[0]
        except RefusedError:  # a first turn of the assistant: there is no prompt
            raise UnmarkedError from None
        if not text.startswith(before):
            raise UnmarkedError
        return len(before)

    def _end(self, chat: Conversation, index: int, text: str, start: int) -> int:
        last = index + 1 == len(chat.messages)
        upto = text if last else self._render(chat, chat.messages[: index + 1])[0]
        if text.startswith(upto) and len(upto) > start:
            # What follows the end-of-turn token, a line break as a rule, is never generated.
            stripped = text[: len(upto)].rstrip()
            return len(stripped) if len(stripped) > start and stripped.endswith(self.specials) else len(upto)
        return self._end_by_mark(chat, index, text, start)

    def _end_by_mark(self, chat: Conversation, index: int, text: str, start: int) -> int:
        """Where a turn is written otherwise when others follow (Qwen3 leaves out earlier thinking): a mark behind its words
        shows where they end, and a special token must follow."""
        turn = chat.messages[index]
        for words in (turn["content"], turn["content"].rstrip()):
            marked: list[Turn] = [*chat.messages]
            marked[index] = {**turn, "content": words + _MARK}
            before, mark, after = self._render(chat, marked)[0].partition(_MARK)
            if mark and before + after == text and len(before) >= start:
                rest = after.lstrip()
                end = next((name for name in self.specials if rest.startswith(name)), None)
                if end is not None:
                    return len(text) - len(rest) + len(end)
        raise UnmarkedError

    def _render(
        self, chat: Conversation, messages: list[Turn], prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        text = _TODAY + self.text if "strftime_now" in self.text else self.text
        try:
            (rendered,), spans = render_jinja_template(
                conversations=[messages],
                tools=chat.tools,
                chat_template=text,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self.values,
            )
        # raise_exception is the template's way to refuse; a template that trips over a turn refuses it as well.
        except Exception as error:
            raise RefusedError(f"{type(error).__name__}: {error}".splitlines()[0]) from None
        return rendered, list(spans[0]) if marks else []


def chat_template(config: DataConfig, tokenizer: PreTrainedTokenizerFast, starts: bool) -> ChatTemplate:
    """Return the template of a run; `starts`: the model was trained with a leading token.

    Raises UserError for a file that cannot be read, for a tokenizer with several templates of which none is the default, and
    for what is no Jinja template.
    """
    text, origin = template_text(config, tokenizer), "file" if config.chat_template is not None else "tokenizer"
    if text is None:
        end = f"'{END}'" if END in tokenizer.get_vocab() else "eos_token"
        text, origin = ("{{ bos_token }}" if starts else "") + CHATML.format(end=end), "ChatML"
    if isinstance(text, dict):
        if "default" not in text:
            raise UserError(
                f"data.chat_template: null: the tokenizer has chat templates of the names {', '.join(sorted(text))} and no "
                "default; save the one to use in a file and give its path"
            )
        text = text["default"]
    template = named_template(str(text), origin, tokenizer)
    _check_syntax(template, config)
    return template


def named_template(text: str, origin: str, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """A template with the values and names of a tokenizer."""
    # Longest first: of two names that end a text, the longer one is there.
    names = {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)}
    specials = tuple(sorted((name for name in names if len(name) > 1), key=lambda name: (-len(name), name)))
    return ChatTemplate(text, origin, dict(tokenizer.special_tokens_map), specials)


def template_text(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The template's text as it is written down: in the file, or as the tokenizer has it; None: nowhere."""
    if config.chat_template is None:
        return tokenizer.chat_template
    path = expanded(config.chat_template, "data.chat_template")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "not UTF-8 text"
        raise UserError(f"data.chat_template: {config.chat_template}: cannot be read: {why}; give a Jinja file") from None


def _check_syntax(template: ChatTemplate, config: DataConfig) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        # Without a conversation it is compiled and nothing else.
        render_jinja_template(conversations=[], chat_template=template.text)
    except Exception as error:
        where = config.chat_template or "the tokenizer's own"
        raise UserError(f"data.chat_template: {where}: no Jinja template: {str(error).splitlines()[0]}; mend it") from None


def _check_whole(chat: Conversation, text: str) -> None:
    """A template that passes over turns or tool calls would teach answers that come from nowhere."""
    for turn in chat.messages:
        # Of an assistant's turn a template may leave thinking out.
        spoken = turn["content"].strip() if turn["role"] != ASSISTANT else ""
        names = [call["function"]["name"] for call in turn.get("tool_calls", [])]
        if spoken and spoken not in text and _quoted(spoken) not in text:
            raise RefusedError(f"it passes over a turn of role {turn['role']}")
        if not all(name in text for name in names):
            raise RefusedError("it passes over tool calls")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
