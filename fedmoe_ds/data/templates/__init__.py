"""How a row becomes tokens, and which of the tokens count as targets.

* `text`: a document; every token but the first of a sequence is a target. Documents are packed into sequences; nothing is cut
  off but a last token that would stand alone.
* `chat`: a conversation, written by the model's chat template; the assistant's turns are targets, with the token that ends
  each. A conversation that is too long ends with the last turn of the assistant that fits.
* `instruction`: a prompt and an answer; the answer and the end-of-text token are targets. The prompt is kept whole. An answer
  that is too long loses its end, and the end-of-text token with it, because the answer does not end there.
* `classification`: a text and the words of its label; the words and the end-of-text token are targets. A text that is too long
  loses its end; question, label and end-of-text token are kept whole.

What is left out or cut is counted (`omissions`): an empty text or answer, a prompt or a label that leaves no room, a
conversation that the chat template refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from fedmoe_ds.config.schema import DataConfig
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.omissions import CUT, EMPTY, NAMED, NO_ROOM
from fedmoe_ds.data.progress import counted
from fedmoe_ds.data.table import Table
from fedmoe_ds.data.templates.chat import encode_chats
from fedmoe_ds.data.templates.classification import classes, label_words
from fedmoe_ds.data.templates.columns import (
    candidates,
    check_rows,
    require_column,
    resolve_columns,
    resolve_template,
)
from fedmoe_ds.data.templates.documents import documents
from fedmoe_ds.data.templates.instruction import instructions
from fedmoe_ds.data.templates.reading import Reading, reading_of
from fedmoe_ds.data.templates.samples import Pieces, Samples, all_but_first, pack

__all__ = [
    "Reading",
    "Samples",
    "all_but_first",
    "candidates",
    "check_rows",
    "encode",
    "label_words",
    "pack",
    "reading_of",
    "require_column",
    "resolve_columns",
    "resolve_template",
]


def encode(table: Table, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Samples:
    """Return the encoded rows of `table`; a text row is a whole document, any other row is one finished sequence."""
    if config.template == "chat":
        return encode_chats(table, columns, config, encoder)
    encoded = Samples([], [], [], [])
    encoders = _ENCODERS[config.template](table, columns, config, encoder)
    for row, pieces in enumerate(counted(encoders, len(table), "samples tokenized")):
        if pieces.named:
            encoded.omissions.append((row, NAMED))
        ids = np.array(pieces.prompt + pieces.answer, dtype=np.int64)
        kept = len(ids) if config.template == "text" else config.sequence_length
        # The first token has nothing before it to be predicted from, also where there is no prompt.
        first = max(len(pieces.prompt), 1)
        # An answer may lose its end, a label may not: half of its words would be another label.
        needed = len(ids) if config.template == "classification" else first + 1
        if pieces.empty or needed > kept:
            empty = pieces.empty or config.template == "text"
            encoded.omissions.append((row, EMPTY if empty else NO_ROOM))
            continue
        if pieces.cut or len(ids) > kept:
            encoded.omissions.append((row, CUT))
        mask = np.zeros(min(len(ids), kept), dtype=np.bool_)
        mask[first:] = True
        encoded.add(row, ids[:kept], mask)
    return encoded


_ENCODERS: dict[str, Callable[[Table, dict[str, str], DataConfig, Encoder], Iterator[Pieces]]] = {
    "text": documents,
    "instruction": instructions,
    "classification": classes,
}
