"""Per-client attention: scaled dot-product attention of one pass, every client's sequences at their own length.

Legend: B sequences, H heads, S positions of the pass, K head width.

A pass pads all sequences to its longest one. How a kernel cuts its work into blocks depends on that length, and with it the
last bits of a result. The clients of a pass must not change each other's bits, so the sequences of each are cut back to the
longest of its own. Neighbours of equal length share a call; usually that is the whole pass.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fedmoe_ds.model.pass_context import Execution, Pass

NAME = "fedmoe_ds"
_EXECUTION = "fedmoe_ds_execution"


def use_per_client_attention(model: Any, execution: Execution) -> None:
    """Make the model's attention treat every client of a pass by itself."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for module in model.modules():
        # The mark of transformers' attention modules, which hand themselves to the function that is registered here.
        if hasattr(module, "is_causal"):
            object.__setattr__(module, _EXECUTION, execution)
    model.set_attn_implementation(NAME)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`: heads [B, H, S, K] in, [B, S, H, K] out."""
    execution: Execution = getattr(module, _EXECUTION)
    whole = query.shape[2]
    parts = own_lengths(execution.running(), query.shape[0], whole)
    # The usual case: all clients are as long as the pass, and no tensor is copied.
    if len(parts) == 1 and parts[0][2] == whole:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    found = []
    for start, stop, length in parts:
        q, k, v = (heads[start:stop, :, :length] for heads in (query, key, value))
        mask = attention_mask
        if mask is not None:
            mask = (mask if mask.shape[0] == 1 else mask[start:stop])[..., :length, :length]
        y_BSHK, _ = sdpa_attention_forward(module, q, k, v, mask, **options)
        # Zeros where the sequence was cut: padding, which is neither routed nor a target, so its values reach nobody.
        found.append(F.pad(y_BSHK, (0, 0, 0, 0, 0, whole - length)))
    return torch.cat(found), None


def own_lengths(run: Pass, sequences: int, positions: int) -> list[tuple[int, int, int]]:
    """(first sequence, end, length) of neighbouring clients whose longest sequences are equally long."""
    spans = [(seg.start, seg.stop, min(seg.longest, positions)) for seg in run.segments]
    # The stand-in row of an idle rank: no client, but attention has to give a result of its shape.
    if not spans:
        return [(0, sequences, positions)]
    parts = []
    for length, group in itertools.groupby(spans, key=lambda span: span[2]):
        members = list(group)
        parts.append((members[0][0], members[-1][1], length))
    return parts
