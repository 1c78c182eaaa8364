"""AutoEP: experts hosted by DeepSpeed AutoEP. Every private call of AutoEP in the package is in this module.

AutoEP (`deepspeed.module_inject.auto_ep`) replaces the mixture-of-experts blocks of a Hugging Face model by layers
that own 1/ep_size of the experts. Its classes are no public interface, hence the narrow DeepSpeed range in
`pyproject.toml`.

Shape suffixes: B batch, S sequence, T = B * S tokens, L local experts (all / ep_size), D hidden size, F expert FFN
size, G = 2F (gate rows, then up rows).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import deepspeed.comm
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config, validate_autoep_post_detection
from deepspeed.module_inject.auto_ep_presets.registry import preset_name_for_hf_model_type
from deepspeed.moe.ep_experts import EXPERT_ACTIVATIONS
from torch import Tensor, nn

from fedmoe_ds.distributed import process_groups
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.dense import DENSE
from fedmoe_ds.foundation.families import FAMILIES, family_settings, routes_in_groups
from fedmoe_ds.foundation.gating import GatedUnit, gated_unit


@dataclass
class HostedLayer:
    """One mixture-of-experts layer whose local experts live on this rank.

    `module` is DeepSpeed's AutoEPMoELayer: `module.router` (its `gate.weight` is [experts, D]), `module.experts`
    (weights, `activation` and its scalars), shared experts if the family has them, and `module.ep_group` once
    `deepspeed.comm` is initialised.
    """

    name: str
    index: int
    module: Any
    num_experts: int
    top_k: int
    hidden_size: int
    ffn_hidden_size: int
    ep_size: int
    ep_rank: int
    w13: Tensor = field(repr=False)  # [L, 2F, D], gate rows first
    w2: Tensor = field(repr=False)  # [L, D, F]
    unit: GatedUnit  # what its experts compute between the two products
    source_names: dict[str, str] = field(repr=False)  # prefix of a tensor's name -> prefix in Hugging Face's model
    # Tensors that are parts of others: name -> that of the other one, and which part.
    parts: dict[str, tuple[str, slice | tuple[slice, ...]]] = field(default_factory=dict, repr=False)
    gated: bool = True  # False: w13 is [L, F, D], followed by GELU; nobody asks for `unit`

    @property
    def experts(self) -> range:
        """Global ids of the experts on this rank."""
        local = self.num_experts // self.ep_size
        return range(self.ep_rank * local, (self.ep_rank + 1) * local)

    def bind(self, w13_LGD: Tensor, w2_LDF: Tensor) -> None:
        """Make these buffers the layer's expert weights; `experts.w1`, `w3` and `w2` become frozen views of them."""
        shape_LGD = (len(self.experts), 2 * self.ffn_hidden_size, self.hidden_size)
        shape_LDF = (len(self.experts), self.hidden_size, self.ffn_hidden_size)
        assert w13_LGD.shape == shape_LGD and w13_LGD.is_contiguous(), (self.name, w13_LGD.shape, shape_LGD)
        assert w2_LDF.shape == shape_LDF and w2_LDF.is_contiguous(), (self.name, w2_LDF.shape, shape_LDF)
        self.w13, self.w2 = w13_LGD, w2_LDF
        w1_LFD, w3_LFD = w13_LGD.chunk(2, dim=1)
        for name, view in (("w1", w1_LFD), ("w3", w3_LFD), ("w2", w2_LDF)):
            old = getattr(self.module.experts, name)
            new = nn.Parameter(view, requires_grad=False)
            new.__dict__.update(old.__dict__)  # DeepSpeed's marks: an expert parameter is never replicated data
            setattr(self.module.experts, name, new)

    def bind_counter(self, device: torch.device) -> None:
        """Give AutoEP's own token counter real memory; a model that was built on the meta device has none."""
        self.module.tokens_per_expert = torch.zeros(self.num_experts, device=device)


