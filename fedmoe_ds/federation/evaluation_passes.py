"""Evaluation passes: which clients' hold-outs go through the model together."""

from __future__ import annotations

from fedmoe_ds.config import Config


def most_together(config: Config, home: int) -> int:
    """Sequences of clients' hold-outs in one pass: as many as a pass of training has with `home` clients on a rank."""
    step = config.local.batch_size
    return max(config.evaluation.batch_size, home * min(config.execution.micro_batch_size or step, step))


def passes(sizes: list[int], longest: list[int], limit: int) -> list[list[int]]:
    """Cut parts of so many sequences into passes of at most `limit` sequences, or of a single larger part.

    Parts whose longest sequences are about equally long come together: a pass is padded to the longest of all.
    """
    found, total = list[list[int]](), limit
    for place in sorted(range(len(sizes)), key=lambda place: longest[place]):
        if not found or total + sizes[place] > limit:
            found.append([])
            total = 0
        found[-1].append(place)
        total += sizes[place]
    return found
