"""Digest: one sha256 over what a run has learnt, in canonical order of the tensors' names, whatever the topology."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor

from fedmoe_ds.distributed.runtime import Runtime


def global_digest(
    tensors: Iterable[tuple[str, Tensor]], runtime: Runtime, ep_size: int, hashes: Mapping[str, str] | None = None
) -> str:
    """Hash every (name, tensor) where it lives, then hash the sorted (name, hash) list. Identical on every rank.

    `hashes`: those of tensors that no rank has as a whole, by name.
    """
    mine = dict(hashes or {})
    if runtime.rank < ep_size:  # cluster 0 holds one full copy
        for key, tensor in tensors:
            data = tensor.detach().cpu().contiguous().numpy().tobytes()
            # The shape is hashed, too: the same bytes in another shape are another result.
            mine[key] = hashlib.sha256(f"{tuple(tensor.shape)}".encode() + data).hexdigest()
    merged: dict[str, str] = {}
    for part in runtime.gather(mine):
        # Every shard has the same dense tensors, so it does not matter whose hash stays.
        merged.update(part)
    return hashlib.sha256("\n".join(f"{key} {merged[key]}" for key in sorted(merged)).encode()).hexdigest()
