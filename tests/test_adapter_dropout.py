"""Adapter dropout: draws belong to their address alone, PEFT computes the same from the same mask, evaluation has none.

That no topology, wave, micro-batch, recomputation or resume changes a bit is in test_topologies.py, test_micro_batches.py and
test_methods_resume.py, whose runs have dropout. Legend: T rows, D and O widths, R rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fedmoe_ds.config import Config, idle_keys
from fedmoe_ds.kernels.per_client import Segment
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec
from fedmoe_ds.model.adapter_dropout import AdapterDropout, Address, Drawn
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.lora_linear import ClientLoRALinear, Projection
from fedmoe_ds.model.pass_context import Execution, Pass

CPU = torch.device("cpu")
WIDTH = 12
HERE = (3, "attention.q_proj")
AT: Address = (1, 7, 0, 0)


def segments_of(counts: list[int], longest: list[int]) -> list[Segment]:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [Segment(i, end - count, end, n) for i, (count, end, n) in enumerate(zip(counts, ends, longest, strict=True))]


def kept(dropout: AdapterDropout, drawn: list[Drawn], length: int, packed: bool = False) -> Tensor:
    """[T, D] of a pass with these clients, padded to a length, or packed."""
    counts = [sum(one.lengths) if packed else len(one.lengths) for one in drawn]
    segments = segments_of(counts, [max(one.lengths) for one in drawn])
    return dropout.kept(segments, drawn, HERE, torch.Size([sum(counts) * (1 if packed else length), WIDTH]), CPU)


@settings(max_examples=60)
@given(st.data())
def test_draws_belong_to_their_address(data: st.DataObject) -> None:
    """Whatever else is in the pass, however long it is, packed or not, and however the step is cut."""
    dropout = AdapterDropout(data.draw(st.floats(0.01, 0.99)), seed=data.draw(st.integers(0, 5)))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    whole = kept(dropout, [Drawn(AT, lengths)], 9).view(-1, 9, WIDTH)
    other = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    first, length = data.draw(st.integers(0, len(lengths) - 1)), data.draw(st.integers(9, 12))
    drawn = [Drawn((1, 2, 0, 0), other), Drawn((*AT[:3], first), lengths[first:])]
    padded = kept(dropout, drawn, length).view(-1, length, WIDTH)[len(other) :]
    packed = kept(dropout, drawn, 1, packed=True)[sum(other) :].split(lengths[first:])
    for place, (one, count) in enumerate(zip(packed, lengths[first:], strict=True)):
        assert torch.equal(padded[place, :count], whole[first + place, :count]) and torch.equal(
            one, whole[first + place, :count]
        )
        assert not padded[place, count:].any(), "nothing is let through where there is only padding"


def test_every_part_of_an_address_counts() -> None:
    dropout, found = AdapterDropout(0.5, seed=0), set()
    for address in (AT, (2, 7, 0, 0), (1, 8, 0, 0), (1, 7, 1, 0), (1, 7, 0, 1)):
        found.add(kept(dropout, [Drawn(address, [8])], 8).numpy().tobytes())
    for place in ((4, "attention.q_proj"), (3, "attention.v_proj")):
        mask = dropout.kept(segments_of([1], [8]), [Drawn(AT, [8])], place, torch.Size([8, WIDTH]), CPU)
        found.add(mask.numpy().tobytes())
    found.add(kept(AdapterDropout(0.5, seed=1), [Drawn(AT, [8])], 8).numpy().tobytes())
    assert len(found) == 8


@pytest.mark.parametrize("probability", [1e-9, 0.075, 0.5, 0.9, 1 - 1e-9])
def test_the_expectation_is_the_input(probability: float) -> None:
    dropout = AdapterDropout(probability, seed=0)
    left_out = dropout.left_out / 65536
    assert abs(left_out - probability) <= 1 / 65536 and 0 < left_out < 1
    share = float(kept(dropout, [Drawn(AT, [200] * 40)], 200).double().mean())
    deviation = (left_out * (1 - left_out) / (40 * 200 * WIDTH)) ** 0.5
    assert share == pytest.approx(1 - left_out, abs=5 * deviation)
    assert dropout.gain * (1 - left_out) == pytest.approx(1.0, rel=1e-12)


class Layer:
    """One adapted projection with two clients, and its pass."""

    def __init__(self, probability: float, drawn: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.projection = Projection("q_proj", "attention", HERE[0], "q_proj", WIDTH, 10)
        blocks = [
            BlockSpec(self.projection.block_a, (HERE[0],), (4, WIDTH)),
            BlockSpec(self.projection.block_b, (HERE[0],), (10, 4)),
        ]
        self.bank = Bank(blocks, 1, 2)
        for spec in blocks:
            value = self.bank.value(spec.name, HERE[0])
            value.copy_(torch.randn(value.shape, generator=generator))
        self.base = nn.Linear(WIDTH, 10, bias=False).requires_grad_(False)
        self.dropout = AdapterDropout(probability, seed=0) if probability else None
        execution = Execution(self.bank, Pool(None, 1, 1, 2, merge=True), 2.0, dropout=self.dropout)
        self.segments, self.drawn_at = segments_of([2, 1], [5, 4]), [Drawn(AT, [5, 5]), Drawn((1, 9, 0, 0), [4])]
        slot_T = torch.tensor([0] * 10 + [1] * 5)
        execution.current = Pass(self.segments, None, slot_T, slot_T, slot_T.bool(), drawn_at=self.drawn_at if drawn else None)
        self.layer = ClientLoRALinear(self.base, self.projection, execution)
        self.x_BSD = torch.randn(3, 5, WIDTH, generator=generator).requires_grad_()
        self.dy_BSO = torch.randn(3, 5, 10, generator=generator)
        self.dy_BSO[2, 4] = 0.0  # padding has no gradient

    def run(self) -> tuple[Tensor, Tensor]:
        y_BSO = self.layer(self.x_BSD)
        y_BSO.backward(self.dy_BSO)
        assert self.x_BSD.grad is not None
        return y_BSO.detach(), self.x_BSD.grad


class Given(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_peft_computes_the_same_from_the_same_mask() -> None:
    ours = Layer(0.25)
    y_BSO, dx_BSD = ours.run()
    assert ours.dropout is not None
    mask = ours.dropout.kept(ours.segments, ours.drawn_at, HERE, torch.Size([15, WIDTH]), CPU).view(3, 5, WIDTH)
    assert 0 < int(mask[:2].sum()) < mask[:2].numel()
    for slot, rows in enumerate((slice(0, 2), slice(2, 3))):
        config = LoraConfig(r=4, lora_alpha=8.0, lora_dropout=0.25, target_modules=["q_proj"])
        module = nn.ModuleDict({"q_proj": nn.Linear(WIDTH, 10, bias=False)})
        module["q_proj"].weight.data.copy_(ours.base.weight)
        theirs: Any = get_peft_model(module, config).base_model.model["q_proj"]
        factors = [theirs.lora_A.default.weight, theirs.lora_B.default.weight]
        blocks = (ours.projection.block_a, ours.projection.block_b)
        for factor, block in zip(factors, blocks, strict=True):
            factor.data.copy_(ours.bank.value(block, HERE[0])[slot])
        assert theirs.lora_dropout["default"].p == 0.25
        theirs.lora_dropout["default"] = Given(mask[rows].float() / (1 - 0.25))
        x = ours.x_BSD.detach()[rows].clone().requires_grad_()
        y = theirs(x)
        y.backward(ours.dy_BSO[rows])
        torch.testing.assert_close(y_BSO[rows][..., :4, :], y.detach()[..., :4, :])
        torch.testing.assert_close(dx_BSD[rows], x.grad)
        for factor, block in zip(factors, blocks, strict=True):
            torch.testing.assert_close(ours.bank.grad(block, HERE[0])[slot], factor.grad)


def test_an_evaluation_leaves_nothing_out() -> None:
    plain, without = Layer(0.0), Layer(0.5, drawn=False)
    without.base.weight.copy_(plain.base.weight)
    assert every(torch.equal(a, b) for a, b in zip(plain.run(), without.run(), strict=True))
    trained = Layer(0.5)
    trained.base.weight.copy_(plain.base.weight)
    assert not torch.equal(trained.run()[0], plain.run()[0])


def test_dropout_without_attention_adapters_is_named() -> None:
    tree = {"adapters": {"dropout": 0.1, "attention": []}}
    assert idle_keys(Config.model_validate(tree)) == [
        "adapters.dropout=0.1 (there is no LoRA on projections, and experts have no dropout)"
    ]
    assert idle_keys(Config.model_validate({"local": {"final_lr": 1e-5}})) == [
        "local.final_lr=1e-05 (local.rounds_schedule is constant)"
    ]
