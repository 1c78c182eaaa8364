"""Plain LoRA on dense models: equal to PEFT's, many clients in one pass; what has no meaning there is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dense_inputs import DIGITS, TEXT, dense_config, write_dense
from every import every
from federations import alone, build, make_config, run_alone
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from fedmoe_ds.config import Config, load_config
from fedmoe_ds.distributed.topology import ParallelLayout
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.run_spec import check_start
from fedmoe_ds.model.batch import Rows
from fedmoe_ds.model.forward import segment_sums
from fedmoe_ds.planner.legality import legal_sizes
from fedmoe_ds.planner.verify import check_partition
from fedmoe_ds.report import write_report

ATTENTION, FEED_FORWARD = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
ALL: dict[str, Any] = {"attention": ATTENTION, "feed_forward": FEED_FORWARD}
_PEFT = re.compile(r".*layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.(lora_[AB])\.default\.weight")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write_dense(folder, ("llama", "vit"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3Config(**TEXT, head_dim=16)).save_pretrained(folder / "qwen3")
    AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(folder / "qwen3")
    return folder


def config_of(root: Path, family: str, name: str, *changes: dict[str, Any]) -> Config:
    plain = {"foundation": {"path": str(root / family)}, "execution": {"micro_batch_size": None}}
    return make_config(root, f"{family}-{name}", plain, {"data": DIGITS} if family == "vit" else {}, *changes)


def ours(parts: Parts, clients: int, count: int) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Loss and gradients by canonical name of every client, all of them in one pass."""
    bank, model = parts.execution.bank, parts.trainer.model
    bank.zero_grad()
    rows = [Rows.of(slot, 1, parts.training_data.train(slot), range(count)) for slot in range(clients)]
    batch = model.batch(rows)
    found = model.loss(batch, None, batch.targets)
    losses = [part / targets for part, targets in zip(segment_sums(found.nll_N, batch), batch.targets, strict=True)]
    assert float(found.sum.detach()) == pytest.approx(sum(map(float, losses)))
    found.sum.backward()
    grads: list[dict[str, Tensor]] = [{} for _ in range(clients)]
    for name, spec in bank.specs.items():
        for row, layer in enumerate(spec.layers):
            for slot in range(clients):
                grads[slot][spec.key(layer)] = bank.grads[name][row, slot].clone()
    return [float(loss) for loss in losses], grads


