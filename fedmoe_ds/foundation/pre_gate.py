"""Pre-gate: a router that runs once per token, before the layers, and decides for all of them.

Read-ME (arXiv 2410.19123): a small causal transformer on an embedding of its own, one expert per token. CODE: its embedding
begins as the first columns of the model's; in training the target of a layer is how many of a token's largest channels an
expert has, counted at five cut-offs N - 1, 4N/5, ..., N/5 of the N channels of an expert,

    s_e = 10 / (3 N) sum_c |{channels above the c-th largest} and expert e|
    loss = 0.75 CE(z, argmax s; smoothing 0.5) + 0.25 CE(z, softmax s),     summed over layers

COMPLETION: one pre-norm block is causal attention without positions and two linear maps around SiLU, all without biases. The
router computes in float32, whatever the model is stored in.

Legend: B sequences, S positions, T token rows, W width of the router, V vocabulary, L layers, E experts, F channels of a dense
feed-forward block, N channels of an expert, D model width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "pre_gate"
"""Of the module in the model, and of the entry of its configuration."""
HEADS = 2
SMOOTHING, HARD = 0.5, 0.75
SHARPNESS = 10.0 / 3.0


@dataclass(frozen=True)
class PreGateShape:
    """Sizes of a router, and of the dense blocks that its targets are read from."""

    experts: int
    layers: int
    width: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> PreGateShape | None:
        """Of a transformers configuration; None where the model routes in its layers."""
        told = getattr(config, NAME, None)
        if told is None:
            return None
        return cls(config.num_experts, told["layers"], told["width"], config.vocab_size)

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is trained."""
        w = self.width
        blocks: dict[str, tuple[int, ...]] = {}
        for layer in range(self.layers):
            sizes = {"attention_in": (3 * w, w), "attention_out": (w, w), "inner": (w, w), "outer": (w, w)}
            blocks |= {f"{name}_{layer}": shape for name, shape in sizes.items()}
        return {"embedding": (self.vocabulary, w), **blocks, "head": (self.experts, w)}


class PreGate(nn.Module):
    """The router as it stands in a foundation: its weights, and what targets are read from, all of it frozen.

    Attributes:
        masks_LEF: 1 for the channels of an expert.
        gate_up_LGD: input projections of the dense blocks, gate rows first, G = 2F.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        shape = PreGateShape.of(config)
        assert shape is not None
        self.shape, self.layers = shape, config.num_hidden_layers
        channels = config.intermediate_size
        # Buffers: of a frozen model nothing else is a parameter, and no product of a forward pass reads these.
        for name, size in shape.weights().items():
            self.register_buffer(name, torch.empty(size, dtype=torch.float32, device="meta"))
        self.register_buffer("masks_LEF", torch.empty(self.layers, shape.experts, channels, device="meta"))
        dense = (self.layers, 2 * channels, config.hidden_size)
        self.register_buffer("gate_up_LGD", torch.empty(dense, dtype=dtype, device="meta"))

    def weights(self) -> dict[str, Tensor]:
        """What a client's router begins as."""
        return {name: self.get_buffer(name) for name in self.shape.weights()}


def attach(model: Any, dtype: torch.dtype) -> None:
    """Give a model whose configuration has a router before its layers this router, without memory."""
    if PreGateShape.of(model.config) is not None:
        model.add_module(NAME, PreGate(model.config, dtype))


def pre_gate_of(model: Any) -> PreGate | None:
    """The router before the layers of a model, if it has one."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, PreGate) else None


def logits(weights: Mapping[str, Tensor], layers: int, ids_BS: Tensor) -> Tensor:
    """[B, S, E]: of every token from itself and those before it."""
    x_BSW = F.embedding(ids_BS, weights["embedding"])
    for layer in range(layers):
        inner = F.linear(_normed(x_BSW), weights[f"attention_in_{layer}"])
        x_BSW = x_BSW + F.linear(_attended(inner), weights[f"attention_out_{layer}"])
        inner = F.silu(F.linear(_normed(x_BSW), weights[f"inner_{layer}"]))
        x_BSW = x_BSW + F.linear(inner, weights[f"outer_{layer}"])
    return F.linear(_normed(x_BSW), weights["head"])


def _attended(inner_BSX: Tensor) -> Tensor:
    """Causal attention; X = 3 W: queries, keys and values side by side."""
    heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in inner_BSX.chunk(3, dim=-1)]
    return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)


def _normed(x_BSW: Tensor) -> Tensor:
    return F.rms_norm(x_BSW, x_BSW.shape[-1:], eps=1e-6)


@torch.no_grad()
def overlaps(activation_TF: Tensor, masks_EF: Tensor) -> Tensor:
    """s of the module's docstring, float32 [T, E], from what a dense block hands to its output projection."""
    activation_TF = activation_TF.float()
    experts_N = int(masks_EF[0].sum())
    sorted_TF = activation_TF.sort(dim=-1, descending=True).values
    above_TF = torch.zeros_like(activation_TF)
    for cut in [experts_N - 1, *(experts_N * part // 5 for part in (4, 3, 2, 1))]:
        above_TF += activation_TF > sorted_TF[:, cut, None]
    # Whole numbers below 2^24 in float32: sums are exact in any order, and equal counts stay equal.
    counts_TE = above_TF @ masks_EF.T.float()
    return counts_TE * (SHARPNESS / experts_N)


def router_loss(logits_TE: Tensor, target_TE: Tensor) -> Tensor:
    """The loss of one layer, a mean over token rows."""
    logits_TE = logits_TE.float()
    hard = F.cross_entropy(logits_TE, target_TE.argmax(-1), label_smoothing=SMOOTHING)
    soft = F.cross_entropy(logits_TE, target_TE.softmax(-1))
    return HARD * hard + (1.0 - HARD) * soft
