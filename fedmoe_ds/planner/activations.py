"""Activations: what a pass keeps for its backward pass, layer by layer, and what one layer's backward pass holds beside it.

Legend: L layers, D model width, F expert width, R adapter rank, T token rows of a pass, S positions, K top-k.

Tensors are counted one by one from the configuration (heads, latent ranks, shared and dense feed-forward blocks) and from the
adapters that a run trains; tests/test_planner_activations.py counts those that real passes of every family keep.
What an allocator loses between tensors of unequal sizes is left out; the planner adds that from a calibration.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.kernels.frozen_layers import is_batch_invariant
from fedmoe_ds.model.adapter_bank import OWNED, BlockSpec
from fedmoe_ds.model.adapter_moe_layer import SHARED_INNER
from fedmoe_ds.model.cross_entropy import COPIES, chunk_rows
from fedmoe_ds.model.moe_layer import RESCALER, ROUTER

FP32, INT64 = 4, 8
PLAN_BYTES = 3 * INT64
"""Of a routed row in a layer's plan: its token, its slot, and its place in the order of tokens."""


def activations(spec: RunSpec, clients: int, length: int, active: float | None = None) -> int:
    """Bytes of a pass of so many clients with `active` experts each and full sequences: what is kept, and one layer's backward.

    Packed samples are no more tokens than so many full sequences: for them, too, this is an upper bound. The rows that arrive
    at a rank's experts are taken to be as many as leave it.
    """
    config, model = spec.config, spec.size
    tokens = clients * (config.execution.micro_batch_size or config.local.batch_size) * length * _fused(spec)
    kept = kept_bytes(spec, length, active)
    if config.execution.activation_checkpointing:
        # One layer at a time is recomputed; of the others only their inputs are kept.
        widest = max(layer_bytes(spec, layer, length, active) for layer in range(model.depth))
        kept = widest + (model.depth + 2) * model.hidden * spec.row_bytes
        if _has_objectives(spec):  # which see every layer's decisions; kept layers have them anyway
            kept += len(spec.expert_layout.layers) * spec.expert_layout.top_k * DECISION
    # Logits are gone before the backward pass begins.
    logits = logit_bytes(spec, tokens, length)
    return int(tokens * kept + max(tokens * _backward(spec, active) * spec.row_bytes, logits))


def _fused(spec: RunSpec) -> int:
    """Models of a client that share a pass."""
    return max(tier.experts for tier in spec.tiers) if spec.method.fuses else 1


DECISION = INT64 + FP32 + 1
"""Bytes of a selected expert: its number, its weight, and whether it is kept."""


def _has_objectives(spec: RunSpec) -> bool:
    return spec.method.overrides("objective")


def logit_bytes(spec: RunSpec, tokens: int, length: int) -> int:
    """Of the logits that exist at one time: a chunk's, or those that an objective sees of one client's whole step."""
    vocabulary, copies = spec.size.vocabulary, COPIES
    rows = chunk_rows(vocabulary)
    if _has_objectives(spec):
        copies += spec.method.logit_copies
        if spec.method.whole_steps:
            rows = spec.config.local.batch_size * length * _fused(spec)
    return copies * FP32 * min(tokens, rows) * vocabulary


def kept_bytes(spec: RunSpec, length: int, active: float | None = None) -> float:
    """Bytes that a training pass keeps of a token row: all layers, the last norm's input and the gradient of its result."""
    head = 2 * spec.size.hidden * spec.row_bytes
    return head + sum(layer_bytes(spec, layer, length, active) for layer in range(spec.size.depth))


def layer_bytes(spec: RunSpec, layer: int, length: int, active: float | None = None) -> float:
    """Bytes that one layer keeps of a token row in sequences of this length."""
    size, row = spec.size, spec.row_bytes
    shape, mixed = size.layer, layer in spec.expert_layout.layers
    names = {block.name for block in spec.blocks if layer in block.layers or block.layers == (-1,)}
    # A norm keeps its input; one of transformers' own computes in float32 and keeps that.
    kept = 0.0
    if _has_gradient(spec, layer):
        kept += shape.norms * size.hidden * _norm_bytes(spec) + _attention_bytes(spec, length)
        kept += _projection_bytes(spec, layer)
        # The model's own blocks keep gate, activation and up.
        width = shape.shared if mixed and size.experts else shape.feed_forward
        kept += (3 if shape.gated else 1) * width * row + (mixed and shape.shared_gate) * size.hidden * row
    if mixed:
        # Router and shared experts keep one tensor, their input; a router that decides once per sample keeps a mean of it.
        read = SHARED_INNER in names or (ROUTER in names and not spec.expert_layout.per_sample)
        kept += _mixture_bytes(spec, active) + ((RESCALER in names) + read) * size.hidden * row + _shared_bytes(spec)
    return kept


def _shared_bytes(spec: RunSpec) -> float:
    """Of shared adapter experts: what their activation gives, and what it reads unless they are linear."""
    moe = spec.config.adapters.moe
    return 0.0 if moe is None else (2 - moe.linear) * moe.shared * moe.width * spec.row_bytes


