"""What a run of the package gives to the reference (data, batches, draws, budgets), and how the outcomes are compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from every import every
from reference import Adapters, Task

from fedmoe_ds.clients.batches import local_batches
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.pooled import pooled_batches
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.model.install import drawn_a
from fedmoe_ds.randomness import generator

TOLERANCE = 1e-5


def tasks(parts: Parts, round_index: int, buys: str = "top_k", planned: bool = True) -> list[Task]:
    """Every participant's batches, in client order; `buys` is what a tier's budget buys: top_k, rank, both, experts, layers.

    Not `planned`: those of the clients that are drawn, for a reference that plans by itself.
    """
    config = parts.config
    most = parts.spec.expert_layout.top_k
    found = []
    members = parts.planning.of(round_index).participants if planned else parts.participants(round_index)
    for client in members:
        data = parts.training_data.train(client.index)
        owners = parts.clients if parts.spec.method.pooled else [client]  # pooled: the largest budget of all
        batches = pooled(parts, round_index) if parts.spec.method.pooled else own_batches(parts, client, round_index)
        if config.method.name == "wireless-fl":  # as many as a plan may ask for
            steps = len(batches) * parts.spec.method.params.epochs
            batches = local_batches(replace(client, steps=steps), config.local, config.seed, round_index)
        # Of images a replay asks for the number of steps alone.
        samples = list(zip(data.input_ids, data.loss_mask, strict=True)) or [(data.labels, data.labels)] * len(data)
        steps = [[samples[i] for i in batch] for batch in batches]
        rank = client_rank(parts, client)
        found.append(
            Task(
                client.index,
                max(member.top_k for member in owners) if buys in ("top_k", "both") else most,
                client.samples,
                steps,
                rank=rank if buys in ("rank", "both") else None,
                sketch=sketch(parts, client.index, round_index, rank) if config.method.name == "fslora" else None,
                experts=parts.spec.expert_layout.num_experts * client.top_k // most if buys == "experts" else None,
                layers=max(1, parts.spec.size.depth * client.top_k // most) if buys == "layers" else None,
            )
        )
    return found


def own_batches(parts: Parts, client: Client, round_index: int) -> list[np.ndarray]:
    """Sequences of every step: one epoch, at most `max_steps`."""
    local = parts.config.local
    batches = local_batches(client, local, parts.config.seed, round_index)
    steps = -(-client.trained_sequences // local.batch_size)
    # What a plan says is not cut again.
    assert len(batches) == (client.steps or min(steps, local.max_steps or steps))
    return batches


def pooled(parts: Parts, round_index: int) -> list[np.ndarray]:
    """Whole batches of exactly what the participants would train on, in an order that only the package knows."""
    seed, count = parts.config.seed, len(parts.clients)
    drawn = draw(parts, round_index)
    batches = pooled_batches(parts.clients, drawn, parts.config.local, seed, round_index)
    first = np.cumsum([0] + [client.sequences for client in parts.clients])
    wanted = sorted(
        int(i + first[client.index]) for client in drawn for batch in own_batches(parts, client, round_index) for i in batch
    )
    assert count > 1 and sorted(int(i) for batch in batches for i in batch) == wanted
    assert every(len(batch) == parts.config.local.batch_size for batch in batches[:-1])
    return batches


def draw(parts: Parts, round_index: int) -> list[Client]:
    """The participants of a round: without replacement, with chances in proportion to what `sampling` names."""
    federation, clients = parts.config.federation, parts.clients
    mass = np.array([{"uniform": 1, "size": c.samples, "budget": c.top_k}[federation.sampling] for c in clients], dtype=float)
    count = max(1, round(federation.participation * len(clients)))
    chances = None if federation.sampling == "uniform" else mass / mass.sum()
    drawn = generator(parts.config.seed, "participants", round_index).choice(len(clients), count, replace=False, p=chances)
    return [clients[i] for i in sorted(drawn)]


def client_rank(parts: Parts, client: Client) -> int:
    """The LoRA rank of a client's tier, if ranks are what a budget buys."""
    if not parts.spec.expert_layout.num_experts:
        return client.rank
    given = {tier.top_k: tier.rank for tier in parts.config.federation.tiers or []}
    return given.get(client.top_k) or max(1, parts.config.adapters.rank * client.top_k // parts.spec.expert_layout.top_k)


def sketch(parts: Parts, index: int, round_index: int, rank: int) -> list[int]:
    """FSLoRA's random rows."""
    full = parts.config.adapters.rank
    if rank == full:
        return list(range(full))
    drawn = generator(parts.config.seed, "sketch", round_index, index).choice(full, size=rank, replace=False)
    return sorted(int(row) for row in drawn)


def initial(parts: Parts) -> Adapters:
    """Everything that clients start from before the first round, personal or not, but for rescalers."""
    items = parts.state.adapters.items(0, with_personal=True)
    return {key: value.clone().double() for key, spec, value in items if spec.name != "rescaler"}


def fresh(parts: Parts, round_index: int) -> Adapters:
    """A newly drawn A for every adapter."""
    keys = {key: value.shape for key, value in initial(parts).items() if key.endswith("lora_A")}
    return {key: drawn_a(parts.config.seed, key, shape, round_index) for key, shape in keys.items()}


def check_equal(theirs: Adapters, ours: Adapters, relative: float = TOLERANCE, vanish: str = "none") -> tuple[float, float]:
    """Every value within 1e-5, and every kind of adapter, as a vector, within `relative` of its length; returns the largest.

    Kinds that end with `vanish` must be zero on both sides; no other kind may be.
    """
    assert theirs.keys() == ours.keys()
    worst, apart = 0.0, 0.0
    for kind in sorted({kind_of(key) for key in theirs}):
        keys = [key for key in theirs if kind_of(key) == kind]
        expected = torch.cat([theirs[key].flatten() for key in keys])
        found = torch.cat([ours[key].double().flatten() for key in keys])
        if kind.endswith(vanish):
            assert not expected.any() and not found.any(), kind
            continue
        length, difference = float(expected.norm()), found - expected
        assert length > 0, f"{kind} is zero: nothing is compared"
        worst, apart = max(worst, float(difference.abs().max())), max(apart, float(difference.norm()) / length)
        assert worst <= TOLERANCE and apart <= relative, (kind, worst, apart)
    return worst, apart


def kind_of(key: str) -> str:
    return ".".join(part for part in key.split(".") if not part.isdigit())
