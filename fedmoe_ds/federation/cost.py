"""Cost: FLOPs of a client's training, predicted before it and counted after it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedmoe_ds.clients.batches import batch_size, step_count
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.foundation.size import ModelSize
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.model.adapter_moe_layer import ROUTER_SCORE
from fedmoe_ds.model.expert_layout import ExpertLayout
from fedmoe_ds.model.moe_layer import ROUTER


@dataclass(frozen=True)
class CostModel:
    """FLOPs of one token: forward = dense + active experts * expert (FLAME's C(k) = C_dense + k C_expert), adapters apart.

    What counts is the mathematics of a step, 2 FLOPs per multiply-add: a product forward, again backward for the gradient of
    its input, and again for the gradient of its weights where these are trained (LoRA rows, whole experts, adapter experts,
    routers). An expert that a batch does not train has no backward pass, nor
    have the layers before the first that a client trains. The output matrix counts on every row. What does not
    count: slots of experts that add nothing, attention scores, the input embedding (a look-up), padding, LoRA rows that a
    client does not hold though kernels compute them, and the second forward pass of activation checkpointing.

    Attributes:
        dense, expert: weights outside the experts, and of one active expert in every layer.
        head: those of `dense` that come after the last layer.
        depth: layers of the model, with experts or without.
        real_share: of a row's slots, how many are expected to have an expert that computes something.
        ensembles: whether a client trains as many models side by side as its budget has experts (`Method.ensembles`).
        dense_row, expert_row: one LoRA row (rank 1) on all dense adapters, and on one active expert in every layer.
        layers: mixture layers, over which routed rows are counted; 0 where there are no experts, and no routed rows.
        positions: token rows per token of the data (images: rows per image).
        dense_weights, expert_weights: the gradients of those of the weights that are trained themselves.
        owned: the further layers, which clients train whole: the `dense_weights` of a model that has some.
        head_weights: that of a trained head.
        head_alone: whether nothing else is trained; then there is no backward pass through the layers.
    """

    dense: float
    expert: float
    dense_row: float = 0.0
    expert_row: float = 0.0
    layers: int = 1
    positions: int = 1
    dense_weights: float = 0.0
    expert_weights: float = 0.0
    head: float = 0.0
    depth: int = 1
    ensembles: bool = False
    real_share: float = 1.0
    owned: tuple[int, ...] = ()
    head_weights: float = 0.0
    head_alone: bool = False

    @classmethod
    def of(
        cls,
        model: ModelSize,
        expert_layout: ExpertLayout,
        blocks: Iterable[BlockSpec] = (),
        positions: int = 1,
        ensembles: bool = False,
    ) -> CostModel:
        """Of a run that trains these blocks. Routers of adapter experts are no part of the model: they are added to it."""
        expert = 2.0 * expert_layout.matrices * expert_layout.width * expert_layout.ffn * len(expert_layout.layers)
        # Keyed by whether a block belongs to experts.
        rows, weights, owned = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}, tuple[int, ...]()
        blocks = [*blocks]
        for spec in blocks:
            owned = spec.layers if spec.owned else owned
            if spec.rank_axis is not None:
                # Per LoRA row: its length is the item's other axis. 2 FLOPs for each of its numbers.
                rows[spec.expert] += 2.0 * len(spec.layers) * spec.item[1 - spec.rank_axis]
            # Vectors (the rescaler) cost nothing next to matrices.
            elif spec.trained and len(spec.item) > 1 and not spec.after_layers:
                # A router that decides once per sample sees one row of it.
                seen = positions if expert_layout.per_sample and spec.name in (ROUTER, ROUTER_SCORE) else 1
                weights[spec.expert] += 2.0 * len(spec.layers) * math.prod(spec.item) / seen
        # The input embedding is a look-up, no product; tied to the output matrix it is one all the same.
        dense = 2.0 * max(model.head_and_body, 1)
        # Further layers are part of the model already.
        dense += weights[False] if model.experts == 0 and not owned else 0.0
        head = 2.0 * model.vocabulary * model.hidden
        layers, depth = len(expert_layout.layers), max(model.depth, 1)
        trained = (rows[False], rows[True], layers, positions, weights[False], weights[True])
        heads = [spec for spec in blocks if spec.after_layers]
        head_weights = sum(2.0 * math.prod(spec.item) for spec in heads if len(spec.item) > 1)
        head_alone = bool(heads) and all(spec.after_layers for spec in blocks if spec.trained)
        own = (expert_layout.real_share, owned, head_weights, head_alone)
        return cls(dense, expert, *trained, head, depth, ensembles, *own)

    def forward(self, cap: float, rank: int) -> float:
        """FLOPs of one token's forward pass with `cap` slots for experts and adapters of this rank."""
        return self.dense + rank * self.dense_row + cap * self.real_share * (self.expert + rank * self.expert_row)

    def forward_of(self, tokens: float, routed: float, rank: int) -> float:
        """FLOPs of the forward pass of so many rows with so many (row, expert) slots over all layers."""
        dense = tokens * (self.dense + rank * self.dense_row)
        return dense + routed / max(self.layers, 1) * (self.expert + rank * self.expert_row)

    def spent(
        self,
        tokens: float,
        routed: float,
        trained: float,
        rank: int,
        trained_layers: int | None = None,
        blocks: int | None = None,
        trains_head: bool = True,
    ) -> float:
        """FLOPs of a client's training: forward, the gradient of every activation, and that of everything trained.

        Args:
            tokens: token rows it trained on.
            routed, trained: (row, expert) slots over all layers that were computed, and that took part in the backward pass.
            trained_layers: how many layers, the last ones, the backward pass goes through; None: all.
            blocks: how many further layers are trained, of a model that has some; None: all.
            trains_head: whether it trains its head, where clients have one.
        """
        layers = max(self.layers, 1)
        forward, backward = routed / layers, trained / layers
        # Layers are taken to be alike; what comes before the first of them is a look-up, or little (patches of images).
        share = 0.0 if self.head_alone else 1.0 if trained_layers is None else trained_layers / self.depth
        back = self.head + share * (self.dense - self.head) + (self.head_weights if trains_head else 0.0)
        # LoRA rows take three products: forward, the gradient of the input, and their own.
        whole = share if not self.owned else 1.0 if blocks is None else blocks / len(self.owned)
        dense = tokens * (self.dense + back + whole * self.dense_weights + (1 + 2 * share) * rank * self.dense_row)
        lora = rank * self.expert_row
        return dense + forward * (self.expert + lora) + backward * (self.expert + self.expert_weights + 2 * lora)

    def counted(self, update: ClientUpdate, rank: int, layers: Sequence[int]) -> float:
        """FLOPs of a client's training, with its gradient probe and rollouts, counted after it; `rank` is that of the adapters,
        `layers` are those with experts."""
        first = update.assignment.first_trained
        # Rows of the layers before it were routed, and no gradient of theirs is needed: a device would not compute it.
        trained_LE = update.trained_LE[[layer >= first for layer in layers]]
        routed, trained, own = int(update.counts_LE.sum()), int(trained_LE.sum()), update.assignment.rank(rank)
        trained_N = update.assignment.trained_N
        blocks = None if trained_N is None else int(trained_N[list(self.owned)].sum())
        told = (self.depth - first, blocks, update.assignment.trains_head)
        spent = self.spent(update.tokens, routed, trained, own, *told)
        if (probed := update.probed) is not None:
            rows = int(probed.counts_LE.sum())
            spent += self.spent(probed.tokens, rows, rows, own)
        return spent + update.client.rollouts * self.forward_of(update.tokens, routed, own)

    def models(self, client: Client) -> int:
        """How many models a client trains, or is served, side by side: every row passes through all of them."""
        return client.experts if self.ensembles else 1

    def client(self, client: Client, local: LocalConfig) -> float:
        """Predicted FLOPs of one client in one round, all of its routed rows trained."""
        # Rows and not targets: of an instruction's tokens few are targets, and how few differs tenfold between tasks.
        # A mean: the schedule knows sizes, not the batches.
        per_sequence = client.token_rows / client.sequences
        tokens = step_count(client, local) * batch_size(client, local) * per_sequence * self.positions * self.models(client)
        routed = tokens * client.cap * self.real_share * self.layers
        trained = routed if client.layers is None else routed * client.layers / self.depth
        probed = client.probed * per_sequence * self.positions * self.models(client)
        rows = probed * client.cap * self.real_share * self.layers
        # Which further layers it will train nobody knows: the backward pass is taken to go through all.
        training = self.spent(tokens, routed, trained, client.rank, client.layers, client.blocks)
        training += self.spent(probed, rows, rows, client.rank)
        return training + client.rollouts * self.forward_of(tokens, routed, client.rank)
