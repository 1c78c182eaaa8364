"""Pass context: what the layers of a model read while a pass runs.

A model has one `Execution`; the hosted layers and the adapters of projections hold a reference to it. Nothing here is
global, and nothing about a client is an attribute of a layer: caps, masks, slots and adapters change from pass to pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmoe_ds.kernels.groups import Groups
from fedmoe_ds.kernels.lora_products import Kernels, LowRankProducts, products_for
from fedmoe_ds.kernels.per_client import Segment
from fedmoe_ds.model.adapter_bank import ROUTER_BIAS, Bank
from fedmoe_ds.model.adapter_dropout import AdapterDropout, Drawn
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.expert_masks import ExpertMasks
from fedmoe_ds.model.objective import Objective
from fedmoe_ds.model.packing import PackedSamples
from fedmoe_ds.model.router import Demand, Modulation, Routing
from fedmoe_ds.model.scale_factors import ScaleFactors


@dataclass
class Pass:
    """The rows of one forward pass on one rank.

    Attributes:
        segments: contiguous sequences per client, by home slot.
        slot: the home slot all ranks run in this pass (bitwise mode), None in fast mode.
        slot_T: int64 home slot of each token row.
        cap_T: int64 top-k cap of each token row.
        valid_T: bool, False for padding.
        masks: the experts that clients may use, or None for all.
        rescale_C: fixed factor on the expert output per home slot, or None (FLAME's static rescaler; evaluation of a tier).
        demands: what each client's rows ask of a router; None where nobody counted them.
        packed: where the samples are, if each sequence is one token of a packed pass; None where a sequence is a sample.
        drawn_at: where each segment's dropout is drawn; None in an evaluation, which has none.
        first_trained: the first layer that some client of the pass trains, on any rank: before it there is no backward pass.
        scores_T: float32, of every row its sample's score (`Sequences.scores`), where samples have one.
        counts: routed rows per (home slot, expert), by layer; written by the layers.
        losses: auxiliary loss per home slot, by layer; written by the layers when there is one.
        observed: what the method's `RoutingObserver` summed up per home slot, by layer.
        trained: routed rows that take part in the backward pass, like `counts`; only layers that hold some back write it.
        routed: decisions without gradients, by layer; the layers write them where clients have objectives.
        offered: router probabilities of clients that ask for it, by layer and home slot (`routed_forward.offered`).
        attended: attention that every token row receives, by layer; written where observers ask for it.
        gate_TE: logits of all layers, of a model whose router runs before them; None: layers route.
    """

    segments: list[Segment]
    slot: int | None
    slot_T: Tensor
    cap_T: Tensor
    valid_T: Tensor
    masks: ExpertMasks | None = None
    rescale_C: list[float] | None = None
    demands: list[Demand] | None = None
    packed: PackedSamples | None = None
    drawn_at: list[Drawn] | None = None
    first_trained: int = 0
    scores_T: Tensor | None = None
    counts: dict[int, Tensor] = field(default_factory=dict)
    losses: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    observed: dict[int, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    trained: dict[int, Tensor] = field(default_factory=dict)
    routed: dict[int, Routing] = field(default_factory=dict)
    offered: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    attended: dict[int, Tensor] = field(default_factory=dict)
    gate_TE: Tensor | None = None
    _groups: dict[int, Groups] = field(default_factory=dict)
    _places: list[slice | Tensor] | None = None

    def row_groups(self, rows: int, clients: int) -> Groups:
        """Every home slot's rows in a tensor of `rows` rows; empty for slots without a segment."""
        # All projections of a pass ask for the same groups; they are found once.
        if rows not in self._groups:
            assert rows == len(self.slot_T), (rows, len(self.slot_T))
            # Equal ones are parts of an evaluation, which reads one client's adapters for all of them.
            assert all(a.slot <= b.slot for a, b in itertools.pairwise(self.segments)), (
                "clients stand in the order of their slots"
            )
            # A slot without a segment ends where the one before it does: an empty group, which every kernel skips. They are
            # searched among the rows' slots, which are on the device: a list would have to be sent there.
            slots_C = torch.arange(clients, device=self.slot_T.device)
            self._groups[rows] = Groups(torch.searchsorted(self.slot_T, slots_C, right=True, out_int32=True), rows)
        return self._groups[rows]

    def places(self, rows: int) -> list[slice | Tensor]:
        """Of every segment its token rows without padding, among `rows` of the pass: a slice, or int64 numbers."""
        # All layers of a pass ask for the same.
        if self._places is None:
            self._places = [self._valid_places(at, own) for at, own in enumerate(self.spans(rows))]
        return self._places

    def spans(self, rows: int) -> list[slice]:
        """Of every segment its token rows with padding."""
        # Token rows per sequence: every sequence of a pass is padded to one length.
        width = rows // max(max((seg.stop for seg in self.segments), default=0), 1)
        return [slice(seg.start * width, seg.stop * width) for seg in self.segments]

    def _valid_places(self, at: int, own: slice) -> slice | Tensor:
        # Where members of a client share the pass, demands are theirs, and not those of segments.
        demands = self.demands if len(self.demands or []) == len(self.segments) else None
        valid = None if demands is None else demands[at].rows
        if valid == own.stop - own.start:
            return own
        # With their number known, the host need not wait for a GPU to say it.
        valid_T = self.valid_T[own]
        found_N1 = valid_T.nonzero() if valid is None else valid_T.nonzero_static(size=valid)
        place_N: Tensor = found_N1.squeeze(1) + own.start
        return place_N


@dataclass(frozen=True)
class RoutingObserver:
    """What a method looks at, and decides, in every layer of every training batch of one client.

    All functions see the client's own rows of one batch, without padding (`valid_T` is True for all of them), and are called
    on its home rank only. On a GPU, whatever they read on the host holds up every layer: let results stay tensors.

    Attributes:
        observe: (routing, valid_T) -> (active_E, sums): the experts that this batch may train (bool, None for all), and
            named float [E] tensors that are added up over the round's batches.
        loss: (layer, routing, logits_TE, valid_T) -> auxiliary loss of the layer, or None; the mean over layers is minimised.
        scored: (routing, scores_T) -> auxiliary loss of the layer, like `loss`, of data whose samples have scores: every row
            sees its sample's.
        attended: (routing, attention_T) -> further named sums, of the attention that each token receives in this layer
            (`model/attention_received.py`); with `Method.attends`.
        overlaps: whether `loss` teaches a router before the layers, by `Routing.overlap_TE`; nothing else gives that a
            gradient.
    """

    observe: Callable[[Routing, Tensor], tuple[Tensor | None, dict[str, Tensor]]] | None = None
    loss: Callable[[int, Routing, Tensor, Tensor], Tensor | None] | None = None
    attended: Callable[[Routing, Tensor], dict[str, Tensor]] | None = None
    overlaps: bool = False
    scored: Callable[[Routing, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class InTraining:
    """What holds for the clients of the wave in training, and for no evaluation.

    Attributes:
        observers: by home slot.
        trained: by home slot, the experts that the client trains in every layer, bool [L, E]; others train all.
        objectives: at the model's output, by home slot.
        whole_steps: whether an objective needs all targets of a client's step at once (the same on all ranks).
        selective: whether a batch may train only some of the experts (the same on all ranks).
        attends: whether some observer asks for the attention that tokens receive.
        overlaps: whether some observer teaches a router before the layers.
        wave_factors, home_factors: factor on the LoRA scale per wave slot and per home slot, or None where all are 1.
        offers: home slots whose router probabilities are asked for.
    """

    observers: dict[int, RoutingObserver] = field(default_factory=dict)
    selective: bool = False
    wave_factors: ScaleFactors | None = None
    home_factors: ScaleFactors | None = None
    trained: dict[int, Tensor] = field(default_factory=dict)
    objectives: dict[int, Objective] = field(default_factory=dict)
    whole_steps: bool = False
    offers: frozenset[int] = frozenset()
    attends: bool = False
    overlaps: bool = False


@dataclass
class Execution:
    """Shared by all layers of one model on one rank.

    Attributes:
        bank: adapters of the clients in flight.
        pool: expert-parallel pool and slot counts.
        scale: LoRA scale alpha / rank.
        rescaler: whether the bank's learnable rescaler multiplies the expert output.
        balance, z: coefficients of the auxiliary losses.
        kernels: what computes the adapters' products.
        dropout: of the inputs of projections' adapters in training, if there is any.
        layers: the model's layers with experts, in the order in which masks have them.
        held_softmax: whether routers weigh as if they had no rows of experts that a client may not use.
        candidates: how many experts of a row the routers' bias reaches, where the bank has one.
        wave: what holds for the clients in training; evaluation puts an empty one in its place.
    """

    bank: Bank
    pool: Pool
    scale: float
    rescaler: bool = False
    balance: float = 0.0
    z: float = 0.0
    kernels: Kernels = "auto"
    dropout: AdapterDropout | None = None
    layers: list[int] = field(default_factory=list)
    held_softmax: bool = False
    candidates: int = 0
    # An evaluation sees no observers and no scale factors: the global model belongs to no client.
    wave: InTraining = field(default_factory=InTraining)
    current: Pass | None = None
    products: LowRankProducts | None = None
    # A scalar leaf that requires a gradient, which nobody reads. As an input of the custom functions it keeps them in the graph
    # where their rows need no gradient, so that adapters of the first layer are reached. It lies where the rows do: a gradient
    # that had to come to the host would make it wait.
    anchor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.anchor = torch.zeros((), device=self.bank.device, requires_grad=True)

    def anchor_of(self, layer: int) -> Tensor:
        """The anchor; for a layer before the first that the running pass trains, one that requires no gradient."""
        # Rows need none there either, so nothing of these layers enters the graph: no activation is kept, no product made.
        return self.anchor if layer >= self.running().first_trained else self.anchor.detach()

    def products_for(self, rank: int, dtype: torch.dtype, device: torch.device) -> LowRankProducts:
        """The implementation of the adapters' products for rows of this type, chosen once."""
        if self.products is None:
            self.products = products_for(rank, dtype, device, self.kernels)
        return self.products

    def asked(self, layer: int) -> tuple[Tensor | None, list[Demand] | None, bool]:
        """What the rows of the running pass ask of a layer's router: the experts that each may use, bool [T, E], numbers of the
        same for the host, and `held_softmax`; None for all, and where nobody counted."""
        run = self.running()
        if run.masks is None:
            return None, run.demands, False
        place = self.layers.index(layer)
        demands = None if run.demands is None else run.masks.demands(place, run.demands)
        return run.masks.rows(place), demands, self.held_softmax

    def modulation(self, layer: int) -> Modulation | None:
        """What a layer's router adds to the logits of the running pass's rows; None without a bias."""
        run = self.running()
        # The stand-in row of an idle rank is nobody's, and there may be no slot to read from.
        if ROUTER_BIAS not in self.bank or not run.segments:
            return None
        return Modulation(self.bank.value(ROUTER_BIAS, layer).index_select(0, run.slot_T), self.candidates)

    def running(self) -> Pass:
        assert self.current is not None, "a layer ran outside a pass"
        return self.current
