"""Collectives on tensors, through DeepSpeed's communication layer (so that its comms logger sees them).

A group of None is a world of one: nothing travels.
"""

from __future__ import annotations

import deepspeed.comm as ds_comm
import torch
import torch.distributed as torch_dist
from torch import Tensor

Group = torch_dist.ProcessGroup | None


def all_to_all(
    output: Tensor, rows: Tensor, group: Group, receive: list[int] | None = None, send: list[int] | None = None
) -> None:
    """Rows to every peer of the group; `send` and `receive` are row counts per peer (equal parts when omitted)."""
    ds_comm.all_to_all_single(output, rows, output_split_sizes=receive, input_split_sizes=send, group=group)


def all_gather(part: Tensor, group: Group, size: int) -> Tensor:
    """[size, *part.shape]: the same-shaped tensor of every peer, in group order."""
    if size == 1:
        return part.unsqueeze(0)
    parts = [torch.empty_like(part) for _ in range(size)]
    ds_comm.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts)


def all_reduce_sum(total: Tensor, group: Group, size: int) -> Tensor:
    """Sum over the group, in place."""
    if size > 1:
        ds_comm.all_reduce(total, group=group)
    return total
