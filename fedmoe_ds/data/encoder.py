"""Encoder: a tokenizer for text of users, in which no text spells a special token.

A tokenizer's special tokens have names, such as `</s>`. Where a text holds such a name, the usual call turns it into the
token: a document then ends in its middle. Here the name is text like any other, whatever the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedmoe_ds.distributed.stop_points import stop_point
from fedmoe_ds.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class Encoded(NamedTuple):
    """Ids of a text, and whether the text holds the name of a special token."""

    ids: list[int]
    named: bool


class Placed(NamedTuple):
    """Ids of a text, the first and last + 1 character that each of them stands for, and whether it holds such a name."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    named: bool = False


class Encoder:
    """A tokenizer that adds no special token on its own, and the special tokens we add: `start` and `end` of a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, own_code: bool = False) -> None:
        """`own_code`: it runs Python code that we do not know.

        Raises UserError for a tokenizer without an end-of-text token, or without a backend of the `tokenizers` library.
        """
        name = f"foundation.path: {tokenizer.name_or_path}"
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"{name}: its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json; save a fast tokenizer")
        if tokenizer.eos_token_id is None:
            raise UserError(f"{name}: its tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")
        self.tokenizer, self._name, self._own_code = tokenizer, name, own_code
        self._special = special_tokens(tokenizer)
        self._special_ids = np.array(list(self._special), dtype=np.int64)
        self.end = [int(tokenizer.eos_token_id)]
        # Models that were trained with a leading token (Mixtral's <s>) are given it, the others are not.
        bos = tokenizer.bos_token_id
        # This call also switches off what the file says about truncation and padding, for `_ids` as for this line.
        first = tokenizer("a")["input_ids"][:1]
        self.start = [int(bos)] if bos is not None and first == [bos] else []
        self._direct = not own_code and _calls_its_backend(tokenizer)

    def __call__(self, texts: list[str]) -> list[Encoded]:
        """Return the ids of each text. Raises UserError where a special token stands for plain text even so."""
        stop_point()
        if not texts:  # the library trips over nothing at all
            return []
        found = self._ids(texts)
        # The usual tokenizer serves almost every text; only a text with a special id is encoded once more.
        encoded = [Encoded(ids, False) for ids in found]
        suspects = self._suspects(found)
        if suspects:
            self._refuse_own_code()
            plain, allowed = self._plain
            again = plain.encode_batch([texts[row] for row in suspects], add_special_tokens=False)
            for row, ids in zip(suspects, (encoding.ids for encoding in again), strict=True):
                if left := self._special.keys() & set(ids) - allowed:
                    raise UserError(
                        f"{self._name}: its tokenizer reads '{self._special[left.pop()]}' out of plain text; use another"
                    )
                encoded[row] = Encoded(ids, ids != found[row])
        return encoded

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, as the usual call returns them."""
        backend = self.tokenizer.backend_tokenizer
        if self._direct and backend.truncation is None and backend.padding is None:
            # The same call without offsets, which nobody reads here: a third less time. Its threads keep the order of texts.
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        found: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return found

    def _suspects(self, found: list[list[int]]) -> list[int]:
        """The texts in whose ids a special token occurs, ascending."""
        ends = np.cumsum([len(ids) for ids in found])
        flat = np.fromiter(chain.from_iterable(found), dtype=np.int64, count=int(ends[-1]) if len(found) else 0)
        # All texts at once: looking at every id in Python would take as long as the tokenizer does.
        places = np.flatnonzero(np.isin(flat, self._special_ids))
        return [int(row) for row in np.unique(np.searchsorted(ends, places, side="right"))]

    def placed(self, texts: list[str]) -> list[Placed]:
        """Return ids with their places; names of special tokens are special tokens, wherever they come from."""
        stop_point()
        if self._own_code:  # its code may change what its backend does
            found = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False) if texts else {}
            return [Placed(*pair) for pair in zip(found.get("input_ids", []), found.get("offset_mapping", []), strict=True)]
        return [Placed(one.ids, one.offsets) for one in self._bare.encode_batch(texts, add_special_tokens=False)]

    def placed_as_text(self, texts: list[str]) -> list[Placed]:
        """The same with no special token at all: every name is text."""
        found = self.placed(texts)
        for row, one in enumerate(found):
            if not self._special.keys().isdisjoint(one.ids):
                again = self.placed_apart(texts[row], [])
                if again is None:
                    self([texts[row]])  # a special token stands for plain text even so, which is refused there
                assert again is not None, "the check of both is the same"
                found[row] = again._replace(named=again.ids != one.ids)
        return found

    def placed_apart(self, text: str, own: list[tuple[int, int]]) -> Placed | None:
        """The same where only the names at the places `own`, which ascend, are special tokens; None where that fails.

        Raises UserError for a tokenizer with code of its own.
        """
        self._refuse_own_code()
        pieces, ends, cut, end, length = list[str](), list[int](), list[int](), 0, 0
        for start, stop in own:
            pieces += [text[end:start], _secret(text[start:stop])]
            length += len(pieces[-2]) + len(pieces[-1])
            # Behind every secret the places are off by what it is longer than the name.
            ends.append(length)
            cut.append(len(pieces[-1]) - (stop - start) + (cut[-1] if cut else 0))
            end = stop
        (found,) = self._plain[0].encode_batch(["".join([*pieces, text[end:]])], add_special_tokens=False)
        special = [token for token in found.ids if token in self._special and token not in self._plain[1]]
        if [self._special[token] for token in special] != [text[start:stop] for start, stop in own]:
            return None

        def place(position: int) -> int:
            behind = bisect_right(ends, position)
            return position - (cut[behind - 1] if behind else 0)

        return Placed(found.ids, [(place(start), place(stop)) for start, stop in found.offsets])

    @cached_property
    def names(self) -> dict[int, str]:
        """Id -> name of the special tokens that are no letter and do not stand for unknown text."""
        unknown = _unknown_id(json.loads(self.tokenizer.backend_tokenizer.to_str())["model"])
        return {token: name for token, name in self._special.items() if len(name) > 1 and token != unknown}

    def _refuse_own_code(self) -> None:
        if self._own_code:  # what is left without special tokens would be left without its code, too
            raise UserError(
                f"{self._name}: its tokenizer runs code of its own, and a text holds the name of a special token, which "
                "only a tokenizer without code can read as text; take such names out of the data"
            )

    @cached_property
    def _bare(self) -> Tokenizer:
        """The tokenizer without what trims places and adds tokens."""
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return Tokenizer.from_str(json.dumps(state | {"post_processor": None, "truncation": None, "padding": None}))

    @cached_property
    def _plain(self) -> tuple[Tokenizer, set[int]]:
        """The same tokenizer with its special tokens under names that no text holds, and the ids that are text as well."""
        from tokenizers import Tokenizer

        # A copy through JSON: the caller's tokenizer keeps its names.
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        unknown = _unknown_id(state["model"])
        state |= {"post_processor": None, "truncation": None, "padding": None}
        _rename(state, {name: _secret(name) for name in self._special.values()})
        # The model's own id for unknown text, and single letters, may come out of plain text.
        allowed = {token for token, name in self._special.items() if len(name) == 1 or token == unknown}
        return Tokenizer.from_str(json.dumps(state)), allowed


