"""Build: from a configuration to the parts of a run, in the order in which mistakes can be told.

First what needs nothing (method, layout), then the foundation, the data, the tiers, and only then memory for adapters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmoe_ds import state as states
from fedmoe_ds.adapters.bank import Bank, BlockSpec
from fedmoe_ds.adapters.layout import adapter_blocks, initial_bank, install
from fedmoe_ds.aggregation.statistics import Statistics
from fedmoe_ds.clients.client import Client, make_clients, resolve_tiers
from fedmoe_ds.clients.schedule import CostModel, home_clients, participant_count
from fedmoe_ds.clients.wave import ClientRules, WaveTrainer
from fedmoe_ds.config import Config, dump_config
from fedmoe_ds.data import FederatedData
from fedmoe_ds.data import prepare as prepare_data
from fedmoe_ds.errors import UserError
from fedmoe_ds.evaluation import Evaluator
from fedmoe_ds.experts.dispatch import Pool
from fedmoe_ds.experts.execution import Execution
from fedmoe_ds.foundation import Foundation, load_foundation, resolve_foundation
from fedmoe_ds.foundation.foundation import cache_folder
from fedmoe_ds.foundation.size import model_size
from fedmoe_ds.methods import Method, load_method, with_defaults
from fedmoe_ds.report import Progress
from fedmoe_ds.runtime import Runtime
from fedmoe_ds.stop import StopRequest
from fedmoe_ds.topology import Topology


@dataclass
class Parts:
    """Everything a `Federation` works with, on one rank."""

    config: Config
    runtime: Runtime
    topology: Topology
    method: Method
    foundation: Foundation
    data: FederatedData
    clients: list[Client]
    tiers: list[int]
    blocks: list[BlockSpec]
    execution: Execution
    trainer: WaveTrainer
    evaluator: Evaluator
    state: states.State
    cost: CostModel
    identity: dict[str, Any]
    config_text: str
    checkpoints: Path
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def total_samples(self) -> int:
        return sum(client.samples for client in self.clients)

    @property
    def local_experts(self) -> int:
        return len(self.foundation.layers[0].experts)

    @property
    def first_expert(self) -> int:
        return self.foundation.layers[0].experts.start

    def new_statistics(self) -> Statistics:
        """Empty sums for one round."""
        return Statistics(self.blocks, self.local_experts, not self.execution.pool.merge, self.runtime.device)


def is_bitwise(config: Config, runtime: Runtime) -> bool:
    """Whether this run promises equal bits on any topology."""
    mode = config.execution.reproducible
    return mode == "bitwise" or (mode == "auto" and runtime.device.type == "cpu")


def load_parts(config: Config, runtime: Runtime, topology: Topology, progress: Progress) -> Parts:
    """Load everything. Raises UserError, the same one on every rank, for whatever the user can fix."""
    method = load_method(config.method)
    config = with_defaults(config, method)
    foundation = load_shared_foundation(config, runtime, topology, progress)
    method.check(foundation.top_k, bool(foundation.layers[0].module.router.route_norm))
    data = load_shared_data(config, runtime, foundation)
    tiers = resolve_tiers(config.federation, foundation.top_k)
    clients = make_clients(data, config.federation, tiers, config.seed)
    return _assemble(config, runtime, topology, method, foundation, data, clients)


def load_shared_foundation(config: Config, runtime: Runtime, topology: Topology, progress: Progress) -> Foundation:
    """Rank 0 finds or pre-trains the model; then every rank loads its part."""
    folder = runtime.on_main(lambda: str(resolve_foundation(config.foundation, config.seed, progress.note)))
    layout = topology.layout
    return runtime.together(
        lambda: load_foundation(Path(folder), config.foundation, layout.ep_size, topology.shard, runtime.device)
    )


def load_shared_data(config: Config, runtime: Runtime, foundation: Foundation) -> FederatedData:
    """Rank 0 tokenises and partitions; every rank maps the result and reads its own clients' rows."""
    folder = cache_folder(config.foundation) / "data"
    path = runtime.on_main(lambda: str(prepare_data(config.data, config.seed, foundation.tokenizer, folder).path))
    return runtime.together(lambda: FederatedData.open(path))


