"""Presence: of which experts a client has rows.

Legend: L layers, E experts of the model.
"""

from __future__ import annotations

import numpy as np

from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.model.adapter_bank import BlockSpec


def present(spec: BlockSpec, update: ClientUpdate) -> np.ndarray:
    """1 where the client has rows: bool [L, E] for expert blocks, all of [L] for dense ones.

    A client that routed no row to an expert returns what it received. Where it received all rows that is harmless: it stands
    for no change. A client of a lower rank received a truncated copy, and its zeros would erase rows that it never saw.
    """
    return update.counts_LE > 0 if spec.expert else np.ones(len(spec.layers), dtype=bool)