def _calls_its_backend(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a call does no more than its `tokenizers` backend: the class is not one that overrides the call."""
    from transformers import PreTrainedTokenizerFast as Usual

    names = ("__call__", "_encode_plus")
    same = all(getattr(type(tokenizer), name, None) is getattr(Usual, name, tokenizer) for name in names)
    # Names of special tokens are recognised, which is the default: without that the ids would be others.
    return same and not tokenizer.backend_tokenizer.encode_special_tokens


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Return id -> name of every special token."""
    added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _secret(name: str) -> str:
    # A noncharacter of Unicode around a digest: no text that is exchanged holds it, and no two names collide.
    return f"\U0010fffe{hashlib.sha256(name.encode()).hexdigest()}\U0010fffe"


def _rename(state: dict[str, Any], names: dict[str, str]) -> None:
    """Give special tokens other names, in place. Ids stay: a vocabulary with gaps would be numbered anew.

    In the vocabulary a single character keeps its name: it is a letter of the alphabet, which may serve as padding too.
    """
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model, names = state["model"], {name: secret for name, secret in names.items() if len(name) > 1}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:  # Unigram: [piece, score]
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        # Files of older `tokenizers` hold a merge as one string, newer ones as a pair.
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        # A merge that makes or uses a renamed piece refers to a name that is gone; the library would refuse the file.
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]


def _unknown_id(model: dict[str, Any]) -> int | None:
    """The id that the model itself gives to text it does not know."""
    if isinstance(model["vocab"], dict):
        found: int | None = model["vocab"].get(model.get("unk_token"))
        return found
    return model.get("unk_id")