def _assemble(
    config: Config,
    runtime: Runtime,
    topology: Topology,
    method: Method,
    foundation: Foundation,
    data: FederatedData,
    clients: list[Client],
) -> Parts:
    blocks = adapter_blocks(foundation.model, foundation.layers, config.adapters, method.rescaler)
    execution = _execution(config, runtime, topology, method, foundation, blocks, len(clients))
    install(foundation, config.adapters, execution)
    if config.execution.activation_checkpointing:
        enable_checkpointing(foundation)
    adapters = initial_bank(foundation, blocks, config.seed, foundation.layers[0].experts.start, runtime.device)
    personal = states.initial_personal(blocks, [method.initial_rescaler(c, foundation.top_k) for c in clients])
    trainer = WaveTrainer(
        foundation,
        execution,
        config.local,
        config.execution,
        topology.shard,
        config.seed,
        runtime.device,
        ClientRules(
            rescale=lambda client: method.fixed_rescale(client.top_k, foundation.top_k),
            allowed=lambda client: method.allowed_experts(client, foundation.num_experts),
        ),
    )
    tiers = sorted({client.top_k for client in clients}, reverse=True)
    evaluator = Evaluator(foundation, execution, runtime, adapters, data, clients, tiers, method, config.evaluation)
    return Parts(
        config=config,
        runtime=runtime,
        topology=topology,
        method=method,
        foundation=foundation,
        data=data,
        clients=clients,
        tiers=tiers,
        blocks=blocks,
        execution=execution,
        trainer=trainer,
        evaluator=evaluator,
        state=states.State(0, adapters, personal),
        cost=CostModel.of(model_size(foundation.model, foundation.layers)),
        identity=identity(config, foundation, data),
        config_text=dump_config(config),
        checkpoints=Path(config.output) / config.name / "checkpoints",
    )


def _execution(
    config: Config,
    runtime: Runtime,
    topology: Topology,
    method: Method,
    foundation: Foundation,
    blocks: list[BlockSpec],
    clients: int,
) -> Execution:
    layout, bitwise = topology.layout, is_bitwise(config, runtime)
    if bitwise and config.execution.threads > 1:
        raise UserError(
            f"execution.threads: {config.execution.threads}: bitwise mode needs 1: threads cut a kernel's work in the middle "
            "of a row; use threads=1, or reproducible=fast"
        )
    if bitwise and (foundation.hidden_size % 4 or foundation.layers[0].ffn_hidden_size % 4):
        raise UserError(
            f"execution.reproducible: bitwise: the model's widths {foundation.hidden_size} and "
            f"{foundation.layers[0].ffn_hidden_size} must be multiples of 4 (rows must start on 16 bytes); use fast"
        )
    drawn = participant_count(clients, config.federation.participation)
    home = home_clients(config.execution.clients_in_flight, drawn, layout.ep_size)
    pool = Pool(topology.ep_group, layout.ep_size, foundation.num_experts, home, merge=not bitwise)
    bank = Bank(blocks, foundation.num_experts // layout.ep_size, home, pool.wave_clients, runtime.device)
    scale = config.adapters.alpha / config.adapters.rank
    return Execution(bank, pool, scale, method.rescaler is not None, config.local.balance_loss, config.local.z_loss)


def enable_checkpointing(foundation: Foundation) -> None:
    """Recompute each decoder layer in the backward pass. Only the layers' own switch is set: nothing else enters train mode."""
    model: Any = foundation.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", None) is True:
            module.training = True


def identity(config: Config, foundation: Foundation, data: FederatedData) -> dict[str, Any]:
    """What must agree for one run to continue another: everything that decides the result, and nothing that does not."""
    tree = json.loads(config.model_dump_json())
    sections = {name: tree[name] for name in ("seed", "adapters", "local", "method")}
    sections["federation"] = {key: value for key, value in tree["federation"].items() if key != "rounds"}
    return {"foundation": foundation.fingerprint, "data": data.fingerprint, **sections}
