"""Work: how much of each kind of work a pass, an optimizer step and a server step are.

Legend: B sequences, S positions, T = B x S token rows, N routed rows, L layers, D model width, F expert width, V vocabulary,
E experts, A attention projections with LoRA, P ranks of a cluster.

Multiplications are exact arithmetic on shapes. Framework calls and moved numbers are linear in the shapes, with the factors of
counts.py. Everything works on numpy arrays as well: one entry per local step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fedmoe_ds.planner.counts import Counts, counts_of
from fedmoe_ds.planner.hardware import Compute, Stage
from fedmoe_ds.planner.workload import Job

Amount = Any
"""A number, or float64 [n]: one per local step, or whatever is counted."""

FORWARD_SCORE = 0.35
"""A forward pass's share of the time of an attention score."""
ATTENTION_SHARE = 0.5
"""How many of the numbers that a token row moves in a layer are as wide as attention, and not as the model; estimated."""
PRODUCTS = 4
"""Grouped products with the experts' weights in a training pass: two forward, two backward."""
WEIGHT_PRODUCTS = 2
"""Those of the gradients of whole experts."""

# Bytes that one trainable number costs in each stage of a round, where no calibration says its seconds.
STAGE_BYTES: dict[Stage, float] = {"update": 80.0, "norm": 8.0, "move": 8.0, "fold": 100.0, "serve": 100.0}
STAGE_CALLS: dict[Stage, float] = {"update": 10.0, "norm": 4.0, "move": 2.0, "fold": 25.0, "serve": 12.0}
"""The same for the framework calls of a block."""


@dataclass(frozen=True)
class Work:
    """Amounts of every kind of work.

    Attributes:
        calls: framework calls.
        flops: of matrix products with the model's weights, frozen or trained as a whole.
        bytes: moved by elementwise work.
        groups: (expert, client) groups over all grouped products.
        scores: attention scores (head, query, key), where hardware tells their own time.
        adapters: FLOPs of products with adapters, which are narrow.
    """

    calls: Amount = 0.0
    flops: Amount = 0.0
    bytes: Amount = 0.0
    groups: Amount = 0.0
    scores: Amount = 0.0
    adapters: Amount = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: Amount) -> Work:
        return Work(*(getattr(self, f.name) * factor for f in fields(self)))

    def seconds(self, compute: Compute, dtype: str, score_flops: float = 0.0, adapter_bytes: float = 0.0) -> Amount:
        """On one device or core.

        Args:
            score_flops: FLOPs of one attention score, for hardware without a time for it.
            adapter_bytes: read and written for one FLOP of a product with adapters, for hardware without a time for that.
        """
        rate = compute.flops_per_s[dtype]
        per_score = compute.score_s if compute.score_s is not None else score_flops / rate
        # A narrow product waits for memory: R FLOPs are done for every number of its wide side (the roofline).
        narrow = max(1.0 / rate, adapter_bytes / compute.bytes_per_s)
        return (
            self.calls * compute.call_s
            + self.flops / rate
            + self.bytes / compute.bytes_per_s
            + self.groups * compute.group_s
            + self.scores * per_score
            + self.adapters * (compute.adapter_s if compute.adapter_s is not None else narrow)
        )


@dataclass(frozen=True)
class Rows:
    """What a rank brings to a pass: samples, the longest of them, targets; and the token rows of packed samples.

    Packed samples need no padding outside attention. The calls that lay them out for it are not counted, and its scores are
    taken to be as many as if all were as long as the longest: an upper bound.
    """

    samples: Amount
    longest: Amount
    targets: Amount
    packed: Amount | None = None

    @property
    def rows(self) -> Amount:
        """Token rows that the blocks see."""
        return self.samples * self.longest if self.packed is None else self.packed


