"""Digest: one sha256 over the global adapters, in canonical order of their names, whatever the topology."""

from __future__ import annotations

import hashlib

from fedmoe_ds.adapters.bank import Bank
from fedmoe_ds.runtime import Runtime


def global_digest(bank: Bank, runtime: Runtime, first_expert: int, ep_size: int) -> str:
    """Hash every tensor where it lives, then hash the sorted (name, hash) list. Identical on every rank."""
    mine = {}
    if runtime.rank < ep_size:  # cluster 0 holds one full copy
        for key, _, tensor in bank.items(first_expert):
            data = tensor.detach().cpu().contiguous().numpy().tobytes()
            mine[key] = hashlib.sha256(f"{tuple(tensor.shape)}".encode() + data).hexdigest()
    merged: dict[str, str] = {}
    for part in runtime.gather(mine):
        merged.update(part)
    return hashlib.sha256("\n".join(f"{key} {merged[key]}" for key in sorted(merged)).encode()).hexdigest()
