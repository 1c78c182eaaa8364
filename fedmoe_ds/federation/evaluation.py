"""Evaluation: perplexity, next-token accuracy and task metrics of the global model at every budget tier.

Batches are cut before they are dealt to ranks, and per-batch sums are added in batch order, so the figures do not depend on the
topology. Every rank runs the same number of passes; one without a batch joins with a stand-in row. Small hold-outs of
clients share a pass wherever clients in training do, and the sums of each are those of a pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmoe_ds.checkpoint.personal_state import Personal
from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client, tiers_of
from fedmoe_ds.data import Sequences
from fedmoe_ds.data.answers import AnswerData
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.federation.evaluation_passes import most_together, passes
from fedmoe_ds.federation.generation import Generation, as_text, greedy
from fedmoe_ds.federation.received_model import ReceivedModel
from fedmoe_ds.federation.run_spec import RunSpec
from fedmoe_ds.federation.task_metrics import TaskMetrics
from fedmoe_ds.foundation.context_length import longest_sequence
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.client_slots import ClientSlots
from fedmoe_ds.model.forward import AdaptedModel

ReadPart = Callable[[], Sequences]
"""Reads what one row of figures is about: a batch of the global hold-out, or what is scored of one client's."""
SUMS = 5
"""Rows of the sums over a part: negative log-likelihood, right targets, targets, samples, tokens; those of the task metrics
follow, one for each: how many samples it counts as right."""


@dataclass(frozen=True)
class Score:
    """One evaluation row of the tier `label` (see `fedmoe_ds.clients.tiers`), whose top-k is `tier`.

    Loss is the mean negative log-likelihood per target, in nats; it and the accuracy are NaN where there is no target.
    `metrics`: of each task metric that is asked for, the share of the `samples` that it counts as right. `tokens` are the rows
    that the blocks see of them.
    """

    tier: int
    label: str
    split: str
    loss: float
    accuracy: float
    targets: int
    client: str | None = None
    samples: int = 0
    tokens: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        # exp(709.8) is the largest that a float64 holds; a diverged run has a huge perplexity, not an error.
        return math.exp(min(self.loss, 700.0))


def pooled(member: Client, split: str, sums_KN: Tensor, names: Iterable[str], client: str | None = None) -> Score:
    """Pool the sums of batches into one row of the tier that `member` is of; `names` are those of the task metrics."""
    nll, correct, targets, samples, tokens, *right = (float(value) for value in sums_KN.sum(1))
    loss, accuracy = (nll / targets, correct / targets) if targets else (math.nan, math.nan)
    metrics = {name: count / samples if samples else math.nan for name, count in zip(names, right, strict=True)}
    return Score(member.top_k, member.tier, split, loss, accuracy, int(targets), client, int(samples), int(tokens), metrics)


@dataclass(frozen=True)
class _Row:
    """A row to be, with this rank's part of its sums: [K, batches], zeros for batches of other ranks."""

    member: Client
    split: str
    sums_KN: Tensor
    client: str | None = None


