"""Postprocessors: what happens to a client's update between its local training and the sum.

This is the place for clipping, noise and compression. A postprocessor may change the view's tensors in place. Every rank of the
client's cluster holds a part of them and calls the same postprocessors in the same order, so these may use collectives of the
cluster, and all ranks must come to the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.update import ClientUpdate

OK = "ok"
"""The status of an update that is in the sum."""


class Postprocessor(Protocol):
    """One step between an update and the sum."""

    def __call__(self, view: ClientView, update: ClientUpdate) -> str | None:
        """None lets the update go on; a status keeps it out of the round and stands in the client's row of metrics.jsonl."""


def keep_out_non_finite(view: ClientView, update: ClientUpdate) -> str | None:
    """Keep out an update with a NaN or an infinity in its loss, in its sums, or in an adapter value on whichever rank."""
    # A mean with a NaN in it would be lost for all clients; exact sums refuse one with an error.
    finite = update.finite and all(np.isfinite(value).all() for value in update.observed.values())
    return None if finite else "non-finite"


def postprocess(steps: Sequence[Postprocessor], view: ClientView, update: ClientUpdate) -> str:
    """The status of an update after all steps; the first one that keeps it out is the last that sees it."""
    for step in steps:
        status = step(view, update)
        if status is not None:
            return status
    return OK
