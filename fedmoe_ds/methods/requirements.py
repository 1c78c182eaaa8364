"""Requirements: what a method asks of the configuration, as far as that follows from its attributes."""

from __future__ import annotations

from fedmoe_ds.aggregation.weighing import MEAN
from fedmoe_ds.config import Config, ServerConfig
from fedmoe_ds.data.forms import FORMS, has_scores
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods.base import Method, MethodParams
from fedmoe_ds.methods.client_drift import DUAL
from fedmoe_ds.methods.late_clients import refuse_delays


def check_needs(method: Method, name: str, config: Config) -> None:
    """The refusals that follow from a method's attributes. Raises UserError, one line each."""
    adapters, server = config.adapters, config.server
    if "lora" in method.needs and adapters.experts and adapters.expert_training != "lora":
        raise UserError(
            f"adapters.expert_training: {adapters.expert_training}: method {name} works on LoRA pairs; "
            "use adapters.expert_training=lora"
        )
    # Adapter experts (`adapters.moe`) are no LoRA pairs; projections may still bring some.
    if "lora" in method.needs and not adapters.projections and (not adapters.experts or adapters.moe is not None):
        raise UserError(
            f"adapters.attention: []: method {name} works on LoRA pairs and there would be none; name attention projections"
        )
    if "experts" in method.needs and not adapters.experts:
        raise UserError(f"adapters.experts: false: method {name} works on expert adapters; use adapters.experts=true")
    if "experts" in method.needs and adapters.feed_forward and adapters.moe is None:
        raise UserError(
            f"adapters.feed_forward: {adapters.feed_forward}: method {name} works on experts, and dense blocks have none; use "
            "a sparse model, or where the method takes them adapter experts (adapters.moe)"
        )
    if "router" in method.needs and adapters.router != "train" and adapters.moe is None:
        raise UserError(f"adapters.router: {adapters.router}: method {name} needs trained routers; use adapters.router=train")
    if method.absorbs and config.foundation.dtype == "bfloat16":
        raise UserError(
            f"foundation.dtype: {config.foundation.dtype}: method {name} adds small products to the frozen weights in every "
            "round, and bfloat16 would round them away; use float32"
        )
    if method.attends and config.execution.packing:
        raise UserError(
            f"execution.packing: true: method {name} asks how much attention each token receives, and samples that lie end to "
            "end are attended to apart; use false"
        )
    if method.candidates:
        refuse_zero_experts(config)
    if method.scored and not has_scores(config.data.form):
        raise UserError(
            f"data.form.kind: {config.data.form.kind}: method {name} asks for a score of every sample, and these have none; "
            "use degraded, with a set of images"
        )
    _check_public(method, name, config)
    _check_views(method, name, config)
    _check_ranks(method, name, config)
    _check_micro_batches(method, name, config)
    _check_dual_variables(method, name, config)
    # Server optimizers step along mean - global: without a mean there is nothing to step along.
    has_mean = method.averages and not (method.collects or method.pooled)
    if not has_mean:
        refuse_server_step(name, server)
    if method.most_delay:
        refuse_delays(f"method.name: {name}", config, has_mean)
    if config.local.drift not in ("none", "fedprox") and (method.collects or method.pooled):
        kept = "control variates" if config.local.drift == "scaffold" else "dual variables"
        raise UserError(
            f"local.drift: {config.local.drift}: method {name} changes what the adapters' coordinates mean in every round, so "
            f"{kept} of the last round do not apply; use none or fedprox"
        )


def _check_public(method: Method, name: str, config: Config) -> None:
    """The server trains what all clients share, and labels that clients do not have train nobody."""
    if config.data.labels == "hidden" and not method.unlabelled:
        raise UserError(f"data.labels: hidden: method {name} trains clients on labels; use shown, or method.name=fedmox")
    if config.server.training is None:
        return
    own = method.personal_models or method.rescaler is not None or method.ensembles or method.pooled
    if own or not method.averages:
        raise UserError(
            f"server.training: method {name} has no one model of all clients that the server could train; drop the section"
        )


def _check_views(method: Method, name: str, config: Config) -> None:
    """Every model of a client reads a view, and every view has a model that reads it."""
    kind, views = config.data.form.kind, FORMS[config.data.form.kind].views
    if views != method.views:
        fitting = " or ".join(other for other, form in FORMS.items() if form.views == method.views)
        raise UserError(
            f"data.form.kind: {kind}: images have {_views(views)}, and the models of method {name} read "
            f"{_views(method.views)}; use {fitting}"
        )