def theirs(parts: Parts, folder: Path, slot: int, count: int) -> tuple[float, dict[str, Tensor]]:
    """The same of one client by PEFT: its own model, its own padding."""
    adapters, bank = parts.config.adapters, parts.execution.bank
    lora = peft.LoraConfig(r=adapters.rank, lora_alpha=adapters.alpha, target_modules=[*ATTENTION, *FEED_FORWARD])  # type: ignore[arg-type]
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    trained = {_key(name): value for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for key, value in trained.items():
            _, layer, name = key.split(".", 2)
            value.copy_(bank.value(name, int(layer))[slot])
    data = parts.training_data.train(slot)
    longest = max(len(data.input_ids[i]) for i in range(count))
    tokens, labels = torch.zeros(count, longest, dtype=torch.int64), torch.full((count, longest), -100)
    for i in range(count):
        ids, mask = (torch.tensor(part[i].tolist()) for part in (data.input_ids, data.loss_mask))
        tokens[i, : len(ids)], labels[i, : len(ids)] = ids, torch.where(mask.bool(), ids, -100)
    loss = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    return float(loss.detach()), {key: value.grad for key, value in trained.items() if value.grad is not None}


def _key(name: str) -> str:
    match = _PEFT.fullmatch(name)
    assert match is not None, name
    layer, part, projection, which = match.groups()
    return f"layers.{layer}.{'attention' if part == 'self_attn' else 'feed_forward'}.{projection}.{which}"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_loss_and_gradients_are_those_of_peft(root: Path, family: str) -> None:
    """Three clients with adapters of their own in one pass, and PEFT one after the other."""
    parts, journal = build(config_of(root, family, "peft", {"adapters": ALL}), *alone())
    journal.close()
    source = torch.Generator().manual_seed(3)
    for value in parts.execution.bank.values.values():
        value.copy_(0.2 * torch.randn(value.shape, generator=source))
    losses, grads = ours(parts, 3, 4)
    assert parts.execution.pool.merge and len({round(loss, 3) for loss in losses}) == 3
    for slot in range(3):
        loss, expected = theirs(parts, root / family, slot, 4)
        assert losses[slot] == pytest.approx(loss, rel=1e-5)
        assert grads[slot].keys() == expected.keys() and len(expected) == 2 * 2 * 7
        for key, value in expected.items():
            assert float((grads[slot][key] - value).norm()) <= 1e-5 * float(value.norm()), (slot, key)


def test_a_dense_model_alone_gets_plain_lora(root: Path) -> None:
    """Nothing but the model is named: attention's default projections, one tier, and the resolved file continues the run."""
    result = run_alone(config_of(root, "llama", "default", {"federation": {"rounds": 1}}))
    config = result.parts.config
    assert config.method.name == "flame" and not config.adapters.experts and config.adapters.attention == ["q_proj", "v_proj"]
    assert {key.split(".", 2)[2] for key in result.adapters} == {
        f"attention.{name}.lora_{half}" for name in ("q_proj", "v_proj") for half in "AB"
    }
    assert {client.tier for client in result.parts.clients} == {"1"}
    (run,) = [event for event in result.events if event["event"] == "run"]
    assert (run["num_experts"], run["layers"], run["topology"][0]["experts"]) == (0, 0, "none")
    folder = Path(config.output) / config.name
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Expert activation" not in page and "dense, LoRA without experts" in page
    assert check_start(load_config(folder / "config.yaml"), "cpu")[0] == config


def test_images_too(root: Path) -> None:
    """ViT's own names; its clients do not share passes, so they leave no trace either."""
    change = {"adapters": {"feed_forward": ["fc1", "fc2"]}, "method": {"name": "fedit"}, "federation": {"rounds": 1}}
    found = [
        run_alone(config_of(root, "vit", f"flight-{flight}", change, {"execution": {"clients_in_flight": flight}}))
        for flight in (1, 3)
    ]
    assert found[0].digest == found[1].digest
    assert every(bool(value.any()) for key, value in found[0].adapters.items() if key.endswith("lora_B"))


def test_beside_adapter_experts(root: Path) -> None:
    """LoRA on the frozen block inside, experts beside it: both are trained."""
    change = {"adapters": {"feed_forward": ["up_proj"]}, "federation": {"rounds": 1}}
    result = run_alone(dense_config(root, "llama", "both", change))
    kinds = {re.sub(r"layers\.\d+\.|\.\d+", "", key) for key in result.adapters}
    assert {"feed_forward.up_proj.lora_B", "experts.outer.weight", "router.weight"} <= kinds
    assert every(bool(value.any()) for key, value in result.adapters.items() if key.endswith("up_proj.lora_B"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "router": ({"adapters": {"router": "train"}}, r"adapters\.router: train: .* is dense and has no router; drop the key"),
    "whole experts": ({"adapters": {"expert_training": "full"}}, r"adapters\.expert_training: full: .* has no experts; drop"),
    "nothing": ({"adapters": {"attention": []}}, r"adapters\.attention: \[\]: .* nothing would be trained; name projections"),
    "balance": ({"local": {"balance_loss": 0.1}}, r"local\.balance_loss: 0\.1: .* has no router; drop the key"),
    "z": ({"local": {"z_loss": 0.1}}, r"local\.z_loss: 0\.1: .* has no router; drop the key"),
    "shards": ({"topology": {"ep_size": 2}}, r"topology\.ep_size: 2: .* no experts to spread over ranks; use 1"),
    "top-k": ({"federation": {"tiers": [{"top_k": 4, "share": 1.0}]}}, r"federation\.tiers\.0\.top_k: 4: .* apart by rank"),
    "budget": ({"federation": {"budget": "top_k"}, "method": {"name": "flora"}}, r"federation\.budget: top_k: .*; use rank"),
    "sampling": ({"federation": {"sampling": "budget"}}, r"federation\.sampling: budget: .*; use size or uniform"),
    "hfedmoe": ({"method": {"name": "hfedmoe"}}, r"method\.name: hfedmoe: it trains experts and .* is dense; use a foundation"),
    "fft-moe": ({"method": {"name": "fft-moe"}}, r"adapters\.moe: null: FFT-MoE trains adapter experts"),
    "temperature": ({"method": {"name": "flame", "temperature": 3.0}}, r"method\.temperature: 3\.0: has no effect with"),
    "rescaler": (
        {"method": {"name": "flame", "rescaler": "none"}},
        r"method\.rescaler: none: has no effect on a model without",
    ),
    "ranks": ({"federation": {"tiers": [{"rank": 2, "share": 1.0}]}}, r"federation\.tiers\.0\.rank: 2: method flame needs"),
    "rank": (
        {"method": {"name": "flora"}, "federation": {"tiers": [{"rank": 9, "share": 1.0}]}},
        r"federation\.tiers\.0\.rank: 9: the model has 4 LoRA rows",
    ),
    "name": ({"adapters": {"feed_forward": ["fc1"]}}, r"adapters\.feed_forward: fc1: the model has no such feed-forward proj"),
    "sparse": (
        {"foundation": {"preset": "tiny-olmoe", "path": None}, "adapters": {"feed_forward": ["up_proj"]}},
        r"adapters\.feed_forward: up_proj: tiny-olmoe has experts in place of a feed-forward block; drop the key",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(root: Path, case: str) -> None:
    change, expected = REFUSED[case]
    with pytest.raises(UserError, match=expected) as refused:
        build(config_of(root, "llama", "refused", change), *alone())
    assert "\n" not in str(refused.value)


def test_a_world_without_experts() -> None:
    assert legal_sizes(4, 0) == [1]
    check_partition(ParallelLayout(4, 1), 0)
