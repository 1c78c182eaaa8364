"""Out of memory: a pass that did not fit."""

from __future__ import annotations

import gc

import torch

from fedmoe_ds.clients.client import Client

_WORDS = (
    # PyTorch's CPU allocator, the C++ library, oneDNN
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "could not create a memory",
    # CUDA's driver and runtime, Triton's launcher, and NCCL, which passes on what CUDA said
    "out of memory",
    "cudaerrormemoryallocation",
    "cuda_error_out_of_memory",
    # Workspaces of libraries: CUBLAS, CUSOLVER, CUSPARSE and CUDNN to version 8, CUDNN since version 9
    "_status_alloc_failed",
    "_status_internal_error_device_allocation_failed",
    "_status_internal_error_host_allocation_failed",
)


class OutOfMemory(Exception):
    """A pass did not fit.

    Attributes:
        client: of those in the pass, on all ranks of the cluster, the one with the most sequences in it.
        sequences: how many of its sequences that pass held (packed: full ones).
        together: how many of all clients of one rank, where it was the pass of several; else None.
    """

    def __init__(self, client: Client, sequences: int, together: int | None = None) -> None:
        whose = f"client {client.name}" if together is None else f"client {client.name} and others"
        super().__init__(f"{whose}: {together or sequences} sequences in one pass do not fit into memory")
        self.client, self.sequences, self.together = client, sequences, together


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. Only PyTorch's CUDA allocator has an error of its own; others say it in words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)


def release_memory() -> None:
    """Give back what a failed pass has held."""
    # Tracebacks and autograd graphs form reference cycles, which only the collector frees.
    gc.collect()
    if torch.cuda.is_available():
        # PyTorch keeps freed blocks in the sizes of the failed pass; the next try may need others.
        torch.cuda.empty_cache()
