"""Rows travel while shared experts, or the products of their other half, are computed, in both directions; between two ranks
nothing of the result changes.

The ranks are threads here, so that both are seen at once; `test_logits` and `test_topologies` have processes. Legend: see
`fedmoe_ds.model.expert_pass`.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from every import every
from test_dispatcher import CLIENTS, EXPERTS, WIDTH, random_routing, segments, weights
from test_foundation import FAMILIES, VOCAB, save_model
from test_logits import Hosted, rows_of
from torch import Tensor

from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.model import dispatcher, expert_pass
from fedmoe_ds.model import experts as ffn
from fedmoe_ds.model.client_slots import ClientSlots
from fedmoe_ds.model.dispatcher import Pool, make_plan
from fedmoe_ds.model.expert_pass import send_to_experts
from fedmoe_ds.model.experts import FrozenExperts
from fedmoe_ds.model.router import Routing

FORWARD = ["set out", "set out", "shared", "arrived", "arrived", "set out", "arrived"]
"""Rows and weights to their experts, results home."""
BACKWARD = ["set out", "arrived", "set out", "set out", "shared", "arrived", "arrived"]
"""Gradients of results to the experts, those of weights and rows home."""


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_shared_experts_are_computed_meanwhile(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(FAMILIES[family][0](), tmp_path / family, **FAMILIES[family][1])
    train_tokenizer(["import this"], VOCAB).save_pretrained(tmp_path / family)
    hosted = Hosted(tmp_path / family, 1, 0, merge=True)
    done: list[str] = []
    note_travels(done, monkeypatch)
    layer = hosted.foundation.layers[-1].module

    def shared(module: Any, given: Any, result: Tensor) -> None:
        done.append("shared")
        result.register_hook(lambda grad: done.append("shared"))

    layer.shared_experts.register_forward_hook(shared)
    logits, _, _ = hosted.logits([rows_of(0, client, hosted.foundation.top_k) for client in range(CLIENTS)], None)
    assert done[-len(FORWARD) :] == FORWARD
    done.clear()
    logits.sum().backward()
    assert done[: len(BACKWARD)] == BACKWARD


def note_travels(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    way, home = expert_pass._Travel, expert_pass._WayHome
    for owner, name in ((way, "to_experts"), (way, "arrived"), (home, "sets_out"), (home, "arrived")):
        what = "arrived" if name == "arrived" else "set out"
        monkeypatch.setattr(owner, name, noted(getattr(owner, name), what, done))


def noted(real: Callable[..., Any], what: str, done: list[str]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        done.append(what)
        return real(*arguments)

    return call


class Meeting:
    """Two ranks that exchange rows; each is a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here = threading.local()
        self.done: tuple[list[str], list[str]] = ([], [])
        self.mail: dict[tuple[int, int, int], queue.Queue[Tensor]] = {}
        self.begun = [0, 0]
        meeting = self

        class Exchange:
            def __init__(
                self, rows: Tensor, group: Any, receive: list[int], send: list[int], output: Tensor | None = None
            ) -> None:
                self.receive = receive
                self.output = rows.new_full((sum(receive), *rows.shape[1:]), float("nan")) if output is None else output
                assert self.output.is_contiguous() and len(self.output) == sum(receive)
                self.number = meeting.post(list(torch.split(rows, send)))
                meeting.note("set-out")

            def wait(self) -> Tensor:
                parts = meeting.collect(self.number)
                assert [len(part) for part in parts] == self.receive
                meeting.note("arrived")
                return self.output.copy_(torch.cat(parts))

        def all_to_all(output: Tensor, rows: Tensor, group: Any) -> None:
            output.copy_(torch.stack(meeting.collect(meeting.post(list(rows.unbind(0))))))

        monkeypatch.setattr(expert_pass, "Exchange", Exchange)
        monkeypatch.setattr(dispatcher, "all_to_all", all_to_all)

    def note(self, what: str) -> None:
        self.done[self.here.rank].append(what)

    def post(self, parts: list[Tensor]) -> int:
        """Begin an exchange; both ranks begin the same ones in the same order. Returns its number."""
        number = self.begun[self.here.rank]
        self.begun[self.here.rank] += 1
        for peer, part in enumerate(parts):
            self._between(self.here.rank, peer, number).put(part.clone())
        return number

    def collect(self, number: int) -> list[Tensor]:
        return [self._between(peer, self.here.rank, number).get(timeout=30.0) for peer in (0, 1)]

    def _between(self, sender: int, receiver: int, number: int) -> queue.Queue[Tensor]:
        return self.mail.setdefault((sender, receiver, number), queue.Queue())

    def run(self, work: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
        """What both ranks return."""
        found: dict[int, Any] = {}

        def rank(number: int) -> None:
            self.here.rank = number
            try:
                found[number] = work(number)
            except BaseException as error:
                found[number] = error
                raise

        threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        assert every(isinstance(found[number], list) for number in (0, 1)), found
        return [found[0], found[1]]


@dataclass
class Noting:
    """Experts that say when they compute."""

    experts: FrozenExperts
    note: Callable[[str], None]

    def forward(self, *arguments: Any) -> tuple[Tensor, ffn.Saved]:
        self.note("products")
        return self.experts.forward(*arguments)

    def backward(self, *arguments: Any) -> tuple[Tensor | None, Tensor]:
        self.note("products")
        return self.experts.backward(*arguments)


TRIP = {
    False: "set-out set-out arrived arrived products set-out arrived "  # forward
    "set-out arrived products set-out set-out arrived arrived",
    True: "set-out set-out set-out set-out arrived arrived products set-out arrived arrived products set-out arrived arrived "
    "set-out set-out arrived products set-out set-out arrived products set-out set-out arrived arrived arrived arrived",
}
"""Of a layer whose rows travel whole, or in halves: while the first half's products are computed the second half is under way,
and while the second half's are what the first put out is."""


@pytest.mark.parametrize("in_flight", [2 * CLIENTS, 2 * CLIENTS - 1], ids=["full", "a slot less"])
@pytest.mark.parametrize("slot", [None, 1], ids=["all clients", "one client"])
@pytest.mark.parametrize("in_halves", [False, True], ids=["whole", "halves"])
def test_two_ranks_are_one(in_halves: bool, slot: int | None, in_flight: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, gradients of rows, weights and adapters, to the bit; what is computed meanwhile runs in between.

    With a slot less rank 0 has one client at home and rank 1 two: in the second client's pass rank 0 has no row of its own.
    Halves are unequal: a rank holds three experts.
    """
    meeting = Meeting(monkeypatch)
    w13, w2, lora = weights()
    slots = ClientSlots(in_flight, 2)

    def one_layer(rank: int, pool: Pool, local: slice, clients: slice) -> list[Tensor]:
        routing, slot_T = random_routing(rank), segments() if slot is None else torch.full((len(segments()),), slot)
        if slots.at_home[rank] == 1:
            slot_T = torch.zeros_like(slot_T)
            routing.kept_TK[:] &= slot is None
        draw = torch.Generator().manual_seed(7 + rank)
        x_TD, dy_TD = (torch.randn(len(slot_T), WIDTH, generator=draw) for _ in range(2))
        x_TD, p_TK = x_TD.requires_grad_(), routing.weights_TK.clone().requires_grad_()
        values = [value[local][:, clients].contiguous() for value in (lora.a13, lora.b13, lora.a2, lora.b2)]
        grads = [torch.zeros_like(value) for value in values]
        own = Routing(routing.probs_TE, p_TK, routing.experts_TK, routing.kept_TK, int(routing.kept_TK.sum()))
        plan = make_plan(own, slot_T, slot, pool)
        at_experts = send_to_experts(x_TD, own, torch.zeros((), requires_grad=True), plan, pool)
        meanwhile_TD = x_TD * 0.5
        layer = FrozenExperts(w13[local].contiguous(), w2[local].contiguous(), ffn.Lora(*values, grads, 2.0, lora.products))
        y_TD = at_experts(layer if pool.ep_size == 1 else Noting(layer, meeting.note)) + meanwhile_TD
        y_TD.backward(dy_TD)
        assert x_TD.grad is not None and p_TK.grad is not None
        return [y_TD.detach(), x_TD.grad, p_TK.grad, *grads]

    half = EXPERTS // 2
    # Adapters of both ranks' clients, [E, C, ...]: a rank holds its experts' of all clients.
    wave = torch.cat([torch.arange(count) for count in slots.at_home])
    lora = ffn.Lora(*(value[:, wave] for value in (lora.a13, lora.b13, lora.a2, lora.b2)), [], 2.0, lora.products)
    merge = slot is None
    together = meeting.run(
        lambda rank: one_layer(
            rank,
            Pool(None, 2, EXPERTS, in_flight, merge, shard=rank, in_halves=in_halves),
            slice(rank * half, rank * half + half),
            slice(0, in_flight),
        )
    )
    for done in meeting.done:
        # In one client's pass the rows of every peer go through products of their own.
        assert re.sub("(products )+", "products ", " ".join(done)) == TRIP[in_halves]
    for rank in (0, 1) if in_flight == 2 * CLIENTS or merge else (1,):
        mine = slots.span(rank)
        alone = one_layer(rank, Pool(None, 1, EXPERTS, slots.at_home[rank], merge), slice(0, EXPERTS), mine)
        for ours, theirs in zip(together[rank][:3], alone[:3], strict=True):
            assert torch.equal(ours, theirs)
        for place, theirs in enumerate(alone[3:], 3):
            ours = torch.cat([part[place][:, mine] for part in together])
            assert bool(theirs.any()) and torch.equal(ours, theirs)