def _views(count: int) -> str:
    return "1 view" if count == 1 else f"{count} views"


def _check_dual_variables(method: Method, name: str, config: Config) -> None:
    """FedVRA's server goes on from one mean of adapters; a method that makes something else of them has no such step."""
    changed = method.weighing != MEAN or method.overrides("after_mean")
    if config.local.drift in DUAL and changed:
        raise UserError(
            f"local.drift: {config.local.drift}: its server adds dual variables to a weighted mean of adapters, and method "
            f"{name} takes no such mean; use none, fedprox or scaffold"
        )


def _check_micro_batches(method: Method, name: str, config: Config) -> None:
    """Micro-batches promise the same mathematics; what is no mean over the rows of a step cannot be added up from them."""
    micro, step = config.execution.micro_batch_size, config.local.batch_size
    # One micro-batch per step is the whole step.
    if micro is None or micro >= step:
        return
    owners = [f"method {name}"] * method.whole_steps + ["local.balance_loss"] * (config.local.balance_loss > 0)
    if owners:
        raise UserError(
            f"execution.micro_batch_size: {micro}: {owners[0]} weighs a whole step of {step} sequences at once; "
            "use null, and execution.activation_checkpointing=true or a smaller local.batch_size where memory is short"
        )


def check_idle(params: MethodParams, config: Config) -> None:
    """Raise UserError where a parameter is set and does nothing."""
    for key, why in params.idle(config).items():
        value, default = getattr(params, key), type(params).model_fields[key].default
        # Compared with the default and not with what the user wrote: a run saves all keys, and its own file must resume.
        if value != default:
            raise UserError(f"method.{key}: {value}: has no effect {why}; drop the key")


def refuse_zero_experts(config: Config) -> None:
    """Raise UserError where a router's bias, which is known per expert, would meet experts that add nothing."""
    moe = config.adapters.moe
    if moe is not None and moe.zero:
        raise UserError(
            f"adapters.moe.zero: {moe.zero}: method {config.method.name} moves routers by how much experts are used, and these "
            "are not there to be used; use 0"
        )


def refuse_server_step(name: str, server: ServerConfig) -> None:
    """Raise UserError unless the server takes what the method gives it."""
    if server.optimizer != "fedavg":
        raise UserError(
            f"server.optimizer: {server.optimizer}: method {name} has no mean of adapters whose change could be a gradient; "
            "use fedavg"
        )
    if server.lr != 1.0:
        raise UserError(f"server.lr: {server.lr}: method {name} replaces the adapters, there is no step; use 1.0")


def _check_ranks(method: Method, name: str, config: Config) -> None:
    bought = method.spends if config.federation.budget == "method" else config.federation.budget
    for i, tier in enumerate(config.federation.tiers or []):
        # A key without effect is refused: the tier's label would promise a budget that no client spends.
        if tier.experts is not None and bought != "experts":
            raise UserError(
                f"federation.tiers.{i}.experts: {tier.experts}: here a budget buys {bought}, not experts; drop the key, or "
                "use hfedmoe, fed-moe, flex-moe, flux, split-mix or shefl with federation.budget=method"
            )
        if tier.layers is not None and bought != "layers":
            raise UserError(
                f"federation.tiers.{i}.layers: {tier.layers}: here a budget buys {bought}, not layers; drop the key, or use "
                "embracing-fl with federation.budget=method"
            )
        if tier.blocks is not None and bought != "blocks":
            raise UserError(
                f"federation.tiers.{i}.blocks: {tier.blocks}: here a budget buys {bought}, not further layers; drop the key, "
                "or use fedbe with federation.budget=method"
            )
        if tier.rank is not None and method.unequal_ranks and bought not in ("rank", "both"):
            raise UserError(
                f"federation.tiers.{i}.rank: {tier.rank}: here a budget buys {bought}, not LoRA rows; drop the key, or use "
                "federation.budget=rank"
            )
    if method.unequal_ranks:
        return
    if config.federation.budget in ("rank", "both"):
        raise UserError(
            f"federation.budget: {config.federation.budget}: method {name} needs equal ranks on all clients; use top_k, or a "
            "method for unequal ranks (hetlora, flexlora, flora, florist, fslora)"
        )
    for i, tier in enumerate(config.federation.tiers or []):
        if tier.rank is not None:
            raise UserError(
                f"federation.tiers.{i}.rank: {tier.rank}: method {name} needs equal ranks on all clients; drop the key, or use "
                "a method for unequal ranks (hetlora, flexlora, flora, florist, fslora)"
            )
