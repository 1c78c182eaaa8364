"""Formats: what `--format` names, each with the function that writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fedmoe_ds.export import merged
from fedmoe_ds.export.loading import model_loading
from fedmoe_ds.export.lora import write_lora
from fedmoe_ds.export.written import Request, Written


@dataclass(frozen=True)
class ExportFormat:
    """One format: its writer, and whether a type of tensors can be asked for."""

    write: Callable[[Request], Written]
    takes_dtype: bool = False


def _write_model(request: Request) -> Written:
    """A whole model in Hugging Face's format."""
    written = merged.write(request.run, request.selection, request.out)
    return Written("transformers", "a whole model", model_loading(request), tuple(written.notes))


FORMATS: dict[str, ExportFormat] = {
    "peft": ExportFormat(partial(write_lora, "peft"), takes_dtype=True),
    "peft-fused": ExportFormat(partial(write_lora, "peft-fused"), takes_dtype=True),
    "merged": ExportFormat(_write_model),
}
