"""What a rank holds of clients in flight and of the round's sums: DeepSeek-V3 with LoRA of rank 16, on the meta device.

Tensors are made as a start makes them, for the rank with most clients at home, without their memory. A cluster has all ranks,
up to the one per expert.
"""

from __future__ import annotations

import time

import torch
from transformers import DeepseekV3Config

from fedmoe_ds.aggregation.weighted_average import Statistics
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.clients.optimizer import ClientOptimizer
from fedmoe_ds.config import AdapterConfig, LocalConfig
from fedmoe_ds.foundation.meta_model import build_on_meta, host_model
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.client_slots import ClientSlots
from fedmoe_ds.model.expert_layout import hosted_layout
from fedmoe_ds.model.install import adapter_blocks

NAME = "bank"
X = "ranks"
POINTS = (1, 8, 64, 1024)
WALL = (
    "clients in flight x 73 GiB / ep_size, and one client at least: 9.7 GiB on 8 ranks, 0.9 on 256, most of that attention's "
    "at the client's home; a 257th rank takes nothing off; execution.moments_on=host takes half of it off a GPU"
)
_META = torch.device("meta")
_ADAPTERS = AdapterConfig(rank=16, attention=["q_a_proj", "kv_b_proj"])


def measure(x: int) -> dict[str, float]:
    began = time.perf_counter()
    blocks, experts = _blocks()
    ep_size = min(x, experts)
    held = experts // ep_size
    start = Bank(blocks, held, clients=1, device=_META, with_grad=False)
    sums = Statistics(blocks, held, exact=False, device=_META)
    figures = {"ep_size": float(ep_size), "GiB global adapters and sums": _gib(start.nbytes() + sums.flat.memory.nbytes)}
    for flight in (1, 8):
        slots = ClientSlots(flight, ep_size)
        bank = Bank(blocks, held, max(slots.at_home), flight, _META)
        optimizer = ClientOptimizer(bank, LocalConfig())
        moments = sum(tensor.nbytes for state in (optimizer.first, optimizer.second) for tensor in state.values())
        figures[f"GiB with {flight} in flight"] = _gib(bank.nbytes() + moments)
        figures[f"of it moments with {flight}"] = _gib(moments)
    return {"seconds": time.perf_counter() - began, **figures}


def _blocks() -> tuple[list[BlockSpec], int]:
    """The adapters of one client, and the experts of a layer."""
    with scratch_folder() as folder:
        # The defaults of its configuration class are the published model's.
        DeepseekV3Config().save_pretrained(folder)
        model = build_on_meta(folder, torch.bfloat16)
    layout = hosted_layout(host_model(model, 1, 0))
    return adapter_blocks(model, layout, _ADAPTERS, rescaler=None), layout.num_experts


def _gib(count: int) -> float:
    return count / 2**30
