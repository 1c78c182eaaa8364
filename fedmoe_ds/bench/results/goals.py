"""Goals: the list of targets, in the order of the table. Those against PEFT on a CPU are for 128 tokens per client and step."""

from __future__ import annotations

from fedmoe_ds.bench.harness.table import one_decimal
from fedmoe_ds.bench.results.targets import (
    GPU_SHAPE,
    Target,
    ahead_of_flower,
    ahead_of_peers,
    bandwidth_share,
    bitwise_over_fast,
    gpu_share,
    gpu_waves,
    measured_by,
    of_round,
    over_floor,
)
from fedmoe_ds.bench.rounds import budget, overhead, shares, weak


def off_one(ratio: float) -> float:
    """Distance of a ratio from 1."""
    return abs(ratio - 1.0)


_PEFT = "tokens/s over the best PEFT peer's"
_FLOWER = "rounds per hour over Flower's simulation engine, all cores"
_FLOOR = "CPU time of a wave over that of its matrix products"
_BITWISE = "time of a bitwise wave over a fast one"
_OUTSIDE = "share of a round outside forward, backward and optimizer, evaluation left out"
_BUDGET = "k 1 against the model's k: time ratio over FLOPs ratio, distance from 1"
_WEAK = "tokens/s per rank, two ranks over one"
_CENTRALISED = "time of a federated round over a centralised fine-tune of the same tokens"
_BANDWIDTH = "aggregation over the bandwidth of an all-reduce in the same run"
_GPU_SHARE = "GPU, OLMoE-7B shape, 8 clients: share of the measured bf16 GEMM rate"
_GPU_PEFT = "GPU: tokens/s over PEFT, one client after the other"

WAVES, PEERS, ROUND, AGGREGATE = measured_by("wave"), measured_by("peers"), measured_by("round"), measured_by("aggregate")

TARGETS = (
    Target("peft-e32", f"e32: {_PEFT}", ">=", 2.0, WAVES, ahead_of_peers("e32", "float32")),
    Target("peft-e64", f"e64: {_PEFT}", ">=", 10.0, WAVES, ahead_of_peers("e64", "float32")),
    Target("peft-e32-bf16", f"e32, bf16 base: {_PEFT}", ">=", 3.0, WAVES, ahead_of_peers("e32", "bfloat16")),
    Target("peft-e64-bf16", f"e64, bf16 base: {_PEFT}", ">=", 15.0, WAVES, ahead_of_peers("e64", "bfloat16")),
    Target("flower-e32", f"e32: {_FLOWER}", ">=", 2.5, PEERS, ahead_of_flower("e32")),
    Target("flower-e64", f"e64: {_FLOWER}", ">=", 12.0, PEERS, ahead_of_flower("e64")),
    Target("floor-e32", f"e32: {_FLOOR}", "<=", 1.3, WAVES, over_floor("e32")),
    Target("floor-e64", f"e64: {_FLOOR}", "<=", 1.3, WAVES, over_floor("e64")),
    Target("bitwise-e32", f"e32: {_BITWISE}", "<=", 1.25, WAVES, bitwise_over_fast("e32")),
    Target("bitwise-e64", f"e64: {_BITWISE}", "<=", 1.25, WAVES, bitwise_over_fast("e64")),
    Target("budget", _BUDGET, "<=", 0.15, ROUND, of_round(budget.PART, off_one), one_decimal),
    Target("outside", _OUTSIDE, "<=", 0.05, ROUND, of_round(shares.PART), one_decimal),
    Target("centralised", _CENTRALISED, "<=", 1.15, ROUND, of_round(overhead.PART)),
    Target("weak", _WEAK, ">=", 0.9, ROUND, of_round(weak.PART)),
    Target("bandwidth", _BANDWIDTH, ">=", 0.7, AGGREGATE, bandwidth_share, one_decimal),
    Target("gpu-share", _GPU_SHARE, ">=", 0.4, gpu_waves, gpu_share, one_decimal),
    Target("gpu-peft-512", f"{_GPU_PEFT}, 512 tokens", ">=", 5.0, gpu_waves, ahead_of_peers(GPU_SHAPE, "bfloat16", 512)),
    Target("gpu-peft-8192", f"{_GPU_PEFT}, 8192 tokens", ">=", 2.0, gpu_waves, ahead_of_peers(GPU_SHAPE, "bfloat16", 8192)),
)
