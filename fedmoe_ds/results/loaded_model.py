"""Loaded model: a trained run, or a model folder, with its weights in this process, for passes that train nothing.

    loaded = LoadedModel.of_run(open_run(Path("runs/mine")))
    with loaded.serving(tier="4") as forward:
        result = forward([Sequences([ids_S], [mask_S])])     # PassResult: logits and log-likelihoods of the targets

One process and no process group: all experts are here, whatever topology trained them, and on a CPU no bit depends on that.
The layers are those of training, so figures and answers are the run's own.

Legend: S positions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fedmoe_ds.adapter_formats import read_adapter
from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.checkpoint.state import State, read_tensors
from fedmoe_ds.clients.client import Client, tiers_of
from fedmoe_ds.clients.tiers import Tier
from fedmoe_ds.config import AdapterConfig, Config, MethodConfig
from fedmoe_ds.distributed.control import Alone
from fedmoe_ds.distributed.launcher import Launch
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.build import client_slabs, initial_personal
from fedmoe_ds.federation.continuation import named_in, take_class
from fedmoe_ds.federation.cost import CostModel
from fedmoe_ds.federation.execution import adapted_model
from fedmoe_ds.federation.received_model import ReceivedModel
from fedmoe_ds.federation.run_spec import (
    RunSpec,
    check_model,
    check_plan,
    check_promise,
    check_start,
    facts_of,
    is_bitwise,
    of_loaded_type,
    positions,
    resolve_spec,
)
from fedmoe_ds.federation.task_metrics import Forward
from fedmoe_ds.federation.warm_start import begin_from, open_start
from fedmoe_ds.foundation import Foundation, load_foundation, resolve_foundation
from fedmoe_ds.foundation.size import model_size
from fedmoe_ds.kernels.lora_products import check_kernels
from fedmoe_ds.methods import load_method
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.expert_layout import empty_layout, hosted_layout
from fedmoe_ds.model.install import base_weights, initial_bank
from fedmoe_ds.model.pass_context import Execution
from fedmoe_ds.results.trained_run import Selection, TrainedRun

Note = Callable[[str], None]


def this_process(threads: int = 1) -> Runtime:
    """This process as a world of one: on the CPU, or on the first CUDA device where $DS_ACCELERATOR says cuda.

    Raises:
        UserError: it says cuda, and there is none.
    """
    wanted = _wanted_device()
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("DS_ACCELERATOR: cuda: no CUDA device is visible; set it to cpu")
    torch.set_num_threads(threads)
    return Runtime(Launch("python", 0, 1, 0), torch.device("cuda:0" if wanted == "cuda" else "cpu"), Alone())


def _wanted_device() -> str:
    # Before DeepSpeed is imported, which reads it; a run's own device does not count here.
    return os.environ.setdefault("DS_ACCELERATOR", "cpu")


def config_here(run: TrainedRun) -> Config:
    """The run's configuration for this process: what it left to its device is what it was there, and nothing needs that device.

    Without it a run on a GPU, which is fast by default and may have threads and Triton, could not be opened on a CPU.
    """
    execution, known = run.config.execution, run.snapshot.identity.get("execution", {})
    changes: dict[str, str] = {}
    on_gpu = _wanted_device() == "cuda"
    recorded = known.get("reproducible", "auto") if execution.reproducible == "auto" else execution.reproducible
    # Equal bits are promised on the CPU alone, whatever a run there, or on a GPU under an earlier version, was recorded with.
    changes["reproducible"] = "fast" if on_gpu else recorded
    if not on_gpu:
        changes["adapter_kernels"] = "auto"
    return run.config.model_copy(update={"execution": execution.model_copy(update=changes)})


class LoadedModel:
    """A model in memory, as the members of a tier or one client receive it.

    Attributes:
        spec: resolved for this device.
        foundation: with the federated layers installed.
        received: puts adapters into the model and runs passes.
        clients: of the run; one that stands for everybody where a model folder was loaded.
        personal: every client's own state.
        trained: False as long as the adapters are those before the first round.
        run: None for a model folder.
    """

    def __init__(
        self, spec: RunSpec, foundation: Foundation, clients: Sequence[Client], runtime: Runtime, run: TrainedRun | None
    ) -> None:
        config, device = spec.config, runtime.device
        self.spec, self.foundation, self.clients, self.runtime, self.run = spec, foundation, clients, runtime, run
        zero_head = config.adapters.head_start == "zero"
        self.adapters = initial_bank(foundation, spec.blocks, config.seed, spec.expert_layout.held, device, zero_head)
        model = adapted_model(spec, foundation, _execution(spec, self.adapters))
        self.received = ReceivedModel(spec.method, model, self.adapters)
        self.personal: Personal = initial_personal(spec, self.adapters, clients, slabs=client_slabs(config))
        self.trained = run is None

    @classmethod
    def of_run(cls, run: TrainedRun, config: Config | None = None, before: bool = False) -> LoadedModel:
        """Load a run's model.

        Args:
            config: that of `config_here` with other keys of what does not decide the result (`evaluation`, `execution`).
            before: leave the adapters as they were before the first round; `restore` makes them those of the checkpoint.
        Raises:
            UserError: nobody knows the run's clients, the configuration does not fit the model, or a tensor is missing.
        """
        run.select()  # refuses a checkpoint whose clients nobody knows
        config = config_here(run) if config is None else config
        runtime = this_process(config.execution.threads)
        kind = runtime.device.type
        check_promise(config, kind)
        spec = resolve_spec(*check_start(config, kind), kind, run.outline)
        # What clients keep may be as long as the data of one are.
        spec.know(run.clients)
        check_kernels(config.execution.adapter_kernels, config.adapters.rank, runtime.device)
        # With the bits of its training, where this processor has them: figures and answers are the run's own.
        take_class(spec, runtime, named_in(run.snapshot.identity))
        foundation = load_foundation(run.model, config.foundation, 1, 0, runtime.device)
        loaded = cls(spec, foundation, run.clients, runtime, run)
        if not before:
            loaded.restore()
        return loaded

    @classmethod
    def of_folder(cls, config: Config, note: Note) -> LoadedModel:
        """Load the model that `foundation` names: a foundation, or an export of a whole model; with the adapter of PEFT's that
        `adapters.start` names, if it does.

        Raises:
            UserError: there is no such model, it is of no known family, or the rest of the configuration does not fit it.
        """
        runtime, start = this_process(config.execution.threads), config.adapters.start
        kind = runtime.device.type
        check_promise(config, kind)
        # Without a start neither experts nor projections: nothing of this configuration is trained.
        adapters = AdapterConfig(experts=False, attention=[]) if start is None else _adapters_of(start)
        # Further layers are a run's: without what it has made of them they would change nothing.
        alone = config.foundation.model_copy(update={"expand": None})
        config = config.model_copy(update={"adapters": adapters, "foundation": alone})
        check_plan(config, is_bitwise(config, kind))
        folder = resolve_foundation(config.foundation, config.seed, note)
        foundation = load_foundation(folder, config.foundation, 1, 0, runtime.device)
        if start is None:
            spec = _bare_spec(config, foundation, kind)
        else:
            spec = resolve_spec(*check_start(config, kind), kind, foundation.outline)
        take_class(spec, runtime, {})
        tier = spec.tiers[0]
        budget = (tier.cap, tier.rank, tier.experts)
        everybody = Client(0, "", tier.top_k, 0, 0, 0, *budget, tier=tier.label, layers=tier.layers, blocks=tier.blocks)
        loaded = cls(spec, foundation, [everybody], runtime, None)
        if start is not None:
            begin_from(open_start(Path(start), spec, foundation.fingerprint), spec, loaded.adapters, None, runtime)
        return loaded

    @torch.no_grad()
    def restore(self) -> None:
        """Read what the checkpoint holds: adapters, clients' own state, and weights that products have moved into."""
        assert self.run is not None, "a model folder has no checkpoint"
        read_tensors(self.run.checkpoint, self.run.snapshot, State(0, self.adapters, self.personal))
        for key, weight in base_weights(self.foundation, 0).items():
            if (merged := self.run.base(key)) is not None:
                weight.copy_(merged)
        self.trained = True

    @property
    def tiers(self) -> Mapping[str, Sequence[Client]]:
        """The clients of every tier by its label, the largest budget first."""
        return tiers_of(self.clients)

    def select(self, tier: str | None = None, client: str | None = None) -> Selection:
        """The model of a tier (None: the largest) or of a client. Raises UserError where there is none."""
        if self.run is not None:
            return self.run.select(tier, client)
        ((label, members),) = self.tiers.items()
        if client is not None:
            raise UserError(f"--client: {client}: a model folder has no clients; give a run, or drop --client")
        if tier not in (None, label):
            raise UserError(f"--tier: {tier}: a model folder has its own top-k ({label}) alone; give a run, or drop --tier")
        return Selection(label, tuple(members), None, self.received.assigned(members[0], self.personal, True))

    @contextmanager
    def serving(self, tier: str | None = None, client: str | None = None) -> Iterator[Forward]:
        """Passes by one of the models, without gradients: over samples in parts, each of which is a segment of the result.

        Raises:
            UserError: as `select`.
        """
        chosen, plain = self.select(tier, client), not self.trained
        if chosen.client is not None:
            self.received.load_own(chosen.client, self.personal)
        else:
            self.received.load_mean(chosen.members, self.personal, plain)
        how = self.received.assigned(chosen.members[0], self.personal, plain, own=chosen.client is not None)
        with torch.no_grad(), self.received.receiving(how):
            yield lambda parts: self.received.run_pass(parts, how)


