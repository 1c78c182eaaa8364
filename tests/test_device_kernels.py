"""Whether Triton's kernels run on a device: what keeps them from it is found before a pass relies on them, and told."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
import torch

from fedmoe_ds.errors import UserError
from fedmoe_ds.kernels import device_kernels, lora_products
from fedmoe_ds.kernels.device_kernels import LOOP, TRITON, grouped_by, has_triton, triton_fault, triton_serves

DEVICE = torch.device("cuda")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """The first launches on a host that seems to have all that Triton needs, on an H100."""
    tried = list[torch.device]()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(device_kernels, "triton_installed", lambda: True)
    monkeypatch.setattr(device_kernels, "_launch", tried.append)
    triton_fault.cache_clear()
    yield tried
    triton_fault.cache_clear()


def test_one_launch_tells(tried: list[torch.device]) -> None:
    for _ in range(3):
        assert triton_serves(torch.float32, DEVICE) and grouped_by(torch.float32, DEVICE) == TRITON
    lora_products.check_kernels("triton", 8, DEVICE)
    assert tried == [DEVICE], "once per process"


FAILURES = {
    # CC="ccache gcc", which Triton takes for the name of a program
    "no such program": (FileNotFoundError(2, "No such file or directory", "ccache gcc"), "No such file .* 'ccache gcc'"),
    "no compiler": (RuntimeError("Failed to find C compiler.\nPlease specify via CC."), "find C compiler. Please"),
    "no Python.h": (subprocess.CalledProcessError(1, ["gcc", "main.c", "-O3"]), r"gcc ended with status 1 \(.*Python.h"),
    "no folder": (PermissionError(13, "Permission denied", "/.triton"), "Permission denied: '/.triton'"),
    "no assembler": (ValueError("sm_121 is not defined " * 50), "sm_121 is not defined"),
}


@pytest.mark.parametrize(("error", "reason"), FAILURES.values(), ids=FAILURES)
def test_a_failed_launch_leaves_it_to_torch(
    error: Exception, reason: str, tried: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> None:
        tried.append(device)
        raise error

    monkeypatch.setattr(device_kernels, "_launch", fail)
    fault = triton_fault(DEVICE)
    assert not has_triton(DEVICE) and grouped_by(torch.float32, DEVICE) == LOOP
    assert lora_products.products_for(8, torch.float32, DEVICE).kernel == LOOP
    with pytest.raises(
        UserError, match=f"^execution.adapter_kernels: triton: a first kernel failed: .*{reason}.*; or use auto$"
    ):
        lora_products.check_kernels("triton", 8, DEVICE)
    assert fault is not None and "\n" not in fault and len(fault) < 250 and tried == [DEVICE]


def test_what_needs_no_launch(tried: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is too old, ROCm, and a host without Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match=r"adapter_kernels: triton: compute capability 7.5 is below 8.0; or use auto"):
        lora_products.check_kernels("triton", 8, DEVICE)
    for name, broken in (("triton_installed", lambda: False), ("torch.version.cuda", None)):
        target, key = (torch.version, "cuda") if "cuda" in name else (device_kernels, name)
        monkeypatch.setattr(target, key, broken)
        triton_fault.cache_clear()
        with pytest.raises(UserError, match=r"is not installed; pip install triton; or use auto|is not built for CUDA"):
            lora_products.check_kernels("triton", 8, DEVICE)
    assert not tried and "a CUDA device" in str(triton_fault(torch.device("cpu")))


def test_the_kernel_is_named_after_what_it_takes(tried: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has one launch, Triton multiplies other widths and more groups; without it torch takes them in parts."""
    half, most = torch.bfloat16, device_kernels.CUDA_GROUPS
    assert grouped_by(half, DEVICE, (2048, 1024), most) == device_kernels.TORCH
    assert {grouped_by(half, DEVICE, (2048, 1020)), grouped_by(half, DEVICE, (2048,), most + 1)} == {TRITON}
    monkeypatch.setattr(device_kernels, "has_triton", lambda device: False)
    assert grouped_by(half, DEVICE, (2048, 1020)) == LOOP and grouped_by(half, DEVICE, (8,), most + 1) == device_kernels.TORCH