class Evaluator(ReceivedModel):
    """Scores the global adapters at each tier: as a client receives them whose budget is what the tier's clients began with.

    What clients changed about their budgets on the way (HetLoRA's pruned ranks) does not count: the tier stays what it was.

    Args:
        spec: method and evaluation settings.
        model: with the adapters of clients in flight.
        bank: the global adapters (one client slot, no gradients); in the model only while an evaluation runs.
        data: what is scored: a global hold-out, and clients' own.
        clients: all clients; a tier's personal state is the mean over its clients.
        in_flight: clients in flight on a cluster at most (`wave_slots`), the same number on every rank.
    """

    def __init__(
        self,
        spec: RunSpec,
        model: AdaptedModel,
        runtime: Runtime,
        bank: Bank,
        data: AnswerData,
        clients: Sequence[Client],
        in_flight: int,
    ) -> None:
        super().__init__(spec.method, model, bank)
        self.runtime, self.data, self.clients, self.tiers = runtime, data, clients, tiers_of(clients)
        self.config, self.shares_passes = spec.config.evaluation, spec.shares_passes
        # Not the slots that this rank really has: idle clusters have none, and ranks cut alike.
        self.together = most_together(spec.config, ClientSlots(in_flight, model.execution.pool.ep_size).most)
        self.tasks = TaskMetrics.of(self.config, model.foundation, data, runtime, spec.method.views)

    def scores(self, personal: Personal, per_client: bool, plain: bool, tiers: Collection[str] | None = None) -> list[Score]:
        """Rows for every tier, or those named: split `global`, and with `per_client` also `client` (one each) and `clients` (of
        all together).

        `plain` evaluates the foundation itself: no rescaler. Where clients keep models of their own, every client's model is
        scored, at its own tier: `global` pools those of a tier on the global hold-out, `clients` each on its own.
        """
        rows = list[_Row]()
        owners = [client for client in self.clients if len(self.data.holdout(client.index))] if per_client else []
        owning = {client.index for client in owners}
        for members in (members for label, members in self.tiers.items() if tiers is None or label in tiers):
            how = self.assigned(members[0], personal, plain)
            if not self.method.personal_models:
                rows += self._tier_rows(members, how, personal, owners, plain)
                continue
            # A client's own model exists at its own tier only; the foundation is scored there for the same clients.
            own = [client for client in members if client.index in owning]
            if plain:
                rows += self._tier_rows(members, how, personal, own, plain)
            else:
                rows += self._personal_rows(members, how, personal, own)
        return self._summed(rows)

    def _summed(self, rows: list[_Row]) -> list[Score]:
        """The rows of all ranks, in one message: disjoint entries, so adding zeros is exact."""
        if not rows:
            return []
        total_KN = self.runtime.control.sum(torch.cat([row.sums_KN for row in rows], 1))
        each = torch.split(total_KN, [row.sums_KN.shape[1] for row in rows], 1)
        names = self.tasks.names
        return [
            pooled(row.member, row.split, sums_KN.contiguous(), names, row.client)
            for row, sums_KN in zip(rows, each, strict=True)
        ]

    @torch.no_grad()
    def generations(self, personal: Personal, plain: bool) -> list[Generation]:
        """Greedy answers to the first samples of the global hold-out by the model of the largest tier, the same on every rank.

        Where clients keep models of their own it is that of the tier's first client.
        """
        held = self.data.global_holdout()
        count = min(self.config.generations, len(held))
        if not count:
            return []
        member, *_ = members = next(iter(self.tiers.values()))
        own = self.method.personal_models and not plain
        if own:
            self.load_own(member, personal)
        else:
            self.load_mean(members, personal, plain)
        part = held.select(range(count))
        found = self._generated(part, self.assigned(member, personal, plain))
        whose = {"tier": member.top_k, "label": member.tier, "client": member.name if own else None}
        return as_text(part, self.tasks.answers(part), found, self.model.foundation.tokenizer, whose)

    def _generated(self, part: Sequences, how: Assignment) -> list[list[int]]:
        """The tokens of every sample's answer. Batches are dealt to ranks as those of `_run`."""
        size, world = self.config.batch_size, self.runtime.world_size
        longest = longest_sequence(self.model.foundation.model.config)
        found: dict[str, list[int]] = {}
        with self.receiving(how):
            for turn in range(math.ceil(len(part) / (size * world))):
                first = (turn * world + self.runtime.rank) * size
                mine = part.select(range(min(first, len(part)), min(first + size, len(part))))
                answers = greedy(
                    mine,
                    self.tasks.answers(mine),
                    self.config.max_new_tokens,
                    longest,
                    lambda asked: self.run_pass(asked, how),
                    lambda here: self.runtime.any(here)[0],
                )
                found |= {str(first + i): tokens for i, tokens in enumerate(answers)}
        everyone = {place: tokens for ours in self.runtime.gather(found) for place, tokens in ours.items()}
        return [everyone[str(place)] for place in range(len(part))]

    def _tier_rows(
        self, members: Sequence[Client], how: Assignment, personal: Personal, owners: Sequence[Client], plain: bool
    ) -> list[_Row]:
        """One model for the tier: global adapters, personal blocks at the mean over its clients."""
        self.load_mean(members, personal, plain)
        rows = [_Row(members[0], "global", self._run(*self._global_parts(), how))]
        if owners:
            sums_KN = self._run(*self._client_parts(owners), how)
            rows.append(_Row(members[0], "clients", sums_KN))
            rows += [_Row(members[0], "client", sums_KN[:, i : i + 1], c.name) for i, c in enumerate(owners)]
        return rows

    def _personal_rows(
        self, members: Sequence[Client], how: Assignment, personal: Personal, owners: Sequence[Client]
    ) -> list[_Row]:
        """One model per client; each is scored on the global hold-out, and on its own client's."""
        shared, own = [], {}
        parts, _ = self._global_parts()
        scored = {client.index for client in owners}
        untrained_KN: Tensor | None = None
        for client in members:
            last = [self.client_part(client)] if client.index in scored else []
            # Clients that were never trained have one model: the first of them speaks for all.
            alike = personal.begins_as_all(client.index, self.own_blocks(personal)) and client.index not in personal.memories
            # What is known of one client may tell it to do what no other does.
            how = self.assigned(client, personal, plain=False) if personal.memories else how
            spoken_KN = untrained_KN if alike else None
            first = parts if spoken_KN is None else []
            sums_KN = self._own_sums(client, personal, [*first, *last], how)
            shared.append(sums_KN[:, : len(first)] if spoken_KN is None else spoken_KN)
            untrained_KN = shared[-1] if alike else untrained_KN
            if last:
                own[client.name] = sums_KN[:, len(first) :]
        rows = [_Row(members[0], "global", torch.cat(shared, 1))]
        if own:
            rows.append(_Row(members[0], "clients", torch.cat(list(own.values()), 1)))
            rows += [_Row(members[0], "client", sums_KN, name) for name, sums_KN in own.items()]
        return rows

    def _own_sums(self, client: Client, personal: Personal, parts: list[ReadPart], how: Assignment) -> Tensor:
        """[K, N parts] by a client's own model, a pass each; its own hold-out comes last: ranks without a batch of the global
        one have time for it."""
        if not parts:
            return self._no_sums(0)
        self.load_own(client, personal)
        return self._run(parts, [[place] for place in range(len(parts))], how)

    def _no_sums(self, parts: int) -> Tensor:
        return torch.zeros(SUMS + len(self.tasks.names), parts, dtype=torch.float64)

    def _global_parts(self) -> tuple[list[ReadPart], list[list[int]]]:
        """Batches of the global hold-out, a pass each."""
        parts = self.batches(self.data.global_holdout(), self.config.max_sequences)
        return parts, [[place] for place in range(len(parts))]

    def batches(self, held: Sequences, most: int | None = None) -> list[ReadPart]:
        """The first `most` samples, or all of them, a batch each."""
        count, size = len(held) if most is None else min(len(held), most), self.config.batch_size
        # The default binds `start` now; without it all batches would read the last slice.
        return [
            lambda s=start: held.select(range(s, min(s + size, count)))  # type: ignore[misc]
            for start in range(0, count, size)
        ]

    def client_part(self, client: Client) -> ReadPart:
        """What is scored of a client's own hold-out."""
        most = self.config.client_sequences
        return lambda: (held := self.data.holdout(client.index)).select(range(min(most, len(held))))

    def _client_parts(self, owners: Sequence[Client]) -> tuple[list[ReadPart], list[list[int]]]:
        """What is scored of each client, several of them in a pass where that changes no bit."""
        parts = [self.client_part(client) for client in owners]
        return parts, self._cut(parts)

    def _cut(self, parts: list[ReadPart]) -> list[list[int]]:
        if not self.shares_passes:
            return [[place] for place in range(len(parts))]
        own = [part() for part in parts]  # views of a memory map
        longest = [max(map(len, sequences.input_ids), default=0) for sequences in own]
        return passes([len(sequences) for sequences in own], longest, self.together)

    def owner_scores(self, member: Client, owners: Mapping[str, list[ReadPart]], how: Assignment) -> list[Score]:
        """Rows of split `client`, one for each owner of samples, by the model that is loaded; `member` is of its tier."""
        parts = [part for own in owners.values() for part in own]
        found = torch.split(self._run(parts, self._cut(parts), how), [len(own) for own in owners.values()], 1)
        return self._summed([_Row(member, "client", sums_KN, name) for name, sums_KN in zip(owners, found, strict=True)])

    @torch.no_grad()
    def _run(self, parts: list[ReadPart], cut: list[list[int]], how: Assignment) -> Tensor:
        """[K, N parts]: this rank's part of the sums under one assignment; `cut` says which parts share a pass."""
        sums_KN = self._no_sums(len(parts))
        world, rank = self.runtime.world_size, self.runtime.rank
        with self.receiving(how):
            # Every rank runs every turn, with or without a batch: the layers' all-to-alls need all of the cluster.
            for turn in range(math.ceil(len(cut) / world)):
                place = turn * world + rank
                mine = cut[place] if place < len(cut) else []
                sums_KN[:, mine] = self._score([parts[at]() for at in mine], how)
        return sums_KN

    def _score(self, parts: list[Sequences], how: Assignment) -> Tensor:
        """[K, parts]: the sums of the parts of one pass; a rank without any takes part in the same passes."""
        result = self.run_pass(parts, how)
        right_MB = self.tasks.right(parts, result, lambda asked: self.run_pass(asked, how))
        by_part = [torch.split(values_N, result.targets) for values_N in (result.nll_N.double(), result.correct_N)]
        sums_KP = self._no_sums(len(parts))
        first, positions = 0, 1 if self.model.foundation.images is None else self.model.foundation.images.positions
        for place, (part, nll, correct) in enumerate(zip(parts, *by_part, strict=True)):
            right = [sum(right_B[first : first + len(part)]) for right_B in right_MB]
            figures = [float(nll.sum()), int(correct.sum()), len(correct), len(part), part.row_count() * positions, *right]
            sums_KP[:, place] = torch.tensor(figures, dtype=torch.float64)
            first += len(part)
        return sums_KP