def _execution(spec: RunSpec, adapters: Bank) -> Execution:
    """What the layers read. There is no wave: the bank of one client is all that there is."""
    config, experts = spec.config, spec.expert_layout.num_experts
    pool = Pool(None, 1, experts, 1, merge=spec.shares_passes, shared=True)
    scale = config.adapters.alpha / config.adapters.rank
    return Execution(
        adapters,
        pool,
        scale,
        spec.method.rescaler is not None,
        kernels=config.execution.adapter_kernels,
        layers=list(spec.expert_layout.layers),
        held_softmax=spec.method.held_softmax,
        candidates=spec.method.candidates,
    )


def _adapters_of(folder: str) -> AdapterConfig:
    """What a run would configure that trains what an adapter of PEFT's has adapted."""
    adapter = read_adapter(Path(folder), "adapter")
    parts = [target.partition(".") for target in adapter.targets]
    attention, feed_forward = ([name for part, _, name in parts if part == kind] for kind in ("attention", "feed_forward"))
    return AdapterConfig(
        rank=adapter.rank,
        alpha=adapter.scale * adapter.rank,
        experts=any(part == "experts" for part, _, _ in parts),
        attention=attention,
        feed_forward=feed_forward,
        start=folder,
    )


def _bare_spec(config: Config, foundation: Foundation, device: str) -> RunSpec:
    """A model without adapters, resolved as `resolve_spec` does it for a run."""
    known = foundation.outline
    config = of_loaded_type(config, known)
    check_model(config, known, device)
    layout = hosted_layout(known.layers) if known.layers else empty_layout(known.sites)
    # Any method whose clients receive the model as it is.
    method = load_method(MethodConfig(name="fedit"))
    size = model_size(known.model, known.layers)
    method.facts = facts_of(config, layout, size, known)
    tier = Tier(layout.top_k, 1.0, layout.top_k, config.adapters.rank, layout.num_experts, str(layout.top_k))
    cost = CostModel.of(size, layout, [], positions(known.images))
    kind: str = known.model.config.model_type
    return RunSpec(config, method, device, kind, size, layout, known.images, [tier], [], cost)
