"""Build: from a configuration to the parts of a run, in the order in which mistakes can be told.

First what needs nothing (method, layout), then the foundation, the data, the tiers, and only then memory for adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedmoe_ds import state as states
from fedmoe_ds.absences import Absences
from fedmoe_ds.absences import read_lines as read_absences
from fedmoe_ds.adapters.bank import Bank, BlockSpec
from fedmoe_ds.adapters.layout import adapter_blocks, initial_bank, install
from fedmoe_ds.aggregation.sums import RoundSums
from fedmoe_ds.clients.client import Capacity, Client, make_clients, resolve_tiers
from fedmoe_ds.clients.drift import FedProx, Scaffold, control_block, shared_blocks
from fedmoe_ds.clients.pooled import PooledData, pooled_batches, pooled_client
from fedmoe_ds.clients.rules import ClientRules, TrainingData
from fedmoe_ds.clients.schedule import CostModel, home_clients, participant_count, participants
from fedmoe_ds.clients.wave import WaveTrainer
from fedmoe_ds.config import Config, dump_config
from fedmoe_ds.data import FederatedData, check_task
from fedmoe_ds.data import prepare as prepare_data
from fedmoe_ds.evaluation import Evaluator
from fedmoe_ds.experts.attending import attend_apart
from fedmoe_ds.experts.dispatch import Pool
from fedmoe_ds.experts.execution import Execution
from fedmoe_ds.experts.lowrank import check_kernels
from fedmoe_ds.experts.places import Places
from fedmoe_ds.fit import check_length, check_plan, check_widths, facts_of, find_places, is_bitwise, positions, shares_passes
from fedmoe_ds.foundation import (
    Foundation,
    load_foundation,
    resolve_foundation,
    sharing,
)
from fedmoe_ds.foundation.foundation import assemble, cache_folder, fingerprint, open_skeleton
from fedmoe_ds.foundation.own_code import told
from fedmoe_ds.foundation.size import model_size
from fedmoe_ds.identity import agreed, check_code, code_of, identity, kernels_of, memory_settings
from fedmoe_ds.long_work import LongWork
from fedmoe_ds.methods import Method, Situation, method_for, with_defaults
from fedmoe_ds.personal import Personal
from fedmoe_ds.report import Progress
from fedmoe_ds.runtime import Runtime
from fedmoe_ds.server import BASE, CONTROL, Server
from fedmoe_ds.stop import StopRequest
from fedmoe_ds.topology import Topology


@dataclass
class Parts:
    """Everything a `Federation` works with, on one rank.

    `training_data` are what rounds train on: the clients' own, or those of one client that has all where the method pools them.
    """

    config: Config
    runtime: Runtime
    topology: Topology
    method: Method
    foundation: Foundation
    places: Places
    data: FederatedData
    training_data: TrainingData
    clients: list[Client]
    blocks: list[BlockSpec]
    execution: Execution
    trainer: WaveTrainer
    evaluator: Evaluator
    server: Server
    state: states.State
    cost: CostModel
    identity: dict[str, Any]
    config_text: str
    checkpoints: Path
    absences: Absences
    stop: StopRequest

    @property
    def local_experts(self) -> int:
        return len(self.places.held)

    @property
    def first_expert(self) -> int:
        return self.places.held.start

    @property
    def counts_shape(self) -> tuple[int, int]:
        """(layers, experts) of everything that is counted per expert."""
        return len(self.places.layers), self.places.num_experts

    def participants(self, round_index: int) -> list[Client]:
        """The clients of a round, in canonical order."""
        federation = self.config.federation
        members = participants(self.clients, federation.participation, self.config.seed, round_index, federation.sampling)
        if self.method.pooled:
            return [pooled_client(self.clients, members, self.config.local, self.config.seed, round_index)]
        return members

    def new_sums(self, round_index: int = 1) -> RoundSums:
        """Empty sums for one round."""
        return self.server.new_sums(len(self.participants(round_index)), self.runtime.device)

    def result_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the run has learnt, by canonical name (this rank's part): global adapters, merged weights, personal models."""
        for bank in (self.state.adapters, self.state.server.get(BASE)):
            if bank is not None:
                yield from ((key, value) for key, _, value in bank.items(self.first_expert))
        if self.method.personal_models:
            for key, spec, value in self.state.personal.items(self.first_expert):
                if spec.trained:
                    yield f"personal.{key}", value