class PassWork:
    """Work of passes of one job.

    Args:
        training: forward and backward, or forward alone.
    """

    def __init__(self, job: Job, training: bool) -> None:
        self.job, self.training = job, training
        # A head alone needs no backward pass through the layers.
        self.recompute = training and job.config.execution.activation_checkpointing and not job.cost.head_alone
        self.number_bytes = job.row_bytes
        self.counts = counts_of(job.device, bool(job.expert_layout.layers))
        # Layers without experts of a model that has some.
        self.plain = job.size.depth - len(job.expert_layout.layers) if job.expert_layout.layers else 0

    def seconds(self, work: Work, compute: Compute) -> Amount:
        """Of work of this job's passes, on one device or core."""
        job = self.job
        narrow = self.number_bytes / (2.0 * max(job.config.adapters.rank, 1))
        return work.seconds(compute, job.config.foundation.dtype, self.score_flops, narrow)

    @property
    def score_flops(self) -> float:
        """FLOPs of one attention score and its share of the values: one forward product of each, and two backward."""
        return 2.0 * self.job.size.layer.attention.score_products * (3.0 + self.recompute if self.training else 1.0)

    def _times(self, training_factor: float) -> float:
        # Recomputing adds one forward pass to the backward one.
        return training_factor + self.recompute if self.training and not self.job.cost.head_alone else 1.0

    def fixed(self) -> Work:
        """What a pass is, rows or not: calls, and the frozen dense weights that it reads."""
        job, depth = self.job, self.job.size.depth
        n, plain = (counts.train_calls if self.training else counts.forward_calls for counts in self._kinds)
        # Framework calls do not depend on rows: small passes are dominated by them.
        calls = n.per_pass + (depth - self.plain) * n.per_layer + self.plain * plain.per_layer
        calls += depth * n.per_projection * job.projections
        return Work(calls, 0.0, self._times(2) * (job.body + job.head) * job.size.bytes_per_parameter)

    def gradients(self, trainable: float) -> Work:
        """What a training pass moves for the gradients of all that is trained in flight, rows or not."""
        return Work(0.0, 0.0, trainable * self.counts.gradient_bytes if self.training else 0.0)

    def home(self, rows: Rows) -> Work:
        """What a rank computes for its own rows: everything but the experts, and but what is fixed per pass."""
        job, size, adapters = self.job, self.job.size, self.job.config.adapters
        padded = rows.rows
        lora = job.cost.dense_row * adapters.rank
        flops = padded * 2.0 * job.body * self._times(2)
        # Logits exist for target rows only.
        flops += rows.targets * (2.0 * job.head * self._times(2) + job.cost.head_weights * self.training)
        # Routers: their gradients where they are trained; those of adapter experts are no part of the body.
        own = self._times(2) if adapters.moe is not None else 0.0
        flops += padded * job.cost.dense_weights * (own + self.training)
        numbers = padded * self._numbers_per_row() + rows.targets * self.counts.target * (job.head / size.hidden)
        scores = padded * rows.longest * size.layer.attention.heads * size.depth * (1.0 if self.training else FORWARD_SCORE)
        return Work(0.0, flops, numbers * self._share * self.number_bytes, 0.0, scores, padded * lora * self._times(3))

    @property
    def _share(self) -> float:
        """Of the numbers of a forward and a backward pass, how many this pass moves."""
        forward = self.counts.forward_share
        return 1.0 + forward * self.recompute if self.training else forward

    def _numbers_per_row(self) -> float:
        """What one token row moves in all layers, outside of matrix products and experts."""
        job, size, layout = self.job, self.job.size, self.job.expert_layout
        n, plain = self._kinds
        row = (1.0 - ATTENTION_SHARE) * size.hidden + ATTENTION_SHARE * self._attention_width
        projections = size.depth * size.hidden * n.projection * job.projections
        # Shared experts and layers without experts are the model's own feed-forward blocks.
        numbers = projections + self.plain * (plain.row * row + plain.feed_forward * size.layer.feed_forward)
        if layout.layers:
            mixed = n.row * row + n.expert * (layout.num_experts + layout.zero) + n.slot * layout.top_k
            numbers += len(layout.layers) * (mixed + plain.feed_forward * size.layer.shared)
        else:
            numbers += size.depth * (n.row * row + n.feed_forward * size.ffn)
        # Nothing below the first layer's experts is trained: its attention has no backward pass.
        above = self.training and not (job.projections or self.recompute)
        return numbers - (size.hidden * n.first_row if above else 0.0)

    @property
    def _kinds(self) -> tuple[Counts, Counts]:
        """Counts of this model, and of layers without experts."""
        return self.counts, counts_of(self.job.device, sparse=False)

    @property
    def _attention_width(self) -> float:
        """Mean width of queries, keys, values and results: D in the models whose passes were counted."""
        a = self.job.size.layer.attention
        return ((a.heads + a.kv_heads) * a.key_width + a.kv_heads * a.value_stride + a.heads * a.value_width) / 4.0

    def experts(self, routed: Amount, blocks: float, local_experts: int, parts: int = 1) -> Work:
        """What a rank computes for the rows that arrive at its experts.

        Args:
            routed: arriving rows of a layer.
            blocks: blocks that they form (one per peer where the clients of a rank do not share passes).
            parts: in which they arrive; no expert is in two of them.
        """
        job, expert_layout = self.job, self.job.expert_layout
        layers = len(expert_layout.layers)
        if not layers:
            return Work()
        weights = expert_layout.matrices * expert_layout.width * expert_layout.ffn
        lora = job.cost.expert_row * job.config.adapters.rank / layers
        whole = job.cost.expert_weights / layers if self.training else 0.0
        flops = routed * (2.0 * weights * self._times(2) + whole)
        n = self.counts
        numbers = routed * (n.routed_d * expert_layout.width + n.routed_f * expert_layout.ffn) * self._share
        each = n.train_calls if self.training else n.forward_calls
        calls = (blocks - 1) * each.per_block + (parts - 1) * each.per_half
        possible = local_experts * blocks
        # Expected number of groups with at least one row, if rows fell at random (Poisson); expm1 for tiny loads.
        touched = possible * -np.expm1(-routed / possible)
        read = touched * weights * self._times(2) * job.size.bytes_per_parameter
        # An empty group is skipped and costs nothing.
        groups = touched * (PRODUCTS + WEIGHT_PRODUCTS * (whole > 0) if self.training else PRODUCTS / 2)
        return Work(calls, flops, numbers * self.number_bytes + read, groups, 0.0, routed * lora * self._times(3)) * layers


def stage_seconds(compute: Compute, stage: Stage, numbers: Amount, blocks: Amount = 0.0) -> Amount:
    """Seconds of a stage of a round over trainable numbers, in so many blocks."""
    number, block = compute.number_s.get(stage), compute.block_s.get(stage)
    # A calibration's seconds where there are some, else an estimate from bytes.
    number = STAGE_BYTES[stage] / compute.bytes_per_s if number is None else number
    block = STAGE_CALLS[stage] * compute.call_s if block is None else block
    return numbers * number + blocks * block
