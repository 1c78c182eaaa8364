"""Samples: what the clients of each tier train on, for the record and the report: how long sequences are, and a few as text.

Lengths are counts and always recorded. Text is what clients have written: it is recorded only where `data.show_samples` asks
for it, and then the record is this user's alone.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from fedmoe_ds.clients.client import counts_of, tiers_of
from fedmoe_ds.data import Sequences
from fedmoe_ds.federation.build import Parts

BINS = 16
"""Of the lengths, from one token to data.sequence_length."""


def length_counts(parts: Parts) -> dict[str, Any] | None:
    """How many training sequences of each tier's clients have so many tokens; None for images.

    `counts[tier][i]` have more than i x `width` tokens and at most (i + 1) x `width`.
    """
    if parts.data.image_shape is not None:
        return None
    width = -(-parts.data.sequence_length // BINS)
    counts = {}
    for tier, members in tiers_of(parts.clients).items():
        lengths = parts.data.train_lengths_of(counts_of(members, "index"))
        counts[tier] = np.bincount((lengths - 1) // width, minlength=BINS).tolist()
    return {"width": width, "counts": counts}


def shown_samples(parts: Parts) -> list[dict[str, Any]]:
    """The first training samples of each tier's first client, the targets apart from the rest."""
    count, tokenizer = parts.config.data.show_samples, parts.foundation.tokenizer
    rows = []
    for tier, members in tiers_of(parts.clients).items() if count else ():
        first = members[0]
        own = parts.data.train(first.index)
        for place in range(min(count, len(own))):
            pieces = [
                # Special tokens are shown: whether an answer ends with one is what one looks for.
                {"text": tokenizer.decode(ids, skip_special_tokens=False), "target": target}
                for ids, target in spans(own, place)
            ]
            facts = {"tokens": len(own.input_ids[place]), "targets": int(own.loss_mask[place].sum())}
            rows.append({"tier_label": tier, "top_k": first.top_k, "client": first.name, "pieces": pieces, **facts})
    return rows


def spans(own: Sequences, place: int) -> list[tuple[list[int], bool]]:
    """Neighbouring tokens of one sequence that are all targets, or all not, in order."""
    pairs = zip(own.input_ids[place].tolist(), own.loss_mask[place].tolist(), strict=True)
    return [([token for token, _ in group], target) for target, group in itertools.groupby(pairs, key=lambda pair: pair[1])]
