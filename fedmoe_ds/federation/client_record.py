"""Client record: what the record says of one client in one round."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.methods.private import change_norm
from fedmoe_ds.model.moe_layer import RESCALER

OUT_OF_MEMORY = "out-of-memory"


def trained(update: ClientUpdate, status: str, flops: float, personal: Personal) -> dict[str, Any]:
    """What metrics say about one client in one round."""
    first, last = update.losses or (None, None)
    # The mean over layers: one number per client and round keeps the record small.
    rescaler = float(personal.state(update.client.index)[RESCALER].mean()) if RESCALER in personal.specs else None
    return {
        "client": update.client.name,
        "top_k": update.client.top_k,
        "tier_label": update.client.tier,
        "steps": update.steps,
        "tokens": update.tokens,
        "targets": update.targets,
        "loss_first": first,
        "loss_last": last,
        "active_experts": update.assignment.cap,
        "rank": None if update.assignment.rows_R is None else int(update.assignment.rows_R.sum()),
        "flops": flops,
        "seconds": update.seconds,
        "status": status,
        "rescaler": rescaler,
        **_held(update.assignment.held_LE),
        **_probe(update),
        **_norm(update),
    }


def _probe(update: ClientUpdate) -> dict[str, int]:
    """Token rows of its gradient probe; nothing where it has none, or none with passes of its own."""
    return {} if update.probed is None or not update.probed.tokens else {"probe_tokens": update.probed.tokens}


def _norm(update: ClientUpdate) -> dict[str, float]:
    """The norm of its change before it is clipped; nothing where nothing is private."""
    return {} if (norm := change_norm(update)) is None else {"change_norm": norm}


def _held(held_LE: np.ndarray | None) -> dict[str, list[int]]:
    """How many experts a client could use, layer by layer; nothing where it could use all."""
    # Which ones is in the checkpoint's memories: masks of all clients would make up most of the record.
    return {} if held_LE is None else {"experts_held": [int(count) for count in held_LE.sum(1)]}


def absent(client: Client, status: str = OUT_OF_MEMORY) -> dict[str, Any]:
    """What metrics say about a client that was not trained: because it did not fit into memory, unless `status` says why."""
    nothing = {
        "steps": 0,
        "tokens": 0,
        "targets": 0,
        "loss_first": None,
        "loss_last": None,
        "active_experts": client.cap,
        "rank": None,
    }
    rest = {"flops": 0.0, "seconds": 0.0, "status": status, "rescaler": None}
    return {"client": client.name, "top_k": client.top_k, "tier_label": client.tier, **nothing, **rest}
