"""Chat: conversations become token ids and targets, joint as the template wrote them.

The ids are those of `apply_chat_template(..., tokenize=True)`, but where a turn holds the name of a special token: names that
the template writes are special tokens, those in a turn are text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.data.encoder import Encoder, Placed
from fedmoe_ds.data.omissions import CUT, EMPTY, NAMED, NO_ROOM, REFUSED, UNMARKED
from fedmoe_ds.data.progress import counted
from fedmoe_ds.data.table import Table
from fedmoe_ds.data.templates.chat_template import ChatTemplate, RefusedError, Span, UnmarkedError, Written, chat_template
from fedmoe_ds.data.templates.conversation import ASSISTANT, Conversation, Reader
from fedmoe_ds.data.templates.samples import BATCH, Samples
from fedmoe_ds.errors import UserError

_STAND_IN = "\U0010ffff{}\U0010ffff"


def encode_chats(table: Table, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Samples:
    """Return the encoded conversations; a long one ends with the last learned turn that fits.

    Raises UserError where the template serves none of them.
    """
    template = chat_template(config, encoder.tokenizer, bool(encoder.start))
    samples, refusals = Samples([], [], [], []), list[str]()
    row = 0
    chats = counted(Reader(table, columns), len(table), "conversations tokenized")
    while batch := list(islice(chats, BATCH)):
        written = [_written(chat, template, refusals) for chat in batch]
        # One call for the batch: the library encodes its texts in parallel.
        known = dict[str, list[int]]()
        placed = iter(encoder.placed([one.text for one in written if isinstance(one, Written)]))
        for chat, one in zip(batch, written, strict=True):
            if isinstance(one, str):
                samples.omissions.append((row, one))
            else:
                _add(samples, row, _Chat(chat, one, next(placed)), template, encoder, config.sequence_length, known)
            row += 1
    _check_some(samples, refusals, row)
    return samples


def _written(chat: Conversation, template: ChatTemplate, refusals: list[str]) -> Written | str:
    """The text, or the kind of omission."""
    if not chat.has_answer:
        return EMPTY
    try:
        return template.write(chat)
    except RefusedError as refused:
        refusals.append(str(refused))
        return REFUSED
    except UnmarkedError:
        return UNMARKED


def _check_some(samples: Samples, refusals: list[str], rows: int) -> None:
    """Where the template serves no conversation at all, the user wants its words and not a count."""
    kinds = Counter(kind for _, kind in samples.omissions)
    if samples.rows or not kinds[REFUSED] + kinds[UNMARKED]:
        return
    if refusals:
        raise UserError(
            f"data.chat_template: the template refuses {kinds[REFUSED]} of {rows} conversations, the first with: "
            f"{refusals[0]}; mend the turns (see the roles it takes), or give another template"
        )
    raise UserError(
        f"data.chat_template: in {kinds[UNMARKED]} of {rows} conversations the template's text does not tell where an answer "
        "begins and ends; give a copy of it with {% generation %} marks around the answers"
    )


class _Chat:
    """One conversation on its way to tokens."""

    def __init__(self, chat: Conversation, written: Written, placed: Placed) -> None:
        self.chat, self.written, self.placed = chat, written, placed
        self.named = False

    def separate_names(self, template: ChatTemplate, encoder: Encoder) -> None:
        """Encode once more where a turn holds the name of a special token. Raises UnmarkedError where that cannot be done."""
        if not self._may_hold_names(encoder):
            return
        own = _own_names(self.chat, self.written.text, template)
        again = encoder.placed_apart(self.written.text, own)
        if again is None:
            raise UnmarkedError
        self.named, self.placed = again.ids != self.placed.ids, again

    def check_prompts(self, encoder: Encoder, known: dict[str, list[int]]) -> None:
        """Raise UnmarkedError unless every prompt alone has the tokens that it has in the whole.

        A tokenizer may split the end of a text otherwise than the same characters before other ones. What stands before a
        special token does not matter to what follows, so the prompt's text since the last one is compared. It is the same
        in most conversations, so its ids are kept in `known`.
        """
        ids, offsets, text = self.placed.ids, self.placed.offsets, self.written.text
        parts, expected = list[str](), list[list[int]]()
        for start, _ in self.written.spans:
            stop = sum(end <= start for _, end in offsets)
            first = next((index for index in range(stop - 1, 0, -1) if ids[index] in encoder.names), 0)
            parts.append(text[offsets[first][0] : start] if stop else "")
            expected.append(ids[first:stop])
        if new := list({part for part in parts if part not in known}):
            known.update(zip(new, (one.ids for one in encoder.placed(new)), strict=True))
        alone = [known[part] for part in parts]
        if self.named and alone != expected:
            # Behind the first token of each part all names are text.
            own = [[(0, len(encoder.names[part[0]]))] if part and part[0] in encoder.names else [] for part in expected]
            found = [encoder.placed_apart(part, places) for part, places in zip(parts, own, strict=True)]
            alone = [one.ids if one is not None else [] for one in found]
        if alone != expected:
            raise UnmarkedError

    def _may_hold_names(self, encoder: Encoder) -> bool:
        found = Counter(name for token in self.placed.ids if (name := encoder.names.get(token)) is not None)
        text = self.written.text
        # More tokens than names: something else is read as a special token, a spelling that the tokenizer makes equal.
        return found.total() != sum(text.count(name) for name in found) or any(
            name in part for name in found for part in strings([self.chat.messages, self.chat.tools])
        )


def _own_names(chat: Conversation, text: str, template: ChatTemplate, asking: bool = False) -> list[Span]:
    """Where in the text the template itself wrote names of special tokens: stand-ins take the place of those in the turns."""
    names = re.compile("|".join(map(re.escape, template.specials)))
    order = {name: index for index, name in enumerate(template.specials)}
    hidden = _mapped([chat.messages, chat.tools], lambda part: names.sub(lambda m: _STAND_IN.format(order[m[0]]), part))
    either = re.compile(f"{_STAND_IN.format('([0-9]+)')}|{names.pattern}")
    own, pieces, end, length = list[Span](), list[str](), 0, 0
    rendered = template.text_of(Conversation(hidden[0], chat.learned, hidden[1]), asking)
    for match in either.finditer(rendered):
        name = template.specials[int(match[1])] if match[1] else match[0]
        pieces += [rendered[end : match.start()], name]
        length += len(pieces[-2]) + len(name)
        end = match.end()
        if not match[1]:
            own.append((length - len(name), length))
    # A template that looks into the words of a turn may have written something else.
    if "".join([*pieces, rendered[end:]]) != text:
        raise UnmarkedError
    return own


def _add(
    samples: Samples, row: int, one: _Chat, template: ChatTemplate, encoder: Encoder, length: int, known: dict[str, list[int]]
) -> None:
    try:
        one.separate_names(template, encoder)
        exact = not template.has_marks
        ends, mask = targets(one.placed, one.written, exact)
        if exact:
            one.check_prompts(encoder, known)
    except (RefusedError, UnmarkedError):
        samples.omissions.append((row, UNMARKED))
        return
    if one.named:
        samples.omissions.append((row, NAMED))
    kept = len(mask)
    if kept > length:
        kept = max((end for end in ends if end <= length), default=0)
        samples.omissions.append((row, CUT if kept else NO_ROOM))
    if kept:
        samples.add(row, np.array(one.placed.ids[:kept], dtype=np.int64), mask[:kept])


def targets(placed: Placed, written: Written, exact: bool) -> tuple[list[int], NDArray[np.bool_]]:
    """Return the number of tokens up to the end of every answer, and which tokens belong to answers.

    `exact`: no token may hold the end of a prompt and the beginning of an answer, because at inference the prompt is encoded
    alone. With the template's own marks such a token is a target, as transformers has it. Raises UnmarkedError.
    """
    mask = np.zeros(len(placed.ids), dtype=np.bool_)
    starts, stops = np.array(placed.offsets, dtype=np.int64).reshape(-1, 2).T
    ends = []
    for start, stop in written.spans:
        inside = (stops > start) & (starts < stop)
        if exact and ((starts < start) & (stops > start) | (starts < stop) & (stops > stop)).any():
            raise UnmarkedError
        mask |= inside
        if inside.any():
            ends.append(int(inside.nonzero()[0][-1]) + 1)
    # The first token has nothing before it to be predicted from.
    mask[:1] = False
    if not mask.any():
        raise UnmarkedError
    return [end for end in ends if mask[:end].any()], mask


def encode_question(words: str, template: ChatTemplate, encoder: Encoder) -> tuple[list[int], set[int]]:
    """Return the ids that stand before the answer to a user's turn, and the tokens that end a turn of the assistant.

    Raises RefusedError where the template refuses the turn, and UnmarkedError where it holds the name of a special token that
    cannot be told from those that the template writes.
    """
    chat = Conversation([{"role": "user", "content": words}], [False])
    text = template.text_of(chat, asking=True)
    (placed,) = encoder.placed([text])
    if any(name in words for name in template.specials):
        apart = encoder.placed_apart(text, _own_names(chat, text, template, asking=True))
        if apart is None:
            raise UnmarkedError
        placed = apart
    return placed.ids, _ends_of_turns(template, encoder)


def _ends_of_turns(template: ChatTemplate, encoder: Encoder) -> set[int]:
    turns = [{"role": "user", "content": "?"}, {"role": ASSISTANT, "content": "!"}]
    try:
        written = template.write(Conversation(turns, [False, True]))
    except (RefusedError, UnmarkedError):
        return set()
    answer = written.text[: written.spans[-1][1]]
    return {token for token, name in encoder.names.items() if answer.endswith(name)}


def strings(value: Any) -> Iterator[str]:
    """Yield every text inside lists and mappings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same with every text changed; roles and keys that templates look for hold no names."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value
