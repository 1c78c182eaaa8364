"""Expert layout: where a run's experts are: in the model's own mixture layers, in adapters beside dense blocks, or nowhere."""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe_ds.config import MoEAdapterConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation import FeedForwardSite, HostedLayer


@dataclass(frozen=True)
class ExpertLayout:
    """The expert pool of a run, the same in every layer. Without experts it has no layers, and `top_k` is 1.

    Attributes:
        layers: indices of the model's layers with experts, in depth order.
        num_experts: experts per layer, over all ranks.
        top_k: most experts that a token may use.
        held: global ids of the experts on this rank.
        renormalised: whether routing weights of the chosen experts are scaled to sum to one.
        width, ffn: model width and width of one expert.
        matrices: of width x ffn numbers in one expert: three with a gate, two without.
        zero: further experts of the router that add nothing, and are nowhere.
        per_sample: whether one routing decision holds for all token rows of a sample.
    """

    layers: list[int]
    num_experts: int
    top_k: int
    held: range
    renormalised: bool
    width: int
    ffn: int
    matrices: int = 3
    zero: int = 0
    per_sample: bool = False

    @property
    def real_share(self) -> float:
        """Of the slots of a row, how many are expected to have an expert that adds something: all experts are taken alike."""
        return self.num_experts / max(self.num_experts + self.zero, 1)


def hosted_layout(layers: list[HostedLayer]) -> ExpertLayout:
    """The mixture layers of a sparse model."""
    first = layers[0]
    return ExpertLayout(
        [layer.index for layer in layers],
        first.num_experts,
        first.top_k,
        first.experts,
        bool(first.module.router.route_norm),
        first.hidden_size,
        first.ffn_hidden_size,
        3 if first.gated else 2,
    )


def empty_layout(sites: list[FeedForwardSite]) -> ExpertLayout:
    """A dense model without adapter experts. Its top-k of 1 is that of a row that nothing routes."""
    return ExpertLayout([], 0, 1, range(0), False, sites[0].hidden_size, sites[0].ffn_hidden_size)


def check_shards(moe: MoEAdapterConfig, ep_size: int) -> None:
    """Raise UserError unless every rank can hold as many adapter experts as the others."""
    if moe.experts % ep_size:
        raise UserError(
            f"adapters.moe.experts: {moe.experts}: not divisible by topology.ep_size {ep_size}; every rank holds as many"
        )


def adapter_layout(sites: list[FeedForwardSite], moe: MoEAdapterConfig, ep_size: int, shard: int) -> ExpertLayout:
    """Adapter experts beside the feed-forward blocks of a dense model; `check_shards` has passed."""
    assert moe.experts % ep_size == 0, (moe.experts, ep_size)
    local = moe.experts // ep_size
    # Contiguous ids, as DeepSpeed shards hosted experts: the first id and the count describe a rank.
    held = range(shard * local, (shard + 1) * local)
    indices = [site.index for site in sites]
    # Renormalised: the adapters' router takes its softmax over the selected experts.
    widths, per_sample = (sites[0].hidden_size, moe.width), moe.router_input == "sample"
    return ExpertLayout(indices, moe.experts, moe.top_k, held, True, *widths, matrices=2, zero=moe.zero, per_sample=per_sample)
