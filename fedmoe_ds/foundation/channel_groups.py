"""Channel groups: dense feed-forward blocks whose experts are groups of their channels, beside some that always work.

Legend: D model width, P channels that always work, E experts of a block, L those on this rank, F channels of an expert.

    FFN(x) = b + sum over channels j of  w_j a_j(x)  =  A(x) + sum_e E_e(x)        A: b and the first P channels, E_e: F others

so all groups with weight one (unit gates) are the dense block. Which channel is where was decided when the model folder was
written (`channel_grouping.py`): its blocks have the first P channels of A, then those of expert after expert, and the
configuration names E and P under `channel_groups`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.autoep import HostedLayer, check_shards
from fedmoe_ds.foundation.dense import VIT, FeedForwardSite, feed_forward_sites
from fedmoe_ds.foundation.families import ACTIVATIONS
from fedmoe_ds.foundation.gating import SWIGLU, GatedUnit, gated_unit

KEY = "channel_groups"
"""Of a model's configuration: how many experts its blocks have, and how many channels always work."""


@dataclass(frozen=True)
class Grouping:
    """How the channels of every block are grouped."""

    experts: int
    always: int = 0

    def channels(self, width: int) -> int:
        """F, of blocks of this width."""
        return (width - self.always) // self.experts


@dataclass
class GroupedLayer(HostedLayer):
    """One feed-forward block whose groups of channels are experts; `module` is a `ChannelGroups`."""

    @property
    def inner(self) -> tuple[str, ...]:
        """What the matrices that lead to the channels are called, gate first."""
        return inner_names(self.gated)

    @property
    def outer(self) -> str:
        """What the matrix that leads back is called."""
        return outer_name(self.gated)

    def channels(self, expert: int) -> slice:
        """Where an expert's channels lie in the block."""
        first = self.module.always + expert * self.ffn_hidden_size
        return slice(first, first + self.ffn_hidden_size)

    @property
    def bias(self) -> Tensor | None:
        """[L, F]: added before the activation, where the block has biases."""
        if self.gated:
            return None
        held: Tensor = self.module.inner_bias.view(self.num_experts, -1)[self.experts.start : self.experts.stop]
        return held

    def bind(self, w13_LGD: Tensor, w2_LDF: Tensor) -> None:
        """As a hosted layer's; without a gate `w13` has one row per channel."""
        if self.gated:
            super().bind(w13_LGD, w2_LDF)
            return
        self.w13, self.w2 = w13_LGD, w2_LDF
        for name, value in (("w1", w13_LGD), ("w2", w2_LDF)):
            setattr(self.module.experts, name, nn.Parameter(value, requires_grad=False))

    def bind_counter(self, device: torch.device) -> None:
        """Nothing counts tokens in such a layer."""


class UnitGate(nn.Module):
    """The routing rule of groups: of those that a row may use the first `top_k`, or as many as its cap, all with weight one
    (a `RouterSpec`)."""

    num_expert_groups: int | None = None
    num_limited_groups: int | None = None
    score_func = "unit"
    route_norm = False
    route_scale = 1.0
    group_score_func = "max"

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        # All scores are equal: the order decides, so that a cap leaves the leading groups.
        self.register_buffer("order_E", -torch.arange(num_experts, dtype=torch.float32, device="cpu"), persistent=False)

    @property
    def e_score_correction_bias(self) -> Tensor | None:
        """What decides who is chosen, and never what it weighs."""
        order_E: Tensor = self.order_E  # type: ignore[assignment]
        return order_E


