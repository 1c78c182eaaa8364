"""The tokenizer of the built-in foundation: a byte-level BPE trained on the pre-training text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD = "<|pad|>"
END_OF_TEXT = "<|endoftext|>"
BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; equal texts and size give an equal tokenizer.

    Ids: `<|pad|>` 0, `<|endoftext|>` 1 (beginning and end of a document), then the 256 bytes, then merges by rank. A
    corpus too small for `vocab_size` gives fewer entries, so `len(tokenizer)` and not `vocab_size` is the number of ids
    in use.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    assert vocab_size >= BYTES + 2, f"a byte-level vocabulary needs {BYTES + 2} entries, got {vocab_size}"
    backend = Tokenizer(models.BPE())
    # No space in front: what is encoded decodes to the same text.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END_OF_TEXT],
        # All 256 bytes, sorted: any text can be encoded, and ids do not depend on the order of a set.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
