"""What one pass over memory replaces: norms and rotary embeddings of a frozen model, and the optimizer steps of a wave."""

from __future__ import annotations

import copy
from typing import Any

import torch
from every import every
from method_variants import variant_config
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.qwen3 import modeling_qwen3

from fake_cuda.runs import root, run_on_device
from fedmoe_ds.clients.fused_step import ClientStep
from fedmoe_ds.clients.local_training import WaveTrainer
from fedmoe_ds.clients.optimizer import ClientOptimizer
from fedmoe_ds.config import LocalConfig
from fedmoe_ds.kernels import frozen_layers
from fedmoe_ds.model.adapter_bank import Bank, BlockSpec

BATCH, LENGTH, WIDTH, HEADS, KEYS, HEAD = 2, 16, 64, 4, 2, 16
NORMED = 2 * WIDTH + (HEADS + KEYS) * HEAD
"""Numbers of a token that go into the norms of a layer."""
NAMES = {"case_frozen_layers": ["float32", "bfloat16"]}


def model(dtype: torch.dtype, layers: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "vocab_size": 11, "num_hidden_layers": layers}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEYS, "head_dim": HEAD}
    found = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).to(dtype).requires_grad_(False)
    for name, weight in found.named_parameters():
        if name.endswith("norm.weight"):
            weight.normal_(1.0, 0.3)
    return found.cuda().model


def passed(network: Any, fake: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, int, int]:
    """Hidden states, the gradient of what went in, bytes kept for the backward pass, and kernels of both passes."""
    draw = torch.Generator().manual_seed(1)
    x_BSD = torch.randn(BATCH, LENGTH, WIDTH, generator=draw).to(dtype).cuda().requires_grad_()
    # One row of angles for all sequences, as attention over equal positions has them.
    places = torch.arange(LENGTH, device="cuda")[None]
    frozen, kept = {weight.inner.untyped_storage()._cdata for weight in network.parameters()}, dict[int, int]()

    def keep(tensor: Any) -> Any:
        storage = tensor.inner.untyped_storage()
        kept[storage._cdata] = 0 if storage._cdata in frozen else storage.nbytes()
        return tensor

    fake.COUNT.reset()
    # Autograd shows here what it keeps; the tensors stay alive with the graph, so no storage is counted twice.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y_BSD = network(inputs_embeds=x_BSD, position_ids=places, use_cache=False).last_hidden_state
    y_BSD.sin().sum().backward()
    assert x_BSD.grad is not None
    return y_BSD.detach().cpu().double(), x_BSD.grad.cpu().double(), sum(kept.values()), fake.COUNT.kernels


def case_frozen_layers(fake: Any, name: str) -> None:
    """The same numbers from fewer kernels; of a bfloat16 norm its input is kept, and no float32 copy."""
    dtype = getattr(torch, name)
    kept, kernels = [], []
    rotary = modeling_qwen3.apply_rotary_pos_emb
    for layers in (1, 2):
        plain = model(dtype, layers)
        ours = copy.deepcopy(plain)
        modeling_qwen3.apply_rotary_pos_emb = getattr(rotary, "__wrapped__", rotary)
        theirs = passed(plain, fake, dtype)
        frozen_layers.replace_frozen(ours)
        norms = [module for module in ours.modules() if type(module).__name__.endswith("Norm")]
        assert len(norms) == 4 * layers + 1 and {type(norm) for norm in norms} == {frozen_layers.RowNorm}
        assert hasattr(modeling_qwen3.apply_rotary_pos_emb, "batch_invariant")
        found = passed(ours, fake, dtype)
        for x, y in zip(found[:2], theirs[:2], strict=True):
            assert float((x - y).norm() / y.norm()) < (1e-6 if dtype == torch.float32 else 2e-2)
        kept.append(theirs[2] - found[2])
        kernels.append(theirs[3] - found[3])
    modeling_qwen3.apply_rotary_pos_emb = rotary
    # Per token of one layer: of a bfloat16 norm two bytes per number in place of four, and 1 / rms as before.
    less = (kept[1] - kept[0]) / (BATCH * LENGTH)
    assert less >= (2 * NORMED if dtype == torch.bfloat16 else 0), (kept, less)
    assert kernels[1] - kernels[0] >= 20, kernels


def case_one_rounding(fake: Any) -> None:
    """Closer to float64 than the layer and the function that were there."""
    draw = torch.Generator().manual_seed(0)
    layer = modeling_qwen3.Qwen3RMSNorm(256).bfloat16().requires_grad_(False)
    layer.weight.normal_(1.0, 0.3, generator=draw)
    x_BHSK, cos, sin = (
        torch.randn(shape, generator=draw).bfloat16() for shape in ((2, 3, 50, 256), (1, 50, 256), (1, 50, 256))
    )
    rotary = getattr(modeling_qwen3.apply_rotary_pos_emb, "__wrapped__", modeling_qwen3.apply_rotary_pos_emb)
    x, w = x_BHSK.double(), layer.weight.double()
    exact = [w * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), *rotary(x, x, cos.double(), sin.double())]
    layer, on_device = layer.cuda(), [tensor.cuda() for tensor in (x_BHSK, x_BHSK, cos, sin)]
    ours = frozen_layers.RowNorm(layer.weight, layer.variance_epsilon)
    found = [ours(on_device[0]), *frozen_layers.batch_invariant_rotary(rotary)(*on_device)]
    theirs = [layer(on_device[0]), *rotary(*on_device)]
    for one, other, right in zip(found, theirs, exact, strict=True):
        errors = [(tensor.cpu().double() - right).abs() for tensor in (one, other)]
        assert float(errors[0].mean()) < 0.9 * float(errors[1].mean()) and bool((errors[0] <= right.abs() / 256 + 1e-6).all())


