"""In training: what the layers and the output are told of the clients of a wave."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmoe_ds.clients.client_work import ClientWork
from fedmoe_ds.clients.hooks import LocalTrainingHooks
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.pass_context import InTraining
from fedmoe_ds.model.scale_factors import ScaleFactors


def in_training(
    works: Sequence[Sequence[ClientWork]], shard: int, hooks: LocalTrainingHooks, pool: Pool, device: torch.device
) -> InTraining:
    """What is told to those of one rank of a cluster; `works` are the clients of the wave by their home's."""
    factors = [1.0] * pool.wave_clients
    for home, there in enumerate(works):
        for work in there:
            factors[pool.wave_slot(home, work.slot)] = work.assignment.scale
    plain = all(factor == 1.0 for factor in factors)
    mine = works[shard]
    found = {work.slot: hooks.observer(work.client, work.assignment) for work in mine}
    trained = {work.slot: mask_LE for work in mine if (mask_LE := work.assignment.trained_LE) is not None}
    # A client of another rank that trains some of its experts makes this rank take the second trip, too.
    some = any(work.assignment.trained_LE is not None for there in works for work in there)
    ask = hooks.objective
    objectives = {} if ask is None else {work.slot: ask(work.client, work.assignment) for work in mine}
    return InTraining(
        {slot: observer for slot, observer in found.items() if observer is not None},
        hooks.selective or some,
        None if plain else ScaleFactors(factors),
        None if plain else ScaleFactors(factors[pool.slots.span(shard)]),
        {slot: torch.from_numpy(mask_LE).to(device) for slot, mask_LE in trained.items()},
        objectives={slot: objective for slot, objective in objectives.items() if objective is not None},
        whole_steps=hooks.whole_steps,
        offers=frozenset(work.slot for work in mine if work.assignment.pseudo is not None),
        attends=any(observer is not None and observer.attended is not None for observer in found.values()),
        overlaps=any(observer is not None and observer.overlaps for observer in found.values()),
    )
