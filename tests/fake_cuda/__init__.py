"""A stand-in for CUDA on a machine without one: tensors say `cuda:0`, compute on the CPU, and are refused what CUDA refuses.

    import fake_cuda

    fake = fake_cuda.enable()  # before anything imports torch
    fake.COUNT.reset()
    ...
    assert fake.COUNT.total_waits == 0

A library (device.cpp) answers what autograd and the dispatcher ask of a CUDA runtime. Tensors are wrapper subclasses
(tensor.py); every operation on them is checked by CUDA's rules (rules.py, kernels.py), counted (counters.py, operations.py),
and computed by a CPU build of torch. Groups of `torch.distributed` that say NCCL are gloo's (distributed.py). docs/cuda.md
says what this proves and what it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fake_cuda.counters import Counters

_enabled: list[Fake] = []


class Fake:
    """The stand-in of this process.

    Attributes:
        COUNT: what it counts, and its settings.
        DeviceError: what it raises where CUDA or NCCL would refuse.
    """

    def __init__(self) -> None:
        from fake_cuda import counters

        self.COUNT: Counters = counters.COUNT
        self.DeviceError = counters.DeviceError

    @property
    def device(self) -> Any:
        """The current device."""
        import torch

        return torch.device("cuda", torch.cuda.current_device())

    @contextmanager
    def refuses(self, words: str) -> Iterator[None]:
        """What is in the block must be refused, with these words in the reason."""
        try:
            yield
        except self.DeviceError as error:
            assert words in str(error), f"refused for another reason: {error}"
            return
        raise AssertionError(f"not refused: {words}")


def enable(devices: int = 1) -> Fake:
    """Give this process CUDA devices. Must come before the first import of torch; a second call changes nothing."""
    if not _enabled:
        from fake_cuda.library import load

        load()
        from fake_cuda import runtime

        runtime.enable(devices)
        _enabled.append(Fake())
    return _enabled[0]