def _has_gradient(spec: RunSpec, layer: int) -> bool:
    """Whether the backward pass goes through a layer's attention: something there or below is trained."""
    if spec.config.execution.activation_checkpointing:
        return True  # every layer's input is made to need a gradient
    below = (block for block in spec.blocks if block.trained and block.layers != (-1,))
    own = ("attention.", OWNED)
    return any(min(block.layers) < layer or (block.name.startswith(own) and layer in block.layers) for block in below)


def _norm_bytes(spec: RunSpec) -> int:
    own = spec.device == "cuda" or is_batch_invariant(spec.model_type, spec.config.foundation.dtype, spec.device)
    return spec.row_bytes if own else FP32


def keeps_scores(spec: RunSpec) -> bool:
    """Whether attention keeps its scores: torch's fused kernels on a CPU want keys and values of one width."""
    attention = spec.size.layer.attention
    return spec.device == "cpu" and attention.key_width != attention.value_width


def _attention_bytes(spec: RunSpec, length: int) -> float:
    """Queries, keys and values as the scores see them, the result, and the sum of each query's exponentials."""
    attention, row = spec.size.layer.attention, spec.row_bytes
    width = (attention.heads + attention.kv_heads) * attention.key_width
    kept = attention.normed * _norm_bytes(spec)
    if keeps_scores(spec):
        # Without a fused kernel keys and values of all heads are copied; the result is kept by adapters alone.
        copied = attention.heads * (2 * attention.key_width + attention.value_width + length)
        return kept + (copied + _reads(spec, "o_proj") * attention.heads * attention.value_width) * row
    values = attention.kv_heads * attention.value_stride + attention.heads * attention.value_width
    return kept + (width + values) * row + attention.heads * FP32


def _reads(spec: RunSpec, name: str) -> bool:
    return any(block.name == f"attention.{name}.lora_A" for block in spec.blocks)


def _projection_bytes(spec: RunSpec, layer: int) -> float:
    """Inputs of adapted projections, once each, and their middles of rank R."""
    halves = [b for b in spec.blocks if b.pair is not None and not b.expert and b.rank_axis == 0 and layer in b.layers]
    inputs = {(_source(block), block.item[1]) for block in halves}
    # Of matrices that are trained themselves, too: attention's three read one tensor, and so do gate and up.
    owned = [b for b in spec.blocks if b.owned and len(b.item) > 1 and layer in b.layers]
    inputs |= {(_source(replace(block, name=block.name.removeprefix(OWNED))), block.item[1]) for block in owned}
    # The output projection's input is attention's result, which is kept anyway.
    widths = sum(width for source, width in inputs if source != "o_proj")
    return (widths + sum(block.item[0] for block in halves)) * spec.row_bytes


_LATENT = ("q_b_proj", "kv_b_proj", "o_proj", "down_proj")


def _source(block: BlockSpec) -> str:
    """What a projection reads: projections of one name read one tensor, all others the part's normed input."""
    part, name = block.name.split(".")[:2]
    return name if name in _LATENT else part


def _mixture_bytes(spec: RunSpec, active: float | None) -> float:
    """Of the routed experts: scores of all of them in float32, the choice, and rows that are routed."""
    layout, row = spec.expert_layout, spec.row_bytes
    active = layout.top_k if active is None else active
    rank = spec.config.adapters.rank if _adapted(spec.blocks) else 0
    inner = (layout.matrices - 1) * layout.ffn  # gate and up rows, or one bottleneck
    routed = active * ((layout.width + inner + 2 * rank + 1) * row + PLAN_BYTES)
    choice = layout.top_k * DECISION * (1 + layout.renormalised / 3) + INT64
    # Of experts that add nothing there are scores, and which of the chosen they are.
    zero = layout.zero * FP32 + (layout.top_k if layout.zero else 0)
    return routed + layout.num_experts * FP32 + choice + zero


def _adapted(blocks: Iterable[BlockSpec]) -> bool:
    return any(block.expert and block.pair is not None for block in blocks)


def _backward(spec: RunSpec, active: float | None) -> float:
    """Numbers per token row that one layer's backward pass holds beside what was kept, at its widest place."""
    config, size, layout = spec.config, spec.size, spec.expert_layout
    # Dropout keeps no mask; while a projection computes there are its mask, what is let through, and that part's gradient.
    widest = max(size.hidden, size.layer.feed_forward if config.adapters.feed_forward else 0)
    dropped = 3 * widest if config.adapters.dropout and config.adapters.projections else 0
    dense = 3 * (size.hidden + size.layer.feed_forward)
    if not layout.layers:
        return dense + dropped
    active = layout.top_k if active is None else active
    inner = (layout.matrices - 1) * layout.ffn
    # On its way: rows sent and rows received.
    travelling = 2 if config.topology.ep_size > 1 else 0
    return max(active * ((3 + travelling) * layout.width + 3 * inner), dense if size.layer.feed_forward else 0) + dropped
