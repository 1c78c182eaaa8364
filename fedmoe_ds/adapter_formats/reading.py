"""Reading: a LoRA adapter that PEFT or another tool has saved, as tensors under our canonical keys.

Legend: R adapter rank, I and O input and output width of a projection.

Only headers are looked at when a file is opened, and A of gate and up where a file has one for each; all other tensors are
read when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmoe_ds.adapter_formats.adapter_config import read_config
from fedmoe_ds.adapter_formats.file_tensors import FileTensors, Ours
from fedmoe_ds.adapter_formats.lora_file import WEIGHTS, Format
from fedmoe_ds.errors import UserError


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter in a folder, opened. What it adds to a frozen weight is `scale` x B A.

    Attributes:
        format: the one it is in; an adapter without experts is in both.
        alpha: as its configuration says; `scale` is that over its rank.
        ranks: LoRA rows by target: the file's, or twice as many for gate and up of experts that had to be joined.
        base_model: as its configuration names it, or None.
        experts: of a layer; 0 without adapters on experts.
    """

    folder: Path
    format: Format
    alpha: float
    scale: float
    ranks: dict[str, int]
    base_model: str | None
    experts: int
    _ours: dict[str, Ours] = field(repr=False)

    @property
    def rank(self) -> int:
        """The smallest `adapters.rank` that holds all of it."""
        return max(self.ranks.values())

    @property
    def targets(self) -> tuple[str, ...]:
        """What it adapts, by our names of pairs: `experts.gate_up`, `attention.q_proj`, ..."""
        return tuple(self.ranks)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by our canonical key, `layers.0.experts.3.down.lora_A`."""
        return {key: ours.shape for key, ours in self._ours.items()}

    def read(self, key: str) -> Tensor:
        """One tensor, float32: A is [R, I], B is [O, R]. Raises UserError for a number that is not finite."""
        value = self._ours[key].make().float().contiguous()
        if not value.isfinite().all():
            raise UserError(f"{self.folder / WEIGHTS}: {key}: has numbers that are not finite; get the file again")
        return value


def read_adapter(folder: Path, where: str = "adapters.start") -> ReadAdapter:
    """Open an adapter in one of the two formats (`lora_file.py`).

    Args:
        where: the key that names the folder; every refusal begins with it.
    Raises:
        UserError: it is no LoRA, uses what our adapters do not have (DoRA, rslora, unequal ranks, other modules), or its
            tensors are damaged, incomplete or of wrong shapes.
    """
    config = read_config(folder, where)
    path = folder / WEIGHTS
    tensors = FileTensors(f"{where}: {path}", _opened(path, f"{where}: {path}"), config)
    return ReadAdapter(
        folder,
        "peft-fused" if tensors.fused else "peft",
        config.alpha,
        config.alpha / config.rank,
        tensors.ranks,
        config.base_model,
        tensors.experts,
        tensors.ours,
    )


def _opened(path: Path, where: str) -> Any:
    if not path.is_file():
        other = "; adapter_model.bin is a pickle and is not read" if path.with_suffix(".bin").is_file() else ""
        raise UserError(f"{where}: missing{other}; save the adapter with safetensors (PEFT's save_pretrained does)")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: damaged: {error}; get the file again") from None
