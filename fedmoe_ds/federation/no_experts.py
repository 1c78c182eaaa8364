"""No experts: plain LoRA, on a dense foundation without adapter experts; what a configuration means there, and may not say.

`adapters.experts` is true by default, for mixtures; here nothing could be trained by it, so it is resolved to false, and that
is what a run saves. Keys that could have no effect without experts are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import load_method


def as_meant(config: Config, sparse: bool | None) -> Config:
    """The configuration for a foundation with (`sparse`) or without experts of its own; None: nobody knows yet.

    Raises:
        UserError: it asks for something that experts are needed for, where there would be none.
    """
    if sparse is not False or config.adapters.moe is not None:
        return config
    _check_method(config)
    for key, value, why, way in _without_meaning(config):
        raise UserError(f"{key}: {value}: {named(config)} is dense and has no {why}; {way}, or put adapter experts beside it "
                        "(adapters.moe)")  # fmt: skip
    return config.model_copy(update={"adapters": config.adapters.model_copy(update={"experts": False})})


def named(config: Config) -> str:
    """The foundation, as the user calls it."""
    return str(config.foundation.path or config.foundation.preset)


def _check_method(config: Config) -> None:
    method = load_method(config.method)
    # A method may know better what it lacks here (FFT-MoE: a section).
    method.check_config(config)
    if "experts" in method.needs:
        raise UserError(
            f"method.name: {config.method.name}: it trains experts and {named(config)} is dense; use a foundation with experts "
            "(tiny-olmoe), another method (fedit), or adapter experts (method fft-moe with an adapters.moe section)"
        )


def _without_meaning(config: Config) -> Iterator[tuple[str, object, str, str]]:
    """(key, value, what is missing, the way out) of everything that is set and needs experts."""
    adapters, local, federation = config.adapters, config.local, config.federation
    if adapters.router != "frozen":
        yield "adapters.router", adapters.router, "router", "drop the key"
    if adapters.expert_training != "lora":
        yield "adapters.expert_training", adapters.expert_training, "experts", "drop the key"
    if not adapters.projections and adapters.head == "frozen" and config.foundation.expand is None:
        way = "name projections here or in feed_forward, or use head=train"
        yield "adapters.attention", "[]", "experts, so nothing would be trained", way
    for key in ("balance_loss", "z_loss"):
        if getattr(local, key) > 0:
            yield f"local.{key}", getattr(local, key), "router", "drop the key"
    if config.topology.ep_size > 1:
        yield "topology.ep_size", config.topology.ep_size, "experts to spread over ranks", "use 1: every rank is a cluster"
    if federation.budget == "top_k":
        yield "federation.budget", federation.budget, "active experts to buy", "use rank"
    if federation.sampling == "budget":
        yield "federation.sampling", federation.sampling, "active experts to draw by", "use size or uniform"
    for i, tier in enumerate(federation.tiers or []):
        if tier.top_k not in (None, 1):
            yield (
                f"federation.tiers.{i}.top_k",
                tier.top_k,
                "experts",
                "drop the key and tell tiers apart by rank, layers or blocks",
            )
