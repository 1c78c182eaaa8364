"""Collectives on tensors, through DeepSpeed's communication layer (so that its comms logger sees them).

A group of None is a world of one: nothing travels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import deepspeed.comm as ds_comm
import torch
import torch.distributed as torch_dist
from torch import Tensor

from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.control import Control

Group = torch_dist.ProcessGroup | None
# By id: groups live as long as the process, so no id is given out twice.
_NAMES: dict[int, str] = {}


def name_group(group: Group, name: str) -> None:
    """How messages call a group: `cluster 3`, `shard 0`."""
    _NAMES[id(group)] = name


def _name(group: Group) -> str:
    return _NAMES.get(id(group), "a group")


@contextmanager
def _collective(name: str, group: Group, tensor: Tensor, begins: bool = True) -> Iterator[None]:
    """The body is one collective over the group; `tensor` is what this rank hands over, or has handed over before."""
    queued = tensor.device.type == "cuda"
    with activity.collective(name, _name(group), tensor.nbytes if begins else 0, calls=int(begins), queued=queued):
        if not queued:
            yield
            return
        begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begun.record()
        yield
        # The current stream has been told to wait for NCCL's, so this lies behind the collective.
        done.record()
        activity.queue.add(f"{name} over {_name(group)}", begun, done)


def all_to_all(
    output: Tensor, rows: Tensor, group: Group, receive: list[int] | None = None, send: list[int] | None = None
) -> None:
    """Rows to every peer of the group; `send` and `receive` are row counts per peer (equal parts when omitted)."""
    with _collective("all_to_all", group, rows):
        ds_comm.all_to_all_single(output, rows, output_split_sizes=receive, input_split_sizes=send, group=group)


class Exchange:
    """Rows under way to every peer of a group. The process goes on, and `wait` gives what has come from the peers; where
    DeepSpeed's `comms_logger` times collectives, the process stays until they have come.

    Args:
        rows: [sum of send, ...], contiguous rows by peer.
        receive, send: row counts per peer.
        output: [sum of receive, ...], contiguous, where what comes is written; a new tensor if omitted.
    """

    def __init__(self, rows: Tensor, group: Group, receive: list[int], send: list[int], output: Tensor | None = None) -> None:
        # Both are held here until they have travelled.
        self._rows, self._group = rows.contiguous(), group
        self._output = rows.new_empty(sum(receive), *rows.shape[1:]) if output is None else output
        self._work: Any = None
        if ds_comm.comm.comms_logger.enabled:
            # DeepSpeed stops its clock when the call returns: what it times must have come to its end by then.
            all_to_all(self._output, self._rows, group, receive, send)
            return
        # The first one over a group builds its connections, so that starting, too, may wait for peers, or find one gone.
        with activity.collective("all_to_all", _name(group), rows.nbytes, queued=rows.device.type == "cuda"):
            self._work = ds_comm.all_to_all_single(
                self._output, self._rows, output_split_sizes=receive, input_split_sizes=send, group=group, async_op=True
            )

    def wait(self) -> Tensor:
        """[sum of receive, ...]. On CUDA the stream waits and not the host."""
        if self._work is not None:
            with _collective("all_to_all", self._group, self._rows, begins=False):
                self._work.wait()
        return self._output


def all_gather(part: Tensor, group: Group, size: int) -> Tensor:
    """[size, *part.shape]: the same-shaped tensor of every peer, in group order."""
    if size == 1:
        return part.unsqueeze(0)
    found = part.new_empty(size, *part.shape)
    with _collective("all_gather", group, part):
        ds_comm.all_gather(list(found), part.contiguous(), group=group)  # the backends refuse strided tensors
    return found


def broadcast(tensor: Tensor, group: Group, source: int) -> Tensor:
    """What the peer of that number in the group has, on all of them, in place."""
    if group is not None:
        with _collective("broadcast", group, tensor):
            ds_comm.broadcast(tensor, torch_dist.get_global_rank(group, source), group=group)
    return tensor


def all_reduce_sum(total: Tensor, group: Group, size: int) -> Tensor:
    """Sum over the group, in place."""
    return _all_reduce(total, group, size, ds_comm.ReduceOp.SUM)


def all_reduce_largest(values: Tensor, group: Group, size: int) -> Tensor:
    """The largest of each number over the group, in place."""
    return _all_reduce(values, group, size, ds_comm.ReduceOp.MAX)


def _all_reduce(tensor: Tensor, group: Group, size: int, operation: ds_comm.ReduceOp) -> Tensor:
    if size > 1:
        with _collective("all_reduce", group, tensor):
            ds_comm.all_reduce(tensor, op=operation, group=group)
    return tensor


class Summing(Protocol):
    """Adds tensors over one group of ranks: what aggregation needs of a network."""

    @property
    def size(self) -> int: ...

    def sum(self, total: Tensor) -> Tensor:
        """In place; contiguous, on the device of the run."""

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each number over the ranks; as `sum`."""


class TorchSumming:
    """Over a group of torch.distributed: gloo or NCCL."""

    def __init__(self, group: Group, size: int) -> None:
        self.group, self.size = group, size

    def sum(self, total: Tensor) -> Tensor:
        return all_reduce_sum(total, self.group, self.size)

    def largest(self, values: Tensor) -> Tensor:
        return all_reduce_largest(values, self.group, self.size)


class ControlSumming:
    """Over a communicator of the control plane (MPI): tensors of a GPU travel through host memory."""

    def __init__(self, control: Control) -> None:
        self.control, self.size = control, control.size

    def sum(self, total: Tensor) -> Tensor:
        return self._through_host(total, self.control.sum)

    def largest(self, values: Tensor) -> Tensor:
        return self._through_host(values, self.control.largest)

    def _through_host(self, tensor: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        if self.size == 1:
            return tensor
        if tensor.device.type == "cpu":
            return reduce(tensor)
        # The sum is made in a copy; callers rely on their own tensor being changed, as with NCCL.
        return tensor.copy_(reduce(tensor.cpu()))