def host_experts(model: nn.Module, ep_size: int, ep_rank: int) -> list[HostedLayer]:
    """Replace, in place, every mixture-of-experts block of a causal LM by one with 1/ep_size of the experts.

    The parameters may be on the meta device; they are all frozen afterwards. Every rank must call this.

    Raises:
        UserError: the model has no experts, AutoEP cannot host it, or ep_size does not divide the number of experts.
    """
    process_groups.quiet_deepspeed()
    assert 0 <= ep_rank < ep_size, (ep_rank, ep_size)
    settings = {"enabled": True, "autoep_size": ep_size, **_family_settings(model)}
    device = next(model.parameters()).device
    try:
        auto = AutoEP(model, parse_autoep_config(settings))
        _forget_unused_groups(auto, model)
        specs = auto.ep_parser()
        _check_divisible(specs, ep_size)
        validate_autoep_post_detection(auto.config, specs)
        with torch.device(device):  # AutoEP allocates its layers before it copies into them
            for spec in specs:
                # The public variant also redirects transformers' router-logit recorders, which nothing here reads and
                # which fails on the read-only registry of recent transformers versions.
                auto._replace_moe_layer_without_retarget(spec, ep_size, ep_rank)
    except ValueError as error:
        raise UserError(f"{_describe(model)} cannot be hosted by DeepSpeed AutoEP: {error}") from error
    model.requires_grad_(False)
    hosted = [_hosted_layer(model, spec, ep_size, ep_rank) for spec in specs]
    if deepspeed.comm.is_initialized():
        for layer in hosted:
            layer.module.set_deepspeed_parallelism()
    else:
        assert ep_size == 1, "expert parallelism needs deepspeed.comm"
    return hosted


def shared_output(layer: Any, x_TD: Tensor, hidden_states_BSD: Tensor) -> Tensor | None:
    """What the shared experts, which every token sees, add to the routed output; None where a family has none.

    Args:
        layer: the AutoEPMoELayer.
        x_TD: the layer's input, tokens flattened.
        hidden_states_BSD: the same input as the decoder layer gave it.
    """
    if layer.shared_experts is None:
        return None
    gate = layer.shared_experts_gate
    seen = hidden_states_BSD if gate is None and layer.moe_output_shape != "flat" else x_TD
    result: Tensor = layer.shared_experts(seen)
    return result if gate is None else torch.sigmoid(gate(seen)) * result


def finalize_output(layer: Any, output_BSD: Tensor, shared: Tensor | None) -> Tensor | tuple[Tensor, Tensor | None]:
    """Add the shared experts to the routed output and return what this model family's decoder layer expects.

    The same as AutoEP's own end of a layer, which computes the shared experts there and cannot be given them. Router logits are
    for a recorder of transformers that nobody reads here, so they are not computed.

    Args:
        layer: the AutoEPMoELayer.
        output_BSD: weighted sum of the routed experts.
        shared: `shared_output`.
    """
    output = output_BSD.flatten(0, -2) if layer.moe_output_shape == "flat" else output_BSD
    if shared is not None:
        output = output + shared.reshape(output.shape)
    return (output, None) if layer.return_router_logits else output


def _describe(model: nn.Module) -> str:
    config: Any = model.config
    return f"foundation.path: {config._name_or_path or 'model'}: model_type '{config.model_type}'"


def _family_settings(model: nn.Module) -> dict[str, Any]:
    """AutoEP settings of the model's family, or the reason why there are none.

    AutoEP would try all its presets on an unknown model type; that guesses the routing rule, so it is refused here.
    """
    config: Any = model.config
    if config.model_type in FAMILIES:
        return family_settings(config)
    families = ", ".join(FAMILIES)
    if preset_name_for_hf_model_type(config.model_type) is not None:
        raise UserError(
            f"{_describe(model)} has a preset in this DeepSpeed AutoEP, but its routing was never compared with "
            f"transformers'; give one of the families {families}"
        )
    if not any(re.search(r"(^|\.)experts$", name) for name, _ in model.named_modules()):
        raise UserError(
            f"{_describe(model)} is neither a known mixture-of-experts model nor a known dense one; give one of the families "
            f"{families}, or one of the dense families {', '.join(DENSE)}"
        )
    raise UserError(f"{_describe(model)} has no DeepSpeed AutoEP preset; give one of the families {families}")


