"""Domains: the texts by which channels of a dense model are told apart, and what its blocks do on them.

The packages of the pre-training half of the standard library play the domains, those with most text first: federated
fine-tuning sees none of them.

Legend: D domains, N sequences of a domain, B batch, S sequence length, L layers, F channels of a block.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedmoe_ds.data import stdlib
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.distributed.stop_points import stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.builtin.text import SEQUENCE_LENGTH

BATCH = 8


def domain_texts(domains: int) -> dict[str, list[str]]:
    """The texts of every domain by its name, largest domain first.

    Raises:
        UserError: there are fewer packages than domains.
    """
    texts: dict[str, list[str]] = {}
    for document in stdlib.split(stdlib.documents())[0]:
        texts.setdefault(document.group, []).append(document.text)
    if domains > len(texts):
        raise UserError(
            f"foundation.convert.experts: {domains}: the pre-training text has {len(texts)} packages to play domains; use at "
            f"most {len(texts)}"
        )
    sizes = {name: sum(map(len, found)) for name, found in texts.items()}
    return {name: texts[name] for name in sorted(texts, key=lambda name: (-sizes[name], name))[:domains]}


@functools.cache
def domains_told(domains: int) -> tuple[tuple[str, ...], str]:
    """Their names, and a digest of names and texts; read once per process, as a library does not change while it runs."""
    texts = domain_texts(domains)
    return tuple(texts), hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def sequences(tokenizer: Any, texts: list[str], eos_token_id: int, most: int) -> Tensor:
    """int64 [N, S] of one domain: whole sequences out of its joined texts, at most so many, at least one."""
    stream: list[int] = []
    encode = Encoder(tokenizer)
    for text in texts:
        stop_point()
        stream += [*encode([text])[0].ids, eos_token_id]
        if len(stream) >= most * SEQUENCE_LENGTH:
            break
    # A domain of less than one sequence is repeated until it is one.
    while len(stream) < SEQUENCE_LENGTH:
        stream += stream
    count = min(len(stream) // SEQUENCE_LENGTH, most)
    return torch.tensor(stream[: count * SEQUENCE_LENGTH]).view(count, SEQUENCE_LENGTH)


@contextmanager
def activations(model: Any) -> Iterator[list[Tensor]]:
    """While this holds: what the last pass of a dense llama has handed to the output projections, [B, S, F] by layer."""
    layers = model.base_model.layers
    found = [torch.empty(0)] * len(layers)

    def keep(place: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            found[place] = inputs[0].detach()

        return hook

    handles = [layer.mlp.down_proj.register_forward_pre_hook(keep(place)) for place, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_activations(model: Any, sequences_NS: Tensor) -> Tensor:
    """float64 [L, F]: mean |a| of every channel on the sequences of one domain."""
    total: Tensor | float = 0.0
    with activations(model) as found:
        for batch_BS in sequences_NS.split(BATCH):
            stop_point()
            model.base_model(input_ids=batch_BS, use_cache=False)
            total = total + torch.stack([a_BSF.abs().double().sum((0, 1)) for a_BSF in found])
    assert isinstance(total, Tensor)
    return total / sequences_NS.numel()
