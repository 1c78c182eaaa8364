"""Counts: what a pass costs beside its matrix products, by kind of device and of model.

Legend: D model width, F expert width (or that of the feed-forward block), V vocabulary.

On the CPU every aten call that is no view and every call of a native kernel was counted, with the numbers that they read and
write, on 36 shapes of OLMoE models and on Llama; tests/test_planner_work.py counts again. On CUDA these are kernels of bfloat16
passes on the stand-in of tests/fake_cuda (87 shapes of OLMoE, 36 of Llama), where PyTorch's operations take the place of
Triton's kernels: with Triton a pass has fewer. Its case `planner` counts again.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Calls:
    """Framework calls, or kernels: of a pass, of a layer, of a projection with LoRA, of one more block of rows in a layer, of
    rows that travel in halves."""

    per_pass: float
    per_layer: float
    per_projection: float
    per_block: float = 0.0
    per_half: float = 0.0


@dataclass(frozen=True)
class Counts:
    """Calls, and numbers that they move outside of matrix products, forward and backward.

    Attributes:
        row: x D per token row and layer.
        projection: x D per token row and projection with LoRA.
        target: x V per target.
        routed_d, routed_f: x D and x F per routed row.
        expert, slot: per token row and expert, and per token row and slot of its top-k.
        feed_forward: x F per token row, in a layer without experts.
        first_row: x D per token row, of the first layer: what it does not move where nothing below its experts is trained.
        forward_share: of these numbers, how many the forward pass alone moves.
        gradient_bytes: per trainable number in flight and pass, whether or not a row has reached it.
    """

    train_calls: Calls
    forward_calls: Calls
    row: float
    projection: float
    target: float
    routed_d: float = 0.0
    routed_f: float = 0.0
    expert: float = 0.0
    slot: float = 0.0
    feed_forward: float = 0.0
    first_row: float = 0.0
    forward_share: float = 0.45
    gradient_bytes: float = 0.0


_SPARSE = {
    "cpu": Counts(
        Calls(28.0, 139.0, 12.0, 24.0, 87.0),
        Calls(29.0, 80.0, 3.0, 9.0, 53.0),
        row=84.0,
        projection=10.0,
        target=9.7,
        routed_d=10.0,
        routed_f=25.0,
        expert=16.0,
        slot=204.0,
    ),
    # Torch's grouped product writes a gradient of its own for every group, which is then added to the bank's.
    "cuda": Counts(
        Calls(40.0, 254.0, 20.0, 0.0, 124.0),
        Calls(41.0, 128.0, 6.0, 0.0, 58.0),
        row=277.0,
        projection=10.4,
        target=21.1,
        routed_d=8.3,
        routed_f=44.7,
        expert=32.0,
        slot=395.0,
        first_row=89.0,
        gradient_bytes=14.4,
    ),
}
_DENSE = {
    "cpu": Counts(Calls(28.0, 77.0, 8.0), Calls(29.0, 36.0, 3.0), row=57.0, projection=6.0, target=9.7, feed_forward=21.0),
    "cuda": Counts(
        Calls(44.0, 88.0, 20.0),
        Calls(44.0, 36.4, 6.6),
        row=173.0,
        projection=7.3,
        target=22.5,
        feed_forward=32.7,
        first_row=42.0,
        gradient_bytes=15.6,
    ),
}


@dataclass(frozen=True)
class ControlCalls:
    """Calls of the host-side control plane, in which every rank waits for the others; tests/test_round_messages.py counts.

    Attributes:
        per_round: of any round (`federation/round_messages.py`): what ranks know of it, what they have counted, its end.
        personal: where clients keep blocks: room for them, and who was trained where.
        per_wave: among the ranks of a cluster.
        per_evaluation: of all tiers together.
        per_checkpoint: of a checkpoint.
    """

    per_round: float
    personal: float
    per_wave: float
    per_evaluation: float
    per_checkpoint: float


CONTROL = ControlCalls(per_round=3, personal=2, per_wave=1, per_evaluation=1, per_checkpoint=4)

SCHEDULE_S = (2e-4, 4e-6)
"""Seconds of drawing and scheduling a round on one core of a server: of any round, and of each participant. No framework call
is in it, so no device makes it faster."""


def counts_of(device: str, sparse: bool) -> Counts:
    """Of passes on this kind of device (`cpu` or `cuda`), of a model with experts or without."""
    return (_SPARSE if sparse else _DENSE)[device]