def _forget_unused_groups(auto: Any, model: nn.Module) -> None:
    """AutoEP limits routing to expert groups wherever a configuration has the two numbers; most layers never read them."""
    if not routes_in_groups(model.config):
        auto.config.num_expert_groups = auto.config.num_limited_groups = None


def _gated_unit(model: nn.Module, module: Any) -> GatedUnit:
    """What the hosted layer computes between its products, or the reason why it cannot be computed here."""
    experts = module.experts
    name, alpha, limit = experts.activation, float(experts.activation_alpha), float(experts.activation_limit)
    unit = gated_unit(name, alpha, limit)
    if unit is not None:  # a name is no promise: another DeepSpeed may compute something else under it
        # Beyond the limit on both sides, so that the clamping is compared as well.
        line = torch.linspace(-1.5 * limit, 1.5 * limit, 31)
        pairs_N2 = torch.cartesian_prod(line, line)
        theirs_N1 = EXPERT_ACTIVATIONS[name].fn(pairs_N2[:, :1], pairs_N2[:, 1:], alpha, limit)
        if not torch.allclose(unit.weighted(pairs_N2, torch.ones(len(pairs_N2))), theirs_N1, rtol=1e-4, atol=1e-4):
            unit = None
    if unit is None:
        raise UserError(f"{_describe(model)}: its experts compute '{name}', which is not known here; give another model")
    if module.score_apply != "post":
        raise UserError(
            f"{_describe(model)}: its routing weights apply before the experts (score_apply '{module.score_apply}'), which is "
            "not known here; give another model"
        )
    return unit


def _check_divisible(specs: list[Any], ep_size: int) -> None:
    for num_experts in sorted({spec.num_experts for spec in specs}):
        check_shards(num_experts, ep_size)


def check_shards(num_experts: int, ep_size: int) -> None:
    """Raise UserError unless every rank of a cluster can hold as many experts as the others."""
    if num_experts % ep_size:
        valid = ", ".join(str(size) for size in range(1, num_experts + 1) if num_experts % size == 0)
        raise UserError(f"topology.ep_size: {ep_size}: {num_experts} experts cannot be split evenly; choose one of {valid}")


def _hosted_layer(model: nn.Module, spec: Any, ep_size: int, ep_rank: int) -> HostedLayer:
    name: str = spec.moe_module_name
    module: Any = model.get_submodule(name)
    if module._modules.get(spec.router_name) is module.router:
        del module._modules[spec.router_name]  # AutoEP's second name for the router would double it in every state dict
    found = re.search(r"\blayers\.(\d+)\.", name)  # other numbers may come before the layer's
    assert found is not None, name
    bias_owner = spec.e_score_correction_bias_path
    source_names = {
        f"{name}.experts.": f"{name}.{spec.experts_name}.",
        f"{name}.router.gate.": f"{name}.{spec.router_name}.",
        f"{name}.router.e_score_correction_bias": ".".join(filter(None, (name, bias_owner, "e_score_correction_bias"))),
        f"{name}.shared_experts.": f"{name}.{spec.shared_experts_name}.",
        f"{name}.shared_experts_gate.": f"{name}.{spec.shared_experts_gate_name}.",
    }
    layer = HostedLayer(
        name=name,
        index=int(found.group(1)),
        module=module,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        ep_size=ep_size,
        ep_rank=ep_rank,
        w13=torch.cat([module.experts.w1, module.experts.w3], dim=1),
        w2=module.experts.w2.detach(),
        unit=_gated_unit(model, module),
        source_names=source_names,
    )
    layer.bind(layer.w13, layer.w2)
    return layer