def load_parts(
    config: Config, runtime: Runtime, topology: Topology, progress: Progress, stop: StopRequest | None = None
) -> Parts:
    """Load everything. `stop` is asked on the way, and by the rounds that follow.

    Raises:
        UserError: the same one on every rank, for whatever the user can fix.
        StopError: on every rank, where one was asked to stop before everything was loaded.
    """
    stop = stop or StopRequest()
    method = method_for(config)
    config = with_defaults(config, method)
    check_plan(config, is_bitwise(config, runtime))
    runtime.together(lambda: check_kernels(config.execution.adapter_kernels, config.adapters.rank, runtime.device))
    foundation = load_shared_foundation(config, runtime, topology, progress, stop)
    check_task(foundation.task, config.data, foundation.images)
    check_length(config, foundation.model.config)
    places = find_places(config, foundation.layers, foundation.sites, topology.shard)
    if is_bitwise(config, runtime):
        check_widths(places)
    full = Capacity(places.top_k, config.adapters.rank, places.num_experts)
    method.facts = facts_of(config, places)
    method.check(method.facts)
    data = load_shared_data(config, runtime, foundation, stop)
    tiers = resolve_tiers(config.federation, full, method.spends)
    clients = make_clients(data, config.federation, tiers, config.seed)
    return _assemble(config, runtime, topology, method, foundation, places, data, clients, stop)


def load_shared_foundation(
    config: Config, runtime: Runtime, topology: Topology, progress: Progress, stop: StopRequest | None = None
) -> Foundation:
    """Rank 0 finds or pre-trains the model; then every rank loads its part, into memory that ranks of one host share."""
    work, trust = LongWork(runtime, stop or StopRequest()), config.foundation.trust_remote_code
    folder = work.on_main(lambda: str(resolve_foundation(config.foundation, config.seed, progress.note)))
    if (line := work.together(lambda: told(Path(folder), trust))) is not None:
        progress.note(line)
    ep_size, hosts, device = topology.layout.ep_size, topology.hosts, runtime.device
    if device.type != "cpu":
        return work.together(lambda: load_foundation(folder, config.foundation, ep_size, topology.shard, device))
    skeleton = work.together(lambda: open_skeleton(folder, config.foundation, ep_size, topology.shard))
    first = hosts.index(hosts[runtime.rank])  # reads all weights to tell them from others, for its host
    digest = runtime.gather(work.together(lambda: fingerprint(skeleton.folder) if runtime.rank == first else ""))[first]
    shared = work.together(lambda: cache_folder(config.foundation, sharing.FOLDER))
    memory = sharing.load_shared(skeleton, digest, ep_size, hosts, shared, work, progress.note)
    return work.together(lambda: assemble(skeleton, memory, digest, device, trust))


def load_shared_data(config: Config, runtime: Runtime, foundation: Foundation, stop: StopRequest) -> FederatedData:
    """Rank 0 tokenises and partitions; every rank maps the result and reads its own clients' rows."""
    work, tokenizer, code = LongWork(runtime, stop), foundation.tokenizer, foundation.code

    def prepared() -> str:
        folder = cache_folder(config.foundation, "data")
        return str(prepare_data(config.data, config.seed, tokenizer, folder, code).path)

    path = work.on_main(prepared)
    return work.together(lambda: FederatedData.open(path))


def _assemble(
    config: Config,
    runtime: Runtime,
    topology: Topology,
    method: Method,
    foundation: Foundation,
    places: Places,
    data: FederatedData,
    clients: list[Client],
    stop: StopRequest,
) -> Parts:
    blocks = method.blocks(adapter_blocks(foundation.model, places, config.adapters, method.rescaler))
    training_data: TrainingData = PooledData(data) if method.pooled else data
    model: Any = foundation.model
    bitwise = is_bitwise(config, runtime)
    shared = shares_passes(bitwise, model.config.model_type, config, runtime.device.type)
    execution = _execution(config, runtime, topology, method, places, blocks, 1 if method.pooled else len(clients), shared)
    install(foundation, config.adapters, execution)
    if bitwise and shared:
        attend_apart(model, execution)
    if config.execution.activation_checkpointing:
        enable_checkpointing(foundation)
    adapters = initial_bank(foundation, blocks, config.seed, places.held, runtime.device)
    personal = _personal(method, blocks, adapters, clients, config)
    server = Server(config, method, blocks, foundation, places, clients, exact=bitwise)
    state = states.State(0, adapters, personal, server.initial_state(runtime.device))
    trainer = WaveTrainer(
        foundation,
        places.layers,
        execution,
        config.local,
        config.execution,
        topology.shard,
        config.seed,
        runtime.device,
        client_rules(config, method, state, clients),
    )
    kernels = kernels_of(config, foundation, blocks, runtime.device, bitwise)
    ours = identity(config, foundation, data, agreed(runtime.gather(kernels), topology.hosts, bitwise), bitwise)
    check_code(runtime.gather(code_of(runtime.device)), topology.hosts, bitwise)
    folder = Path(config.output) / config.name
    evaluator = Evaluator(foundation, execution, runtime, adapters, data, clients, method, config.evaluation)
    return Parts(
        config=config,
        runtime=runtime,
        topology=topology,
        method=method,
        foundation=foundation,
        places=places,
        data=data,
        training_data=training_data,
        clients=clients,
        blocks=blocks,
        execution=execution,
        trainer=trainer,
        evaluator=evaluator,
        server=server,
        state=state,
        cost=CostModel.of(model_size(foundation.model, foundation.layers), places, blocks, positions(foundation.images)),
        identity=ours,
        config_text=dump_config(config),
        checkpoints=folder / "checkpoints",
        absences=Absences(folder, memory_settings(config, ours), runtime.on_main(lambda: read_absences(folder))),
        stop=stop,
    )


