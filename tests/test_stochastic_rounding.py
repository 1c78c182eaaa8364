"""Rounding at random: right in the mean, exact where it can be, addressed; second moments in bfloat16 go on moving."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fedmoe_ds.clients.optimizer import ClientOptimizer, Turn, moment_bytes
from fedmoe_ds.clients.stochastic_rounding import Rounding, at_layer, mixed, random_bits, rounded, store
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.kernels import rows
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

EXPERT = BlockSpec("experts.down.lora_A", (3, 5), (4, 6), expert=True)
DENSE = BlockSpec("attention.q_proj.lora_A", (3, 5), (3, 5))
SPECIAL = [0.0, -0.0, math.inf, -math.inf, 1.0, -2.5, 2.0**-130, 3.3895313892515355e38]
"""Zeros, infinities, numbers of eight bits, one of them below the normal range and the largest."""
NANS = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)


def every_bit(value: float) -> Tensor:
    """`value` rounded by each of the 65536 numbers of 16 bits."""
    return rounded(torch.full((1 << 16,), value), torch.arange(1 << 16, dtype=torch.int32))


@settings(max_examples=60, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda x: abs(x) < 2.0**126))
def test_the_mean_over_all_bits_is_the_number(value: float) -> None:
    """Exactly, as every neighbour of eight bits is taken as often as it should be; nothing but the two neighbours comes out."""
    found = every_bit(value).double()
    assert float(found.mean()) == value
    assert len(set(found.tolist())) <= 2 and float((found - value).abs().max()) <= max(abs(value) * 2.0**-7, 2.0**-133)


@pytest.mark.parametrize("value", SPECIAL)
def test_what_bfloat16_can_hold_stays(value: float) -> None:
    found = every_bit(value)
    assert bool((found == value).all()) and bool((found.signbit() == (math.copysign(1.0, value) < 0)).all())


def test_no_number_becomes_nan_and_nan_stays() -> None:
    """A NaN whose fraction is all ones would carry into the sign and come out as a zero."""
    assert bool(NANS.isnan().all())
    for bits in (0, 1, 0xFFFF):
        assert bool(rounded(NANS, torch.full((4,), bits, dtype=torch.int32)).isnan().all())
    largest = every_bit(torch.finfo(torch.float32).max)
    assert set(largest.tolist()) == {SPECIAL[-1], math.inf}, "between the largest bfloat16 and infinity"


def test_bits_are_the_hash_of_their_address() -> None:
    """The same formula in numpy's unsigned integers."""
    keys = Rounding(7, range(2, 6)).keys(EXPERT, 1, 9, 3)
    place = np.arange(1000, dtype=np.uint32)
    low, high = keys.astype(np.uint32)[..., None], (keys >> np.uint64(32)).astype(np.uint32)[..., None]
    x = place + low
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15)) ^ high) * np.uint32(0x846CA68B)
    x = x ^ (x >> np.uint32(16))
    assert np.array_equal(random_bits(keys, 1000).numpy().view(np.uint32), x)