def case_other_rotations_stay(fake: Any) -> None:
    """Families that turn neighbours together, or a part of a head, under the same name."""
    for home in (modeling_cohere, modeling_glm):
        before = home.apply_rotary_pos_emb
        frozen_layers._replace_rotary(home)
        assert home.apply_rotary_pos_emb is before, home


SPECS = [
    BlockSpec("experts.down.lora_A", (0, 1, 2), (4, 6), expert=True),
    BlockSpec("attention.q_proj.lora_A", (0, 1, 2), (3, 5)),
    BlockSpec("rescaler", (-1,), (1,), personal=True, decay=False),
]


def case_a_step_of_all_clients(fake: Any) -> None:
    """As many kernels for eight clients as for two, one upload, no wait; and the numbers of the CPU's steps."""
    config, counts = LocalConfig(weight_decay=0.1, clip=1.0), []
    for clients in (2, 8):
        steps = [ClientStep({True: c, False: c}, 1 + c, 0.01 * (c + 1), (1, c)) for c in range(clients)]
        ends = []
        for device in ("cuda", "cpu"):
            optimizer = ClientOptimizer(Bank(SPECS, 3, clients, device=torch.device(device)), config)
            draw = torch.Generator().manual_seed(0)
            for tensor in (*optimizer.bank.values.values(), *optimizer.bank.grads.values()):
                tensor.copy_(torch.randn(tensor.shape, generator=draw))
            norms_C = torch.linspace(0.5, 2.0, clients, dtype=torch.float64).to(device)
            fake.COUNT.reset()
            optimizer.step_all(steps, norms_C)
            if device == "cuda":
                counts.append(fake.COUNT.kernels)
                assert (fake.COUNT.total_waits, sum(fake.COUNT.uploads.values())) == (0, 1), fake.COUNT.summary("step")
            states = (optimizer.bank.values, optimizer.bank.grads, optimizer.first, optimizer.second)
            ends.append([tensor.cpu() for state in states for tensor in state.values()])
        assert every(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(*ends, strict=True))
    assert counts[0] == counts[1] <= 12 * len(SPECS) + 12, counts


def case_moments_on_the_host(fake: Any) -> None:
    """The bits of moments on the device, in each of two waves; they come and go layer by layer, and nobody waits for them."""
    layers = sum(len(spec.layers) for spec in SPECS)
    for kept in ("float32", "bfloat16"):
        ends = []
        for on_host in (False, True):
            config, draw = LocalConfig(moments=kept), torch.Generator().manual_seed(0)
            optimizer = ClientOptimizer(Bank(SPECS, 3, 2, device=fake.device), config, seed=1, on_host=on_host)
            moments = [tensor for state in (optimizer.first, optimizer.second) for tensor in state.values()]
            assert {tensor.device.type for tensor in moments} == {"cpu" if on_host else "cuda"}
            assert every(tensor.is_pinned() for tensor in moments) or not on_host
            for _ in range(2):
                optimizer.reset()
                for step in range(3):
                    for tensor in optimizer.bank.grads.values():
                        tensor.copy_(torch.randn(tensor.shape, generator=draw))
                    fake.COUNT.reset()
                    steps = [ClientStep({True: c, False: c}, 1 + step, 0.01, (1, c)) for c in range(2)]
                    optimizer.step_all(steps)
                    # Beside the table: both moments of every layer, but in a wave's first step, when they are zero.
                    sent = 2 * layers if on_host and step else 0
                    assert fake.COUNT.uploads.total() - sent <= 1 + len(SPECS) and fake.COUNT.uploads.total() > sent
                    assert fake.COUNT.total_waits == 0 or step == 0, fake.COUNT.summary("step")
            ends.append([tensor.cpu() for tensor in (*optimizer.bank.values.values(), *moments)])
        assert every(torch.equal(x, y) for x, y in zip(*ends, strict=True)), kept


def case_a_run_with_moments_on_the_host(fake: Any) -> None:
    """The same adapters at its end; the identity does not know the key."""
    digests, known = [], []
    for place in ("device", "host"):
        change = {"topology": {"device": "cuda"}, "execution": {"reproducible": "fast", "moments_on": place}}
        result = run_on_device(variant_config(root(), "flame", f"moments-{place}", change, {"federation": {"rounds": 1}}))
        digests.append(result.digest)
        known.append(result.parts.identity)
        assert (result.parts.trainer.optimizer.host is not None) == (place == "host")
    assert digests[0] == digests[1] and known[0] == known[1]


def case_a_wave_s_steps_wait_for_nothing(fake: Any) -> None:
    """In a run, with clipping: norms stay on the device, and one table per step goes there."""
    found: list[tuple[int, int]] = []
    original = WaveTrainer._optimize

    def counted(self: WaveTrainer, *given: Any) -> None:
        before = fake.COUNT.total_waits, sum(fake.COUNT.uploads.values())
        original(self, *given)
        found.append((fake.COUNT.total_waits - before[0], sum(fake.COUNT.uploads.values()) - before[1]))

    config = variant_config(
        root(),
        "flame",
        "steps",
        {"topology": {"device": "cuda"}, "execution": {"reproducible": "fast", "clients_in_flight": 4}},
        {
            "federation": {"rounds": 1},
            "local": {"max_steps": 2, "clip": 0.5},
            "evaluation": {"every": 1, "client_sequences": 0},
        },
    )
    WaveTrainer._optimize = counted  # type: ignore[method-assign]
    try:
        run_on_device(config)
    finally:
        WaveTrainer._optimize = original  # type: ignore[method-assign]
    assert set(found) == {(0, 1)}, found
