"""Collectives on tensors, through DeepSpeed's communication layer (so that its comms logger sees them).

A group of None is a world of one: nothing travels.
"""

from __future__ import annotations

from typing import Protocol

import deepspeed.comm as ds_comm
import torch
import torch.distributed as torch_dist
from torch import Tensor

from fedmoe_ds.activity import activity
from fedmoe_ds.control import Control

Group = torch_dist.ProcessGroup | None
_NAMES: dict[int, str] = {}


def name_group(group: Group, name: str) -> None:
    """How messages call a group: `cluster 3`, `shard 0`."""
    _NAMES[id(group)] = name


def _name(group: Group) -> str:
    return _NAMES.get(id(group), "a group")


def all_to_all(
    output: Tensor, rows: Tensor, group: Group, receive: list[int] | None = None, send: list[int] | None = None
) -> None:
    """Rows to every peer of the group; `send` and `receive` are row counts per peer (equal parts when omitted)."""
    with activity.collective("all_to_all", _name(group), rows.nbytes):
        ds_comm.all_to_all_single(output, rows, output_split_sizes=receive, input_split_sizes=send, group=group)


def all_gather(part: Tensor, group: Group, size: int) -> Tensor:
    """[size, *part.shape]: the same-shaped tensor of every peer, in group order."""
    if size == 1:
        return part.unsqueeze(0)
    parts = [torch.empty_like(part) for _ in range(size)]
    with activity.collective("all_gather", _name(group), part.nbytes):
        ds_comm.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts)


def all_reduce_sum(total: Tensor, group: Group, size: int) -> Tensor:
    """Sum over the group, in place."""
    if size > 1:
        with activity.collective("all_reduce", _name(group), total.nbytes):
            ds_comm.all_reduce(total, group=group)
    return total


class Summing(Protocol):
    """Adds tensors over one group of ranks: what aggregation needs of a network."""

    @property
    def size(self) -> int: ...

    def sum(self, total: Tensor) -> Tensor:
        """In place; contiguous, on the device of the run."""


class TorchSumming:
    """Over a group of torch.distributed: gloo or NCCL."""

    def __init__(self, group: Group, size: int) -> None:
        self.group, self.size = group, size

    def sum(self, total: Tensor) -> Tensor:
        return all_reduce_sum(total, self.group, self.size)


class ControlSumming:
    """Over a communicator of the control plane (MPI): tensors of a GPU travel through host memory."""

    def __init__(self, control: Control) -> None:
        self.control, self.size = control, control.size

    def sum(self, total: Tensor) -> Tensor:
        if self.size == 1:
            return total
        if total.device.type == "cpu":
            return self.control.sum(total)
        return total.copy_(self.control.sum(total.cpu()))
