"""What CUDA's kernels and NCCL refuse, and what they take: the stand-in itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def case_mixed_devices(fake: Any) -> None:
    x = torch.randn(4, 8, device="cuda")
    mixing = "found at least two devices"
    for bad in (
        lambda: x + torch.ones(4, 8),
        lambda: torch.cat([x, torch.ones(4, 8)]),
        lambda: F.embedding(torch.tensor([1]), x),
    ):
        with fake.refuses(mixing):
            bad()
    assert (x * torch.tensor(2.0)).device == fake.device  # a scalar is passed by value
    with fake.refuses(mixing):
        torch.tensor(1.0).add_(x.sum())  # but nothing is written into one
    with fake.refuses(mixing):
        x.masked_fill(torch.tensor(True), 0.0)
    with fake.refuses("can't convert cuda:0 device type tensor to numpy"):
        x.numpy()


def case_other_devices(fake: Any) -> None:
    here, there = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
    assert (here + here).device == torch.device("cuda:0") and (there + there).device == torch.device("cuda:1")
    with fake.refuses("cuda:0 and cuda:1"):
        here + there
    assert (here + there.to("cuda:0")).tolist() == [2.0] * 3
    with fake.refuses("invalid device ordinal"):
        torch.ones(3, device="cuda:2")
    with fake.refuses("invalid device ordinal"):
        torch.cuda.set_device(2)
    torch.cuda.set_device(1)
    assert torch.ones(3, device="cuda").device == torch.device("cuda:1") and torch.cuda.current_device() == 1
    torch.cuda.set_device(0)
    weight = torch.nn.Parameter(torch.ones(3, device="cuda:1"))
    (weight * 2).sum().backward()
    assert weight.grad is not None and weight.grad.device == torch.device("cuda:1")


def case_indices(fake: Any) -> None:
    x = torch.arange(12.0, device="cuda").view(4, 3)
    assert fake.COUNT.total_waits == 0
    assert x[torch.tensor([0, 2])].tolist() == [[0.0, 1.0, 2.0], [6.0, 7.0, 8.0]]
    assert sum(fake.COUNT.uploads.values()) == 1  # of the index, for which the host waits, as it does for the list
    assert fake.COUNT.total_waits == 2
    with fake.refuses("indices should be either on cpu or on the same device"):
        torch.ones(5)[torch.tensor([1], device="cuda")]
    with fake.refuses("indices should be either on cpu or on the same device"):
        x[torch.tensor([1], device="cuda:1")]
    with fake.refuses("for value tensor"):
        x[torch.tensor([1])] = torch.ones(1, 3)
    x[1] = torch.tensor(5.0)
    assert x[1].tolist() == [5.0] * 3


def case_copies_that_wait(fake: Any) -> None:
    count, host = fake.COUNT, torch.ones(4)
    device = host.to("cuda")
    assert (sum(count.uploads.values()), count.total_waits) == (1, 1)
    device.cpu()
    assert count.total_waits == 2
    device.to("cpu", non_blocking=True)  # into memory that torch pins for it
    assert count.total_waits == 2
    host.copy_(device, non_blocking=True)  # pageable: the host waits all the same
    assert count.total_waits == 3
    pinned = torch.empty(4, pin_memory=True)
    assert pinned.is_pinned() and host.pin_memory().is_pinned() and not host.is_pinned()
    pinned.copy_(device, non_blocking=True)
    assert count.total_waits == 3
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    assert count.total_waits == 4
    assert float(device.sum()) == 4.0 and count.total_waits == 5
    torch.bincount(device.long())
    device[device > 0]
    device.nonzero()
    assert count.total_waits == 9
    device[device > 0] = 1.0  # a number into a mask is a masked_fill
    torch.repeat_interleave(device.long(), output_size=4)
    assert count.total_waits == 9


def case_uploads_that_wait(fake: Any) -> None:
    """All out of pageable memory, and those that the program does not leave to themselves."""
    host, device, pinned = torch.ones(4), torch.zeros(4, device="cuda"), torch.ones(4).pin_memory()
    for source, free in ((host, False), (pinned, True), (pinned[1:].expand(3), True)):
        for non_blocking in (False, True):
            fake.COUNT.reset()
            assert source.to("cuda", non_blocking=non_blocking).device == fake.device
            device[: len(source)].copy_(source, non_blocking=non_blocking)
            assert fake.COUNT.uploads.total() == 2
            assert fake.COUNT.total_waits == (0 if free and non_blocking else 2), fake.COUNT.waits


def case_autograd(fake: Any) -> None:
    """Gradients come from a thread of the device, where factories know it as well."""
    x = torch.randn(4, 8, device="cuda", requires_grad=True)
    w = torch.nn.Parameter(torch.randn(8, 3, device="cuda"))

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
            return value * 2

        @staticmethod
        def backward(context: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * torch.full(grad.shape, 2.0, device="cuda")

    Twice.apply(x @ w).sum().backward()
    assert x.grad is not None and x.grad.device == w.grad.device == fake.device  # type: ignore[union-attr]
    expected = (2 * torch.ones(4, 3) @ w.detach().cpu().t()).tolist()
    assert torch.allclose(x.grad.cpu(), torch.tensor(expected))


def case_attention(fake: Any) -> None:
    for dtype, kind in ((torch.bfloat16, "flash"), (torch.float32, "efficient")):
        q = torch.randn(1, 2, 16, 8, device="cuda", dtype=dtype, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
        assert q.grad is not None and fake.COUNT.ops[f"_scaled_dot_product_{kind}_attention_backward"] == 1


def case_grouped_products(fake: Any) -> None:
    """torch's limits: 16 bytes, 1023 groups, bfloat16 and sm_90 for the fast kernel; else a loop, and the host waits."""
    x, w = torch.randn(8, 16, device="cuda", dtype=torch.bfloat16), torch.randn(2, 16, 8, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([8, 8], dtype=torch.int32).pin_memory().to("cuda", non_blocking=True)
    assert F.grouped_mm(x, w, offs=ends).shape == (8, 8) and fake.COUNT.total_waits == 0
    F.grouped_mm(x.float(), w.float(), offs=ends)
    assert fake.COUNT.total_waits == 1
    with fake.refuses("multiple of 16 bytes"):
        F.grouped_mm(x[:, :12].contiguous(), w[:, :12, :].contiguous(), offs=ends)
    many = torch.full((1024,), 8, dtype=torch.int32, device="cuda")
    with fake.refuses("1024 groups"):
        F.grouped_mm(x, w[:1].expand(1024, 16, 8), offs=many)
    assert F.grouped_mm(x.t(), x, offs=ends)[1].abs().max().item() == 0.0
    fake.COUNT.empty_groups = "garbage"  # sm_100 writes nothing there
    assert F.grouped_mm(x.t(), x, offs=ends)[1].isnan().all().item()
    fake.COUNT.arch = 80
    before = fake.COUNT.total_waits
    F.grouped_mm(x, w, offs=ends)
    assert fake.COUNT.total_waits == before + 1


def case_memory(fake: Any) -> None:
    """Bytes that tensors keep, those of autograd among them; beyond the limit allocations fail."""
    count = fake.COUNT
    before = count.now
    x = torch.zeros(1024, device="cuda", requires_grad=True)
    assert count.now == before + 4096
    y = (x[:512] * 2).exp()  # a view keeps no memory of its own; exp keeps its result
    assert count.now == before + 4096 + 2048
    count.limit = count.now + 4096
    kept = torch.zeros(1024, device="cuda")
    try:
        torch.zeros(1, device="cuda")
    except torch.OutOfMemoryError:
        count.limit = None
    assert count.limit is None and torch.cuda.max_memory_allocated() == count.peak == count.now
    del x, y, kept
    assert count.now == before
