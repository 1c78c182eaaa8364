"""Counters: what the stand-in counts, and the settings of what it pretends to be.

Kernels and waits are counted by a table of operations (operations.py), not observed on a device.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch

PROJECT = "/fedmoe_ds/"
LIBRARIES = ("/transformers/", "/peft/", "/deepspeed/")
_BLOCK = 512
"""CUDA's caching allocator rounds sizes up to this many bytes."""


class DeviceError(RuntimeError):
    """What CUDA or NCCL would have refused."""


class Counters:
    """Counts since `reset`, bytes that are held now, and settings.

    Attributes:
        kernels: launches.
        ops: calls per operation that touched a device.
        waits: per (operation, line of the project), how often the host waited for the device; uploads that wait are among them.
        uploads: per (operation, line of the project), copies from the host to the device, waiting or not.
        bytes: read and written by kernels; "products", or the operation's name.
        errors: what was refused, with the stack.
        now, peak: bytes that tensors hold.
        limit: bytes; beyond it allocations fail as CUDA's do. None: no limit.
        strict: whether what CUDA refuses is raised, or only noted in `errors`.
        empty_groups: what a grouped product over rows leaves for a group without rows: "zero" (sm_90) or "garbage" (sm_100).
        arch: compute capability times ten.
    """

    def __init__(self) -> None:
        self.live: dict[int, list[int]] = {}
        self.now = self.peak = 0
        self.reset()
        self.restore()

    def reset(self) -> None:
        """Forget the counts; bytes that are held stay held."""
        self.kernels = 0
        self.ops: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.uploads: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[str] = Counter()
        self.errors: list[str] = []
        self.reset_peak()

    def restore(self) -> None:
        """Put the settings back to how a process begins."""
        self.limit: int | None = None
        self.strict = os.environ.get("FAKE_STRICT", "1") == "1"
        self.empty_groups = os.environ.get("FAKE_EMPTY", "zero")
        self.arch = int(os.environ.get("FAKE_ARCH", "90"))

    @property
    def total_waits(self) -> int:
        return sum(self.waits.values())

    def reset_peak(self) -> None:
        self.peak = self.now

    def wait(self, operation: str, times: int = 1) -> None:
        if times:
            self.waits[operation, place()] += times

    def upload(self, operation: str, waits: bool) -> None:
        self.uploads[operation, place()] += 1
        if waits:
            self.wait(f"upload by {operation}")

    def refuse(self, text: str) -> None:
        """Raise what CUDA would have said, or note it where the mode is not strict."""
        text = f"{text}  [{place()}]"
        self.errors.append(text)
        if self.strict:
            raise DeviceError(text)

    def hold(self, storage: torch.UntypedStorage) -> int:
        """Count a tensor that keeps a storage. Returns the key for `drop`. Raises torch.OutOfMemoryError beyond the limit."""
        key, size = storage._cdata, (storage.nbytes() + _BLOCK - 1) // _BLOCK * _BLOCK
        entry = self.live.setdefault(key, [size, 0])
        if entry[1] == 0:
            if self.limit is not None and self.now + size > self.limit:
                del self.live[key]
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            self.now += size
            self.peak = max(self.peak, self.now)
        entry[1] += 1
        return key

    def drop(self, key: int) -> None:
        entry = self.live.get(key)
        if entry is not None:
            entry[1] -= 1
            if entry[1] == 0:
                self.now -= entry[0]
                del self.live[key]

    def facts(self) -> dict[str, Any]:
        """What a line of the runner says about a case."""
        return {"kernels": self.kernels, "waits": self.total_waits, "uploads": sum(self.uploads.values()), "peak": self.peak}

    def summary(self, title: str) -> str:
        """For people: every wait and upload with its place, most frequent first."""
        lines = [f"{title}: {self.facts()}, held {self.now}"]
        for kind, found in (("wait", self.waits), ("upload", self.uploads)):
            lines += [f"   {kind:6s} {count:6d}  {name:32s} {where}" for (name, where), count in found.most_common()]
        return "\n".join(lines)


COUNT = Counters()


def place() -> str:
    """The innermost line of the project on the stack, else of the libraries around it; in backward there may be neither."""
    frames = list(_frames())
    for marks in ((PROJECT,), LIBRARIES):
        for frame in frames:
            file = frame.f_code.co_filename
            mark = next((mark for mark in marks if mark in file), None)
            if mark is not None:
                return f"{file.rpartition(mark)[2]}:{frame.f_lineno} {frame.f_code.co_name}"
    return "autograd"


def _frames() -> Any:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
