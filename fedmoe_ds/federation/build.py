"""Build: from a configuration to the parts of a run, in the order in which mistakes can be told.

First what needs nothing (method, layout), then the foundation, the data, the tiers, and only then memory for adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedmoe_ds.aggregation.round_sums import RoundSums
from fedmoe_ds.checkpoint.client_homes import Homes
from fedmoe_ds.checkpoint.client_rows import Slabs
from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.checkpoint.skipped_clients import SkippedClients
from fedmoe_ds.checkpoint.skipped_clients import read_lines as read_skipped
from fedmoe_ds.checkpoint.state import State
from fedmoe_ds.clients.batches import Packing
from fedmoe_ds.clients.client import Client, Population, make_clients, tiers_of
from fedmoe_ds.clients.hooks import TrainingData
from fedmoe_ds.clients.host_moments import check_moments_on
from fedmoe_ds.clients.local_training import WaveTrainer
from fedmoe_ds.clients.pooled import PooledData
from fedmoe_ds.config import Config, dump_config
from fedmoe_ds.data import FederatedData
from fedmoe_ds.data import prepare as prepare_data
from fedmoe_ds.devices import read_sources
from fedmoe_ds.distributed.long_work import LongWork
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.distributed.topology import Topology
from fedmoe_ds.federation import continuation
from fedmoe_ds.federation.agreement import check_same_contents
from fedmoe_ds.federation.best_round import check_best_tier
from fedmoe_ds.federation.evaluation import Evaluator
from fedmoe_ds.federation.execution import adapted_model, enable_checkpointing, execution_of
from fedmoe_ds.federation.identity import identity, memory_settings
from fedmoe_ds.federation.kernel_identity import agreed, check_code, code_of, kernels_of
from fedmoe_ds.federation.privacy_account import check_at_hand
from fedmoe_ds.federation.round_planning import RoundPlanning
from fedmoe_ds.federation.run_spec import RunSpec, check_promise, check_start, resolve_spec
from fedmoe_ds.federation.schedule import participants_per_round, wave_slots
from fedmoe_ds.federation.sequence_checks import check_packed_samples
from fedmoe_ds.federation.server import BASE, Server
from fedmoe_ds.federation.start_source import Source
from fedmoe_ds.federation.training_hooks import training_hooks
from fedmoe_ds.federation.virtual_clock import VirtualClock, virtual_clock
from fedmoe_ds.federation.warm_start import WarmStart, begin_from, locate, open_start
from fedmoe_ds.foundation import Foundation, conversion, file_sums, host_sharing, resolve_foundation
from fedmoe_ds.foundation.fingerprint import shared_fingerprint
from fedmoe_ds.foundation.foundation import assemble, cache_folder, open_skeleton
from fedmoe_ds.foundation.own_code import told
from fedmoe_ds.kernels.frozen_layers import row_dtype
from fedmoe_ds.kernels.lora_products import check_kernels
from fedmoe_ds.methods.client_drift import client_variables
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.install import initial_bank
from fedmoe_ds.model.pass_context import Execution
from fedmoe_ds.report import Progress


@dataclass
class Parts:
    """Everything a `Federation` works with, on one rank.

    `training_data` are what rounds train on: the clients' own, or those of one client that has all where the method pools them.
    `in_flight` are the clients that any cluster trains at once. `start` says what the adapters began as, where unusual; `clock`
    is that of simulated devices.
    """

    spec: RunSpec
    runtime: Runtime
    topology: Topology
    foundation: Foundation
    data: FederatedData
    training_data: TrainingData
    clients: Population
    in_flight: int
    execution: Execution
    trainer: WaveTrainer
    evaluator: Evaluator
    server: Server
    state: State
    planning: RoundPlanning
    identity: dict[str, Any]
    config_text: str
    checkpoints: Path
    skipped: SkippedClients
    start: WarmStart | None = None
    clock: VirtualClock | None = None
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def config(self) -> Config:
        """What the user configured, with the method's own defaults."""
        return self.spec.config

    @property
    def first_expert(self) -> int:
        return self.spec.expert_layout.held.start

    @property
    def counts_shape(self) -> tuple[int, int]:
        """(layers, experts) of everything that is counted per expert."""
        return len(self.spec.expert_layout.layers), self.spec.expert_layout.num_experts

    def participants(self, round_index: int) -> list[Client]:
        """The clients that are drawn for a round, in canonical order."""
        return _drawn(self.spec, self.clients, self.state, self.clock, round_index)

    def send_down(self, numbers: int) -> None:
        """Clients of the next round receive products of so many numbers, where the method chooses their rank."""
        self.state.sent_down = numbers
        if self.clock is not None:
            self.clock.traffic.products = numbers

    def new_sums(self, round_index: int = 1) -> RoundSums:
        """Empty sums for one round."""
        return self.server.new_sums(len(self.participants(round_index)), self.runtime.device)

    def result_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the run has learnt, by canonical name (this rank's part): global adapters, merged weights."""
        for bank in (self.state.adapters, self.state.server.get(BASE)):
            if bank is not None:
                yield from ((key, value) for key, _, value in bank.items(self.first_expert))

    def own_hashes(self) -> dict[str, str]:
        """For the digest: sha256 of the clients' own models, by canonical name (this rank's part). Collective."""
        if not self.spec.method.personal_models:
            return {}
        # Control and dual variables and other untrained client state are means to an end, not a result.
        trained = [name for name, spec in self.state.personal.specs.items() if spec.trained]
        return {f"personal.{key}": value for key, value in self.state.personal.hashes(trained).items()}


def _drawn(
    spec: RunSpec, clients: Sequence[Client], state: State, clock: VirtualClock | None, round_index: int
) -> list[Client]:
    """The clients that are drawn for a round: of simulated devices, those that will arrive."""
    return spec.participants_among(clients, round_index) if clock is None else clock.participants(state.clock, round_index)


def load_parts(
    config: Config,
    runtime: Runtime,
    topology: Topology,
    progress: Progress,
    stop: StopRequest | None = None,
    resume: str | None = None,
) -> Parts:
    """Load everything. `stop` is asked on the way, and by the rounds that follow; `resume`: the checkpoint to be restored.

    Raises:
        UserError: the same one on every rank, for whatever the user can fix.
        StopError: on every rank, where one was asked to stop before everything was loaded.
    """
    stop, device = stop or StopRequest(), runtime.device
    check_promise(config, device.type)
    check_moments_on(config.execution, device.type)
    host_sharing.check_mapped(config.foundation, device.type)
    before: dict[str, str] = {} if resume is None else runtime.run_on_rank0(lambda: continuation.read(Path(resume)))
    config, method = check_start(continuation.with_type(config, before), device.type)
    runtime.run_on_all_ranks(lambda: check_kernels(config.execution.adapter_kernels, config.adapters.rank, device))
    runtime.run_on_all_ranks(lambda: check_at_hand(config.privacy))
    devices = runtime.run_on_all_ranks(lambda: read_sources(config.devices))
    start, unread = runtime.run_on_rank0(lambda: locate(config.adapters.start, resume))
    foundation = load_shared_foundation(config, runtime, topology, progress, stop)
    spec = resolve_spec(config, method, device.type, foundation.outline, topology.layout.ep_size, topology.shard)
    spec = continuation.with_products(spec, row_dtype(foundation.model), device, before)
    continuation.take_class(spec, runtime, before)
    source = runtime.run_on_all_ranks(lambda: None if start is None else open_start(Path(start), spec, foundation.fingerprint))
    data = load_shared_data(config, runtime, foundation, stop, progress.note)
    check_packed_samples(config, data.reading.get("template"))
    clients = make_clients(data, config.federation, spec.tiers, config.seed)
    spec.know(clients)
    check_best_tier(config.checkpoint, tiers_of(clients))
    clock = runtime.run_on_all_ranks(lambda: virtual_clock(spec, clients, devices))
    parts = _assemble(spec, runtime, topology, foundation, data, clients, source, unread, clock)
    parts.stop = stop
    return parts


def load_shared_foundation(
    config: Config, runtime: Runtime, topology: Topology, progress: Progress, stop: StopRequest | None = None
) -> Foundation:
    """Rank 0 finds or pre-trains the model; then every rank loads its part, into memory that ranks of one host share."""
    work, trust = LongWork(runtime, stop or StopRequest()), config.foundation.trust_remote_code
    # One writer of the cache: the other ranks would pre-train the same model beside it.
    folder = work.run_on_rank0(lambda: str(resolve_foundation(config.foundation, config.seed, progress.note)))
    for line in work.run_on_all_ranks(lambda: (told(Path(folder), trust), conversion.told(Path(folder)))):
        if line is not None:
            progress.note(line)
    ep_size, hosts, device = topology.layout.ep_size, topology.hosts, runtime.device
    skeleton = work.run_on_all_ranks(lambda: open_skeleton(folder, config.foundation, ep_size, topology.shard, device.type))
    sums = work.run_on_all_ranks(lambda: cache_folder(config.foundation, file_sums.KIND))  # it may refuse: on all ranks
    digest = shared_fingerprint(skeleton.folder, sums, hosts, work)
    if device.type != "cpu":
        # A device's memory is its own, so there is nothing that ranks of a host could share.
        return work.run_on_all_ranks(lambda: assemble(skeleton, skeleton.load(device), digest, device, trust))
    shared = work.run_on_all_ranks(lambda: cache_folder(config.foundation, host_sharing.FOLDER))
    everything = config.foundation.mapped == "all"
    memory = host_sharing.load_shared(skeleton, digest, ep_size, hosts, shared, work, progress.note, sums, everything)
    return work.run_on_all_ranks(lambda: assemble(skeleton, memory, digest, device, trust))


def load_shared_data(
    config: Config, runtime: Runtime, foundation: Foundation, stop: StopRequest, note: Callable[[str], None] | None = None
) -> FederatedData:
    """Rank 0 tokenises and partitions; every rank maps the result and reads its own clients' rows."""
    work, tokenizer, code = LongWork(runtime, stop), foundation.tokenizer, foundation.code

    def prepared() -> str:
        folder = cache_folder(config.foundation, "data")
        return str(prepare_data(config.data, config.seed, tokenizer, folder, code, note, config.federation.tier_column).path)

    # A path and not the data: the store is mapped, so ranks of a host share its pages.
    path = work.run_on_rank0(prepared)
    return work.run_on_all_ranks(lambda: FederatedData.open(path))


def _assemble(
    spec: RunSpec,
    runtime: Runtime,
    topology: Topology,
    foundation: Foundation,
    data: FederatedData,
    clients: Population,
    source: Source | None,
    unread: str | None,
    clock: VirtualClock | None,
) -> Parts:
    config, method, blocks, device = spec.config, spec.method, spec.blocks, runtime.device
    in_flight = wave_slots(spec, clients, topology.layout.clusters)
    # Clusters that no client of any round comes to hold no adapters in flight.
    is_idle = topology.cluster >= participants_per_round(spec, len(clients))
    execution = execution_of(spec, topology, 0 if is_idle else in_flight, device)
    model = adapted_model(spec, foundation, execution)
    if config.execution.activation_checkpointing:
        enable_checkpointing(foundation)
    zero_head = config.adapters.head_start == "zero"
    adapters = initial_bank(foundation, blocks, config.seed, spec.expert_layout.held, device, zero_head)
    server = Server(spec, foundation, clients)
    own = server.initial_state(device)
    # Before personal blocks are made: they begin as the global ones.
    begun = begin_from(source, spec, adapters, own.get(BASE), runtime, unread)
    server.past.begin(adapters, own)
    if source is not None:
        server.load_base(own)
    state = State(0, adapters, initial_personal(spec, adapters, clients, Homes.of(topology, device), client_slabs(config)), own)
    state.personal.allow_peers(runtime)
    drawn = partial(_drawn, spec, clients, state, clock)
    planning = RoundPlanning(spec, clients, state.personal, drawn, data.label_counts, clock)
    micro, hooks = config.execution.micro_batch_size, training_hooks(spec, state, clients, planning, clock)
    training_data: TrainingData = PooledData(data) if method.pooled else data
    packing = Packing(data.sequence_length, training_data.train_lengths) if config.execution.packing else None
    layers, rounds = spec.expert_layout.layers, config.federation.rounds
    on_host = config.execution.moments_on == "host"
    trainer = WaveTrainer(model, layers, config.local, micro, config.seed, hooks, rounds, packing, on_host)
    kernels = kernels_of(config, foundation, blocks, device, spec.bitwise)
    same = agreed(runtime.gather(kernels), topology.hosts, spec.bitwise)
    began, trace = None if begun is None else begun.digest, None if clock is None else clock.fleet.digest
    ours = identity(config, foundation, data, same, spec.bitwise, began, trace)
    # After kernels_of: that loads the kernels whose code is compared here.
    check_code(runtime.gather(code_of(device)), topology.hosts, spec.bitwise)
    check_same_contents(ours, runtime, topology.hosts)
    folder = Path(config.output) / config.name
    return Parts(
        spec=spec,
        runtime=runtime,
        topology=topology,
        foundation=foundation,
        data=data,
        training_data=training_data,
        clients=clients,
        in_flight=in_flight,
        execution=execution,
        trainer=trainer,
        evaluator=Evaluator(spec, model, runtime, adapters, data, clients, in_flight),
        server=server,
        state=state,
        planning=planning,
        identity=ours,
        config_text=dump_config(config),
        checkpoints=folder / "checkpoints",
        skipped=SkippedClients(folder, memory_settings(config, ours), runtime.run_on_rank0(lambda: read_skipped(folder))),
        start=begun,
        clock=clock,
    )


def client_slabs(config: Config) -> Slabs:
    """The memory of what clients keep for themselves, and the files for what is beyond."""
    return Slabs(int(config.execution.client_state_gib * 2**30), lambda: cache_folder(config.foundation, "scratch"))


def initial_personal(
    spec: RunSpec, adapters: Bank, clients: Sequence[Client], homes: Homes | None = None, slabs: Slabs | None = None
) -> Personal:
    """Personal blocks of the bank, the method's client state, and what a correction of drift keeps; the method is asked for
    the first two alone."""
    blocks, method = spec.blocks, spec.method
    own = [block for block in blocks if block.personal] + method.client_state(blocks)
    variables = client_variables(spec.config.local, blocks)
    zero = {block.name for block in variables}

    def common(block: BlockSpec) -> Tensor | float:
        # What is not in the model begins at zero, as control variates (SCAFFOLD, algorithm 1) and dual variables do.
        name = block.name if block.name in adapters else None if block.name in zero else method.begins_as(block)
        return 0.0 if name is None else adapters.client(name, 0).cpu()

    def initial(block: BlockSpec, index: int) -> float | None:
        return None if block.name in zero else method.initial(block, clients[index])

    return Personal(own + variables, adapters.experts, len(clients), common, initial, homes, slabs)
