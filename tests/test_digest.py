"""The digest sees every bit of the global adapters, and nothing else."""

from __future__ import annotations

import torch
from federations import alone

from fedmoe_ds.checkpoint.digest import global_digest
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

SPECS = [
    BlockSpec("experts.down.lora_A", (0, 3), (2, 3), expert=True),
    BlockSpec("attention.q_proj.lora_B", (0, 3), (4,)),
    BlockSpec("rescaler", (-1,), (1,), personal=True),
]


def make_bank(specs: list[BlockSpec] = SPECS) -> Bank:
    bank = Bank(specs, 4, clients=1, with_grad=False)
    for spec in SPECS:
        bank.values[spec.name].normal_(generator=torch.Generator().manual_seed(0))
    return bank


def digest(bank: Bank, first_expert: int = 0) -> str:
    return global_digest(((key, value) for key, _, value in bank.items(first_expert)), alone()[0], 1)


def test_every_bit_counts() -> None:
    found = {digest(make_bank())}
    for spec in SPECS[:2]:
        for place in range(make_bank().values[spec.name].numel()):
            bank = make_bank()
            bank.values[spec.name].view(torch.int32).flatten()[place] ^= 1
            found.add(digest(bank))
    assert len(found) == 1 + 2 * 4 * 6 + 2 * 4


def test_names_count() -> None:
    assert digest(make_bank(), first_expert=0) != digest(make_bank(), first_expert=4)


def test_neither_personal_state_nor_the_order_of_blocks_counts() -> None:
    bank = make_bank()
    bank.values["rescaler"].fill_(7.0)
    assert digest(bank) == digest(make_bank())
    assert digest(make_bank(SPECS[::-1])) == digest(make_bank())


def test_canonical_names() -> None:
    keys = [key for key, _, _ in make_bank().items(8)]
    assert keys[:2] == ["layers.0.experts.8.down.lora_A", "layers.0.experts.9.down.lora_A"]
    assert keys[-2:] == ["layers.0.attention.q_proj.lora_B", "layers.3.attention.q_proj.lora_B"]
