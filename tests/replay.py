"""Local training in plain float64 from the gradients that the package observed: in the place of `reference.Reference`.

What a forward and a backward pass give is compared elsewhere (`test_reference_methods.py`), model by model and slowly. Here
the gradients of every step are taken from the package before anything changes them, and everything after them is done again:
terms of the method and of the drift correction, clipping, plain SGD steps, control variates, weights, means, server steps.
That takes milliseconds, so that every combination can be asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from every import every
from reference import Adapters, Extra, Select, Task, Trained
from reference_methods import FedIT, Flame, HFedMoE, Returned, cut, padded
from reference_sub_models import Holders
from torch import Tensor

from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.client_work import ClientWork
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.server import BASE
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.model.dispatcher import Pool


def keyed(spec: BlockSpec, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Canonical key and tensor of every item of a block [L, E, *item] or [L, *item]."""
    for i, layer in enumerate(spec.layers):
        if not spec.expert:
            yield spec.key(layer), value[i]
            continue
        yield from ((spec.key(layer, e), value[i, e]) for e in range(value.shape[1]))


class Replay:
    """Listens to the package's rounds; `train` then repeats the one that was trained last."""

    def __init__(self, parts: Parts, lr: float, clip: float) -> None:
        self.lr, self.clip = lr, clip
        self.layers, self.experts = parts.counts_shape
        self.settings: Any = SimpleNamespace(scale=parts.config.adapters.alpha / parts.config.adapters.rank)
        bases = parts.state.server[BASE].items(0) if parts.spec.method.absorbs else ()
        self.frozen = {key.removesuffix(".base"): value.double() for key, _, value in bases}
        self.slopes: dict[int, list[Adapters]] = {}
        self.updates: dict[int, ClientUpdate] = {}
        self.places: dict[int, int] = {}
        self.offers: dict[int, list[Tensor]] = {}
        rules, fold = parts.trainer.hooks, parts.server.fold
        complete = rules.complete

        def completed(training: Sequence[tuple[ClientWork, ClientView]], pool: Pool) -> None:
            for work, view in training:
                self._listen(view)
                self.offers.setdefault(view.client.index, []).extend([] if work.offered is None else [work.offered.clone()])
            complete(training, pool)

        object.__setattr__(rules, "complete", completed)

        def folded(sums: Any, place: int, view: ClientView, update: ClientUpdate) -> None:
            self.updates[update.client.index] = update
            fold(sums, place, view, update)

        parts.server.fold = folded  # type: ignore[method-assign]

    def forget(self) -> None:
        """A new round begins."""
        self.slopes, self.updates, self.offers = {}, {}, {}

    def _listen(self, view: ClientView) -> None:
        found = {key: v.double().clone() for spec in view.blocks() for key, v in keyed(spec, view.grad(spec))}
        self.slopes.setdefault(view.client.index, []).append(found)

    def frozen_weight(self, stem: str) -> Tensor:
        return self.frozen[stem]

    def train(
        self,
        task: Task,
        start: Adapters,
        rescaler: Tensor,
        frozen: Sequence[str] = (),
        scale: float = 1.0,
        extra: Extra | None = None,
        select: Select | None = None,
    ) -> Trained:
        """The same arguments and results as `Reference.train`; the rescaler is one of the adapters here."""
        values = {key: value.double().clone().requires_grad_(not key.endswith(tuple(frozen))) for key, value in start.items()}
        trained = {key: value for key, value in values.items() if value.requires_grad}
        slopes, update = self.slopes[task.index], self.updates[task.index]
        assert len(slopes) == len(task.steps) and every(
            {key for key in step if not key.endswith(tuple(frozen))} == trained.keys() for step in slopes
        )
        for step in slopes:
            for key, value in trained.items():
                rows = task.sketch or list(range(value.shape[1 if key.endswith("lora_B") else 0])) if "lora" in key else []
                value.grad = cut(key, step[key], rows).clone()
                assert torch.equal(padded(key, value.grad, rows, torch.zeros_like(step[key])), step[key]), (
                    "only held rows have one"
                )
            if extra is not None:
                extra(values).backward()
            grads = [value.grad for value in trained.values() if value.grad is not None]
            norm = float(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt())
            with torch.no_grad():
                for value, grad in zip(trained.values(), grads, strict=True):
                    value -= self.lr * min(1.0, self.clip / norm) * grad
        result = {key: value.detach() for key, value in values.items()}
        loss = update.shared_losses[1] if update.shared_losses else math.nan
        first = update.losses[0] if update.losses else math.nan
        return Trained(result, rescaler, update.counts_LE, update.tokens, self.lr * len(slopes), loss, first)


class PersonalFlame(Flame):
    """The learnt rescaler stays with the client."""

    own = ("rescaler",)


class ObservedHFedMoE(HFedMoE):
    """Usage, importance and selection are the package's; who is averaged follows from them."""

    def local(self, task: Task, received: Adapters) -> Trained:
        result = FedIT.local(self, task, received)
        replay: Any = self.reference
        update = replay.updates[task.index]
        usage, importance = update.observed["usage"] / update.tokens, update.observed["importance"] / len(task.steps)
        self.notes = {"usage": usage, "importance": importance, "trained": update.trained_LE > 0}
        return result


class ObservedFedMoE(Holders):
    """Sub-models are the package's plan; holders weigh their data."""

    def holds(self, one: Returned, layer: int, expert: int) -> bool:
        replay: Any = self.reference
        return bool(replay.updates[one.task.index].plan.held_LE[layer, expert])