def _personal(method: Method, blocks: list[BlockSpec], adapters: Bank, clients: list[Client], config: Config) -> Personal:
    """Personal blocks of the bank, the method's memory, and control variates; the method is asked for the first two alone."""
    own = [spec for spec in blocks if spec.personal] + method.memory(blocks)
    controls = [control_block(spec) for spec in shared_blocks(blocks)] if config.local.drift == "scaffold" else []
    zero = {spec.name for spec in controls}

    def initial(spec: BlockSpec, index: int) -> Tensor | float:
        if spec.name in zero:
            return 0.0  # SCAFFOLD, algorithm 1: c_i = 0
        value = method.initial(spec, clients[index])
        if value is not None:
            return value
        return adapters.client(spec.name, 0).cpu() if spec.name in adapters else 0.0

    return Personal(own + controls, adapters.experts, len(clients), initial)


def client_rules(config: Config, method: Method, state: states.State, clients: list[Client]) -> ClientRules:
    """What the method and the correction of drift prescribe, bound to the state of the run."""

    def situation(client: Client, round_index: int) -> Situation:
        return Situation(round_index, state.personal.dense(client.index), state.utilisation_LE)

    def pooled(client: Client, round_index: int) -> list[np.ndarray]:
        federation = config.federation
        members = participants(clients, federation.participation, config.seed, round_index, federation.sampling)
        return pooled_batches(clients, members, config.local, config.seed, round_index)

    drift = {
        "none": None,
        "fedprox": FedProx(config.local.proximal),
        "scaffold": Scaffold(state.server[CONTROL]) if config.local.drift == "scaffold" else None,
    }[config.local.drift]
    adjusts = [method.adjust] if type(method).adjust is not Method.adjust else []
    return ClientRules(
        assign=lambda client, round_index: method.assign(client, situation(client, round_index)),
        watch=lambda client, assignment: method.watch(client, assignment, situation(client, state.round + 1)),
        observes=method.observes,
        adjust=(*adjusts, drift.adjust) if drift is not None else tuple(adjusts),
        measure=method.measure,
        remember=(drift.remember,) if isinstance(drift, Scaffold) else (),
        selective=method.selective,
        batches=pooled if method.pooled else None,
    )


def _execution(
    config: Config,
    runtime: Runtime,
    topology: Topology,
    method: Method,
    places: Places,
    blocks: list[BlockSpec],
    clients: int,
    shared: bool,
) -> Execution:
    layout = topology.layout
    drawn = participant_count(clients, config.federation.participation)
    home = home_clients(config.execution.clients_in_flight, drawn, layout.ep_size)
    pool = Pool(topology.ep_group, layout.ep_size, places.num_experts, home, merge=shared)
    bank = Bank(blocks, places.num_experts // layout.ep_size, home, pool.wave_clients, runtime.device)
    return Execution(
        bank,
        pool,
        scale=config.adapters.alpha / config.adapters.rank,
        rescaler=method.rescaler is not None,
        balance=config.local.balance_loss,
        z=config.local.z_loss,
        kernels=config.execution.adapter_kernels,
    )


def enable_checkpointing(foundation: Foundation) -> None:
    """Recompute each decoder layer in the backward pass. Only the layers' own switch is set: nothing else enters train mode."""
    model: Any = foundation.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", None) is True:
            module.training = True
