"""FFT-MoE: a dense model of transformers, with adapter experts beside every feed-forward block.

    z = W_R x,   T(x) = the k largest of z,   g_m = softmax of z over T(x),   y = FFN(x) + sum_{m in T(x)} g_m V_m gelu(U_m x)

Legend: B sequences or images, S positions, T = B * S token rows, D model width, E experts, H width of an expert, K active ones,
N rows of one expert.

This file lies in a model folder, next to `config.json` and the weights, and is all the code that the model needs beside torch
and transformers 5:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)

`config.json` is that of the dense model, with the section `adapter_moe`: `base`, the dense model's own `model_type`; `experts`,
E; `width`, H; `top_k`, K. The model's class is made here out of the dense model's own: every other tensor keeps its name, and
generation, caches, data types and `save_pretrained` work as they do there.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
)

MODEL_TYPE = "fft_moe"
SECTION = "adapter_moe"
BASES = ("llama", "mistral", "olmo", "olmo2", "qwen2", "qwen3", "vit")
"""Model types whose feed-forward block is one module without the residual, at `layers.N.mlp`."""


class AdapterSettings(NamedTuple):
    """The section `adapter_moe` of a configuration."""

    base: str
    experts: int
    width: int
    top_k: int

    @classmethod
    def of(cls, given: Any) -> AdapterSettings:
        """Check a section. Raises ValueError, one line."""
        where = f"config.json: {SECTION}"
        if not isinstance(given, dict) or set(given) != set(cls._fields):
            raise ValueError(f"{where}: {given!r}: expected a section with {', '.join(cls._fields)}")
        if given["base"] not in BASES:
            raise ValueError(f"{where}: base: {given['base']!r}: expected one of {', '.join(BASES)}")
        for name in cls._fields[1:]:
            # A bool is an int to Python, and no number of experts.
            if type(given[name]) is not int or given[name] < 1:
                raise ValueError(f"{where}: {name}: {given[name]!r}: expected a whole number above 0")
        if given["top_k"] > given["experts"]:
            raise ValueError(f"{where}: top_k: {given['top_k']}: more than the {given['experts']} experts; use at most these")
        return cls(**given)


class AdapterExperts(nn.Module):
    """The experts of one layer with their router; their gated sum is added to what the feed-forward block puts out."""

    def __init__(self, model_width: int, settings: AdapterSettings) -> None:
        super().__init__()
        experts, width, self.top_k = settings.experts, settings.width, settings.top_k
        self.router = nn.Parameter(torch.empty(experts, model_width))  # W_R
        self.inner = nn.Parameter(torch.empty(experts, width, model_width))  # U
        self.outer = nn.Parameter(torch.empty(experts, model_width, width))  # V

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, -2)
        # Float32 whatever the rows are: the order of near-equal experts must not change.
        scores_TE = F.linear(x_TD, self.router).float().softmax(-1)
        weights_TK, experts_TK = scores_TE.topk(self.top_k)
        # A softmax over all, divided by the sum over the chosen, is the softmax over the chosen.
        weights_TK = (weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)).to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD)
        # Experts that nobody has chosen cost nothing.
        for expert in sorted(set(experts_TK.flatten().tolist())):
            rows_N, places_N = torch.where(experts_TK == expert)
            a_NH = F.gelu(F.linear(x_TD[rows_N], self.inner[expert])) * weights_TK[rows_N, places_N].unsqueeze(-1)
            y_TD.index_add_(0, rows_N, F.linear(a_NH, self.outer[expert]).to(y_TD.dtype))
        return y_TD.view_as(x_BSD)


def _add_experts(block: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A hook on the feed-forward block: with it the block's own tensors keep their names."""
    added: Tensor = block.adapter_experts(inputs[0])
    return output + added


@cache
def _config_class(base: str) -> Any:
    parent = CONFIG_MAPPING[base]
    # The name and `_auto_class` are what `save_pretrained` writes into `auto_map`: they lead back to this file.
    own = {"__module__": __name__, "model_type": MODEL_TYPE, "_auto_class": "AutoConfig"}
    return type("FFTMoEConfig", (parent,), own)


@cache
def _model_class(name: str, auto_class: str, config_class: Any) -> Any:
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if auto_class == "AutoModelForCausalLM" else MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    parent: Any = mapping[config_class.__base__]

    def __init__(self: Any, config: Any, *inputs: Any, **options: Any) -> None:
        parent.__init__(self, config, *inputs, **options)
        settings = AdapterSettings.of(config.adapter_moe)
        for layer in self.base_model.layers:
            layer.mlp.adapter_experts = AdapterExperts(config.hidden_size, settings)
            layer.mlp.register_forward_hook(_add_experts)
        # transformers asks the model that is nearest to a module how it begins: here that is the one without the head.
        self.base_model._init_weights = self._init_weights
        # Once more: the parent could not know of the experts.
        self.post_init()

    def _init_weights(self: Any, module: nn.Module) -> None:
        """New experts add nothing: V is zero. Tensors that a file has are not touched: transformers marks and guards them."""
        if not isinstance(module, AdapterExperts):
            return parent._init_weights(self, module)  # type: ignore[no-any-return]
        bound = module.router.shape[1] ** -0.5
        nn.init.uniform_(module.router, -bound, bound)
        nn.init.uniform_(module.inner, -bound, bound)
        nn.init.zeros_(module.outer)

    own = {"__module__": __name__, "config_class": config_class, "_auto_class": auto_class}
    return type(name, (parent,), own | {"__init__": __init__, "_init_weights": _init_weights})


class FFTMoEConfig:
    """Where `auto_map` leads: makes configurations of the dense model's own class."""

    @classmethod
    def from_pretrained(cls, folder: Any, **options: Any) -> Any:
        """As `PreTrainedConfig.from_pretrained`. Raises ValueError where `adapter_moe` is missing or wrong."""
        tree, options = PreTrainedConfig.get_config_dict(folder, **options)
        return cls.from_dict(tree, **options)

    @classmethod
    def from_dict(cls, tree: dict[str, Any], **options: Any) -> Any:
        """As `PreTrainedConfig.from_dict`. Raises ValueError where `adapter_moe` is missing or wrong."""
        return _config_class(AdapterSettings.of(tree.get(SECTION)).base).from_dict(tree, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """transformers calls this of what it finds in `auto_map`; the classes that are made say it themselves."""


class _Model:
    """Where `auto_map` leads: makes models of a class made out of the dense model's own."""

    auto_class: str

    @classmethod
    def of(cls, config: Any) -> Any:
        """The class of a configuration's model."""
        config_class: Any = type(config)
        return _model_class(cls.__name__, cls.auto_class, config_class)

    @classmethod
    def from_pretrained(cls, folder: Any, *inputs: Any, config: Any = None, **options: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`."""
        config = FFTMoEConfig.from_pretrained(folder) if config is None else config
        return cls.of(config).from_pretrained(folder, *inputs, config=config, **options)

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        return cls.of(config)._from_config(config, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """As that of `FFTMoEConfig`."""


class FFTMoEForCausalLM(_Model):
    """A language model, which predicts the next token."""

    auto_class = "AutoModelForCausalLM"


class FFTMoEForImageClassification(_Model):
    """A classifier of images."""

    auto_class = "AutoModelForImageClassification"
