"""Out of memory: a client whose pass did not fit."""

from __future__ import annotations

import gc

import torch

from fedmoe_ds.clients.client import Client

_WORDS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory", "could not create a memory")


class OutOfMemory(Exception):
    """A pass did not fit.

    Attributes:
        client: of those in the pass, on all ranks of the cluster, the one with the most sequences.
        sequences: how many of its sequences that pass held.
    """

    def __init__(self, client: Client, sequences: int) -> None:
        super().__init__(f"client {client.name}: {sequences} sequences in one pass do not fit into memory")
        self.client, self.sequences = client, sequences


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. PyTorch's CPU allocator and oneDNN say so in a RuntimeError's text only."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def release_memory() -> None:
    """Give back what a failed pass has held."""
    # Tracebacks and autograd graphs form reference cycles, which only the collector frees.
    gc.collect()
    if torch.cuda.is_available():
        # PyTorch keeps freed blocks in the sizes of the failed pass; the next try may need others.
        torch.cuda.empty_cache()
