"""Models whose channels are grouped, with the layers of a run in them: logits of single samples, client by client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmoe_ds.config import AdapterConfig
from fedmoe_ds.config.foundation_section import FoundationConfig
from fedmoe_ds.foundation import load_foundation
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.batch import Rows, make_batch
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.expert_layout import hosted_layout
from fedmoe_ds.model.forward import AdaptedModel
from fedmoe_ds.model.install import adapter_blocks, initial_bank, install
from fedmoe_ds.model.pass_context import Execution


class Grouped:
    """A model of a folder for clients of these caps, in one pass; experts whole, or with LoRA that changes nothing yet."""

    def __init__(self, folder: Path, caps: tuple[int, ...], training: str = "full") -> None:
        self.foundation, self.caps = load_foundation(folder, FoundationConfig(), 1, 0, "cpu"), caps
        adapters = AdapterConfig(attention=[], rank=4, expert_training=training)
        places = hosted_layout(self.foundation.layers)
        blocks = adapter_blocks(self.foundation.model, places, adapters, None)
        self.bank = Bank(blocks, places.num_experts, len(caps))
        pool = Pool(None, 1, places.num_experts, len(caps), merge=True)
        self.execution = Execution(self.bank, pool, 1.0, layers=places.layers)
        start = initial_bank(self.foundation, blocks, 0, places.held)
        for name in self.bank.specs:
            place = self.bank.broadcast(name)
            place.copy_(start.broadcast(name).expand_as(place))
        install(self.foundation, adapters, self.execution)

    def rows(self, client: int, masks: Any = None) -> Rows:
        """Two samples or more; `masks` are the groups that the client may use, bool [layers, experts]."""
        draw, images = np.random.default_rng(client), self.foundation.images
        own: dict[str, Any] = {} if masks is None else {"allowed_LE": masks}
        if images is not None:
            pixels = draw.standard_normal((2 + client, *images.shape)).astype(np.float32)
            labels = np.zeros(len(pixels), dtype=np.int64)
            return Rows(client, self.caps[client], [], [], pixels=pixels, labels=labels, positions=images.positions, **own)
        ids = [draw.integers(2, 300, size=length) for length in draw.integers(3, 21, size=2 + client)]
        return Rows(client, self.caps[client], ids, [np.arange(len(seq)) > 0 for seq in ids], **own)

    @torch.no_grad()
    def logits(self, parts: list[Rows]) -> list[torch.Tensor]:
        """Per sample, of the positions that predict."""
        batch = make_batch(parts, torch.device("cpu"), self.foundation.images)
        result = AdaptedModel(self.foundation, self.execution).forward(batch, None)
        sizes = [len(ids) - 1 for part in parts for ids in part.input_ids] if self.foundation.images is None else 1
        return list(result.logits_NV.split(sizes))


@torch.no_grad()
def dense_logits(model: Any, parts: list[Rows]) -> list[torch.Tensor]:
    """Those of a model of transformers, every sample alone."""
    if model.config.model_type == "vit":
        pixels = [torch.from_numpy(one)[None].to(model.dtype) for part in parts for one in part.pixels]  # type: ignore[union-attr]
        return [model(pixel_values=one).logits.float() for one in pixels]
    return [model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].float() for part in parts for ids in part.input_ids]