def test_bits_are_even_and_unrelated() -> None:
    """Both halves of the bits, neighbours within an item, and neighbouring steps, clients, layers and experts."""
    rounding, count = Rounding(0, range(4)), 1 << 14

    def halves(step: int = 1, client: int = 0) -> NDArray[np.float64]:
        bits = random_bits(rounding.keys(EXPERT, 1, client, step), count).numpy().view(np.uint32).astype(np.int64)
        return np.stack([bits & 0xFFFF, bits >> 16]) / 65535.0 - 0.5  # [2, L, E, count]

    found = halves()
    limit = 5.0 / math.sqrt(12 * count)  # five standard deviations of the mean of an item
    assert np.abs(found.mean(-1)).max() < limit
    low = found[0]  # [L, E, count]
    pairs = [(low, found[1]), (low[..., 1:], low[..., :-1]), (low[0], low[1]), (low[:, 0], low[:, 1])]
    pairs += [(found, halves(step=2)), (found, halves(client=1))]
    assert max(np.abs((a * b).mean(-1)).max() for a, b in pairs) < limit / math.sqrt(12)
    assert np.abs(np.square(found).mean() - 1 / 12) < 0.002


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_rounds_as_the_processor_does() -> None:
    keys = Rounding(7, range(2, 6)).keys(EXPERT, 1, 9, 3)
    values = [torch.randn(2, 4, 1000, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    kept = {}
    for device in ("cpu", "cuda"):
        kept[device] = [torch.empty(2, 4, 1000, dtype=torch.bfloat16, device=device) for _ in values]
        store(kept[device], [value.to(device) for value in values], keys)
    assert every(torch.equal(a, b.cpu()) for a, b in zip(kept["cpu"], kept["cuda"], strict=True))


def test_keys_know_experts_by_their_global_id() -> None:
    whole = Rounding(1, range(8)).keys(EXPERT, 2, 3, 4)
    assert whole.shape == (2, 8) and len(np.unique(whole)) == 16
    assert np.array_equal(Rounding(1, range(4, 6)).keys(EXPERT, 2, 3, 4), whole[:, 4:6])
    dense = Rounding(1, range(4, 6)).keys(DENSE, 2, 3, 4)
    assert np.array_equal(dense, Rounding(1, range(8)).keys(DENSE, 2, 3, 4)) and dense.shape == (2,)
    others = [Rounding(2, range(8)).keys(EXPERT, 2, 3, 4), Rounding(1, range(8)).keys(replace(EXPERT, name="b"), 2, 3, 4)]
    others += [Rounding(1, range(8)).keys(EXPERT, *address) for address in ((1, 3, 4), (2, 4, 4), (2, 3, 5))]
    assert len(np.unique([whole, *others])) == 6 * 16, "seed, block, round, client and step"


# --- optimizers ---------------------------------------------------------------------------------------------

ADAMW, SGD = {"optimizer": "adamw", "weight_decay": 0.1}, {"optimizer": "sgd", "momentum": 0.9}


def trained(
    chosen: dict[str, Any], experts: range, clients: int = 1, slot: int = 0, address: tuple[int, int] = (1, 4), steps: int = 6
) -> tuple[ClientOptimizer, list[Tensor]]:
    """One client's steps on some of eight experts, and where they end: values and moments, expert blocks first."""
    bank = Bank([EXPERT, DENSE], len(experts), clients)
    optimizer = ClientOptimizer(bank, LocalConfig(**chosen, moments="bfloat16"), seed=5, first_expert=experts.start)
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        for spec in (EXPERT, DENSE):
            axis = 2 if spec.expert else 1
            gradient = torch.randn(len(spec.layers), *((8,) if spec.expert else ()), *spec.item, generator=draw)
            part = gradient[:, experts.start : experts.stop] if spec.expert else gradient
            bank.grads[spec.name].select(axis, slot).copy_(part)
        for name in (EXPERT.name, DENSE.name):
            optimizer.take(name, [Turn(slot, step + 1, 0.1, 0.7, address)])
    states = [bank.values, *[state for state in (optimizer.first, optimizer.second) if state]]
    return optimizer, [s[spec.name].select(2 if spec.expert else 1, slot).clone() for spec in (EXPERT, DENSE) for s in states]


@pytest.fixture(params=["native", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through the optimizer."""
    if request.param == "plain":
        monkeypatch.setattr(rows, "serves", lambda *tensors: False)
    return str(request.param)


@pytest.mark.parametrize("chosen", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_bits_of_a_client_are_its_own(path: str, chosen: dict[str, Any]) -> None:
    """Neither its slot nor the experts beside its own matter; its address does."""
    optimizer, whole = trained(chosen, range(8))
    states = [*optimizer.first.values(), *optimizer.second.values()]
    assert {state.dtype for state in states} == {torch.bfloat16}
    numbers = sum(value.numel() for value in optimizer.bank.values.values())
    assert sum(state.nbytes for state in states) == numbers * moment_bytes(optimizer.config)
    for clients, slot in ((2, 1), (5, 3)):
        assert every(torch.equal(a, b) for a, b in zip(trained(chosen, range(8), clients, slot)[1], whole, strict=True))
    kinds = len(whole) // 2
    for experts in (range(4), range(4, 8), range(6, 7)):
        part = trained(chosen, experts)[1]
        assert every(
            torch.equal(a, b[:, experts.start : experts.stop]) for a, b in zip(part[:kinds], whole[:kinds], strict=True)
        )
        assert every(torch.equal(a, b) for a, b in zip(part[kinds:], whole[kinds:], strict=True))
    for address in ((2, 4), (1, 5)):
        assert not any(torch.equal(a, b) for a, b in zip(trained(chosen, range(8), address=address)[1], whole, strict=True))


def test_an_address_is_asked_for() -> None:
    bank = Bank([DENSE], 1, 1)
    with pytest.raises(AssertionError, match="address"):
        ClientOptimizer(bank, LocalConfig(moments="bfloat16")).take(DENSE.name, [Turn(0, 1, 0.1, 1.0)])


def test_native_steps_equal_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last digit of float32 that differs between the two turns one rounding in some ten thousand."""
    native = trained(ADAMW, range(8), steps=20)[1]
    monkeypatch.setattr(rows, "serves", lambda *tensors: False)
    plain = trained(ADAMW, range(8), steps=20)[1]
    for a, b in zip(native, plain, strict=True):
        same = a == b if a.dtype == torch.bfloat16 else torch.isclose(a, b, rtol=1e-5, atol=1e-5)
        assert float(same.double().mean()) >= 0.98
        torch.testing.assert_close(a, b, rtol=2.0**-6, atol=1e-2)


def test_native_rounding_equals_plain_rounding() -> None:
    """To the bit, of any number: without averaging, the moments of one step are the gradient and its square."""
    draw = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (2, 3, 700), generator=draw, dtype=torch.int64).to(torch.int32)
    gradient = patterns.view(torch.float32).clone()
    gradient[0, 1, : len(SPECIAL)] = torch.tensor(SPECIAL)
    gradient[0, 2] = NANS.repeat(175)
    keys = Rounding(0, range(3)).keys(EXPERT, 1, 0, 1)
    value, grad = torch.zeros_like(gradient), gradient.clone()
    first, second = (torch.zeros(gradient.shape, dtype=torch.bfloat16) for _ in range(2))
    block = [tensor.unsqueeze(2) for tensor in (value, grad, first, second)]  # of one client
    rows.adamw(*block, 1, [rows.AdamwStep(0, 1.0, 1.0, 1.0, 0.0)], betas=(0.0, 0.0), eps=1e-8, keys=[keys])
    bits = random_bits(keys, gradient.shape[-1])
    for found, expected in ((first, rounded(gradient, bits)), (second, rounded(gradient * gradient, bits >> 16))):
        assert torch.equal(found.isnan(), expected.isnan()) and bool(found.isnan().any())
        assert torch.equal(found.nan_to_num(nan=0.0, posinf=math.inf), expected.nan_to_num(nan=0.0, posinf=math.inf))


def test_nothing_moves_without_gradients(path: str) -> None:
    """Zeros stay zeros, so what was never trained is left alone; moments alone move a parameter."""
    bank = Bank([EXPERT], 3, 1)
    bank.values[EXPERT.name].fill_(1.0)
    optimizer = ClientOptimizer(bank, LocalConfig(moments="bfloat16"))
    bank.grads[EXPERT.name][0, 1] = 1.0
    for step in range(3):
        before = bank.values[EXPERT.name].clone()
        optimizer.take(EXPERT.name, [Turn(0, step + 1, 0.1, 1.0, (1, 0))])
        moved = (bank.values[EXPERT.name] != before).flatten(2).any(-1)
        assert moved.nonzero().tolist() == [[0, 1]], path
        for state in (optimizer.first, optimizer.second):
            assert state[EXPERT.name].flatten(2).any(-1).nonzero().tolist() == [[0, 1]]


def test_second_moments_go_on_moving() -> None:
    """2000 steps at beta2 = 0.999: at random they stay with float32's; to the nearest they do not."""
    spec = BlockSpec("attention.q_proj.lora_A", (0,), (64, 32))
    banks = {moments: Bank([spec], 1, 1) for moments in ("float32", "bfloat16")}
    optimizers = {kind: ClientOptimizer(bank, LocalConfig(moments=kind)) for kind, bank in banks.items()}  # type: ignore[arg-type]
    nearest = torch.zeros(64, 32, dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    for step in range(2000):
        gradient = torch.randn(64, 32, generator=draw)
        nearest = (nearest.float() * 0.999 + gradient.square() * 0.001).bfloat16()
        for kind, optimizer in optimizers.items():
            banks[kind].grads[spec.name][0, 0] = gradient
            optimizer.take(spec.name, [Turn(0, step + 1, 1e-3, 1.0, (1, 0))])
    whole, half = (optimizers[kind].second[spec.name].double() for kind in ("float32", "bfloat16"))
    assert float(half.mean() / whole.mean()) == pytest.approx(1.0, abs=0.01)
    assert float((half / whole - 1.0).std()) < 0.1
    assert abs(float(nearest.double().mean() / whole.mean()) - 1.0) > 0.1
    first = [optimizers[kind].first[spec.name].double() for kind in ("float32", "bfloat16")]
    assert float((first[0] - first[1]).norm() / first[0].norm()) < 0.02
    changes = [banks[kind].values[spec.name].double() for kind in ("float32", "bfloat16")]
    assert float((changes[0] - changes[1]).norm() / changes[0].norm()) < 0.05


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**20), st.integers(0, 2**20))
def test_a_layer_by_itself_keeps_its_keys(base: int, layer: int, expert: int) -> None:
    bases = torch.tensor([base])
    assert torch.equal(mixed(at_layer(bases, layer), torch.tensor(expert)), mixed(bases, torch.tensor(layer << 32 | expert)))
