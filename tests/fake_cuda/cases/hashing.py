"""The fingerprint of a model that ranks load onto a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from federations import make_config

from fake_cuda.runs import on_device, root
from fedmoe_ds.federation.build import load_shared_foundation
from fedmoe_ds.foundation import file_sums
from fedmoe_ds.foundation.fingerprint import fingerprint
from fedmoe_ds.report import Progress


def case_no_byte_is_read_again_at_the_next_start(fake: Any) -> None:
    config = make_config(root(), "hashed", {"foundation": {"cache": str(root() / "sums-cache")}})
    runtime, topology = on_device()
    kept = file_sums.WORTH, file_sums._SETTLED_NS, file_sums.file_sha256
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return kept[2](path)

    file_sums.WORTH, file_sums._SETTLED_NS, file_sums.file_sha256 = 0, -(10**12), counted
    try:
        first, second = (load_shared_foundation(config, runtime, topology, Progress(enabled=False)) for _ in range(2))
    finally:
        file_sums.WORTH, file_sums._SETTLED_NS, file_sums.file_sha256 = kept
    assert sorted(read) == sorted(path.name for path in first.path.glob("*.safetensors")), "once, by the first start"
    assert first.fingerprint == second.fingerprint == fingerprint(first.path)
    assert next(second.model.parameters()).device == fake.device