class OutputBias(nn.Module):
    """The bias of a block without channels of its own."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty_like(bias), requires_grad=False)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        return self.bias.expand_as(hidden_BSD)


class ChannelGroups(nn.Module):
    """What stands in the place of a dense block until a run's layer takes it; without a forward pass of its own.

    `shared_experts` is what works for every row: the channels of no group, and the bias of the block; None where there is
    neither.
    """

    # As the layers of AutoEP say them: what a decoder layer expects, and that shared experts have no gate.
    shared_experts_gate = None
    moe_output_shape = "batched"
    return_router_logits = False

    def __init__(self, block: nn.Module, grouping: Grouping, held: int, gated: bool) -> None:
        super().__init__()
        self.always = grouping.always
        self.router = UnitGate(grouping.experts, grouping.experts)
        first: nn.Linear = block.get_submodule(inner_names(gated)[0])  # type: ignore[assignment]
        like, width = first.weight, grouping.channels(first.out_features)
        self.experts = nn.Module()
        for leaf in ("w1", "w3") if gated else ("w1",):
            setattr(self.experts, leaf, _empty(like, held, width, first.in_features))
        self.experts.w2 = _empty(like, held, first.in_features, width)
        if not gated:
            self.inner_bias = _empty(like, grouping.experts * width)
        self.shared_experts = self._shared(block, gated)

    def _shared(self, block: nn.Module, gated: bool) -> nn.Module | None:
        outer: nn.Linear = block.get_submodule(outer_name(gated))  # type: ignore[assignment]
        if not self.always:
            return None if outer.bias is None else OutputBias(outer.bias)
        own = copy.deepcopy(block)
        kind = {"device": outer.weight.device, "dtype": outer.weight.dtype}
        for leaf in inner_names(gated):
            setattr(own, leaf, nn.Linear(outer.out_features, self.always, bias=not gated, **kind))
        setattr(own, outer_name(gated), nn.Linear(self.always, outer.out_features, bias=not gated, **kind))
        return own


def inner_names(gated: bool) -> tuple[str, ...]:
    """Of the matrices that lead to the channels of a dense block, gate first."""
    return ("gate_proj", "up_proj") if gated else ("fc1",)


def outer_name(gated: bool) -> str:
    """Of the matrix that leads back."""
    return "down_proj" if gated else "fc2"


def grouping_of(config: Any) -> Grouping | None:
    """How a model's configuration says that the channels of its blocks are grouped; None: they are not.

    Raises:
        UserError: it says something that its blocks cannot be.
    """
    said = getattr(config, KEY, None)
    if said is None:
        return None
    where = f"foundation.path: {config._name_or_path or 'model'}: config.json: {KEY}: {said}:"
    if not isinstance(said, dict) or {*said} != {"experts", "always"} or not all(type(value) is int for value in said.values()):
        raise UserError(f"{where} expected the numbers 'experts' and 'always'; get the file again")
    found = Grouping(**said)
    rest = config.intermediate_size - found.always
    if found.experts < 1 or found.always < 0 or rest < found.experts or rest % found.experts:
        raise UserError(f"{where} the {config.intermediate_size} channels of its blocks are no such groups; get the file again")
    return found


def unit_of(config: Any) -> GatedUnit | None:
    """What a dense family's block computes between its products, where its channels can be grouped here; None: no gate."""
    if config.model_type == VIT:
        return None
    known = ACTIVATIONS.get(config.hidden_act)
    return SWIGLU if known is None else gated_unit(known, 0.0, 0.0)


def host_groups(model: Any, ep_size: int, ep_rank: int) -> list[HostedLayer]:
    """Replace, in place, the feed-forward blocks of a dense model by groups of their channels, where its configuration says so.

    Raises:
        UserError: ep_size does not divide the number of experts, or the configuration names groups that cannot be.
    """
    grouping = grouping_of(model.config)
    if grouping is None:
        return []
    check_shards(grouping.experts, ep_size)
    found = [_host(model, site, grouping, ep_size, ep_rank) for site in feed_forward_sites(model)]
    model.requires_grad_(False)
    return found


def _host(model: Any, site: FeedForwardSite, grouping: Grouping, ep_size: int, ep_rank: int) -> HostedLayer:
    unit = unit_of(model.config)
    module = ChannelGroups(site.module(model), grouping, grouping.experts // ep_size, gated=unit is not None)
    site.replace(model, module)
    experts: Any = module.experts
    w13 = experts.w1 if unit is None else torch.cat([experts.w1, experts.w3], dim=1)
    return GroupedLayer(
        name=site.path,
        index=site.index,
        module=module,
        num_experts=grouping.experts,
        top_k=module.router.top_k,
        hidden_size=site.hidden_size,
        ffn_hidden_size=grouping.channels(site.ffn_hidden_size),
        ep_size=ep_size,
        ep_rank=ep_rank,
        w13=w13.detach(),
        w2=experts.w2.detach(),
        unit=unit or SWIGLU,
        source_names={},
        parts=_parts(site.path, grouping.always, gated=unit is not None),
        gated=unit is not None,
    )


def _parts(path: str, always: int, gated: bool) -> dict[str, tuple[str, slice | tuple[slice, ...]]]:
    """Which parts of a dense block's tensors the tensors outside of its experts are."""
    leading, everything, shared = slice(0, always), slice(None), f"{path}.shared_experts"
    found: dict[str, tuple[str, slice | tuple[slice, ...]]] = {}
    for leaf in inner_names(gated):
        found[f"{shared}.{leaf}.weight"] = (f"{path}.{leaf}.weight", leading)
    found[f"{shared}.{outer_name(gated)}.weight"] = (f"{path}.{outer_name(gated)}.weight", (everything, leading))
    if not gated:
        found[f"{shared}.fc1.bias"] = (f"{path}.fc1.bias", leading)
        found[f"{path}.inner_bias"] = (f"{path}.fc1.bias", slice(always, None))
        found |= {f"{shared}.{name}": (f"{path}.fc2.bias", everything) for name in ("fc2.bias", "bias")}
    return found


def _empty(like: Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device), requires_grad=False)
