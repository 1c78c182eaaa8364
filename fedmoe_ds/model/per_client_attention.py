"""Per-client attention: scaled dot-product attention of one pass, every client's sequences at their own length.

Legend: B sequences, H heads, S positions of the pass, K head width, T tokens of a packed pass.

A pass pads all sequences to its longest one. How a kernel cuts its work into blocks depends on that length, and with it the
last bits of a result. The clients of a pass must not change each other's bits, so the sequences of each are cut back to the
longest of its own. Neighbours of equal length share a call; usually that is the whole pass. In a packed pass every sample
has a length of its own (`model/packing.py`), whichever client it is of.
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

from fedmoe_ds.model.attention_received import received
from fedmoe_ds.model.packing import PackedSamples
from fedmoe_ds.model.pass_context import Execution, Pass

NAME = "fedmoe_ds"
_EXECUTION = "fedmoe_ds_execution"


def use_per_client_attention(model: Any, execution: Execution) -> None:
    """Make the model's attention treat every client of a pass by itself."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    for module in model.modules():
        # The mark of transformers' attention modules, which hand themselves to the function that is registered here.
        if hasattr(module, "is_causal"):
            object.__setattr__(module, _EXECUTION, execution)
    model.set_attn_implementation(NAME)


def _mask(**asked: Any) -> Tensor | None:
    """As transformers' `sdpa_mask`. Where the model sees single tokens, a number: how far back they may look, None for all."""
    if asked["q_length"] > 1:
        return sdpa_mask(**asked)  # type: ignore[no-any-return]
    # A packed pass: the samples are known to `_attend` alone, and which layers have a window to the model alone.
    window = asked.get("local_size")
    return None if window is None else torch.tensor(window)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`: heads [B, H, S, K] in, [B, S, H, K] out."""
    execution: Execution = getattr(module, _EXECUTION)
    whole, run = query.shape[2], execution.running()
    if execution.wave.attends and run.segments:
        scale, window = options.get("scaling"), options.get("sliding_window")
        run.attended[int(getattr(module, "layer_idx"))] = received(query, key, run.valid_T, run.segments, scale, window)  # noqa: B009
    if run.packed is not None:
        return _attend_packed(run.packed, module, (query, key, value), attention_mask, **options), None
    # The single token of an idle rank sees itself, whatever the window.
    attention_mask = attention_mask if whole > 1 else None
    parts = own_lengths(run, query.shape[0], whole)
    # The usual case: all clients are as long as the pass, and no tensor is copied.
    if len(parts) == 1 and parts[0][2] == whole:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    found, window = [], options.get("sliding_window")
    for start, stop, length in parts:
        q, k, v = (heads[start:stop, :, :length] for heads in (query, key, value))
        # A client that is shorter than the window has no mask when it is alone, and must not get one from its neighbours.
        mask = attention_mask if window is None or length >= window else None
        if mask is not None:
            mask = (mask if mask.shape[0] == 1 else mask[start:stop])[..., :length, :length]
        y_BSHK, _ = sdpa_attention_forward(module, q, k, v, mask, **options)
        # Zeros where the sequence was cut: padding, which is neither routed nor a target, so its values reach nobody.
        found.append(F.pad(y_BSHK, (0, 0, 0, 0, 0, whole - length)))
    return torch.cat(found), None


def _attend_packed(
    packed: PackedSamples, module: nn.Module, heads: tuple[Tensor, Tensor, Tensor], window: Tensor | None, **options: Any
) -> Tensor:
    """Heads [T, H, 1, K] in, [T, 1, H, K] out; `window` is what `_mask` has said."""
    found = []
    for q, k, v in zip(*map(packed.apart, heads), strict=True):
        mask = None if window is None else _banded(q.shape[2], int(window), q.device)
        found.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return packed.together(found)


def _banded(width: int, window: int, device: torch.device) -> Tensor | None:
    """bool [1, 1, S, S]: each position sees itself and the `window` - 1 before it; None where that is all of them."""
    if width <= window:
        return None
    back_SS = torch.arange(width, device=device).unsqueeze(1) - torch.arange(width, device=device)
    return ((back_SS >= 0) & (back_SS < window)).view(1, 1, width, width)


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
