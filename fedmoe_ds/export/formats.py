"""Formats: what `--format` names, each with the function that writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fedmoe_ds.export.expanded import write_expanded
from fedmoe_ds.export.lora import write_lora
from fedmoe_ds.export.merged import write_merged
from fedmoe_ds.export.model_folder import write_model_folder
from fedmoe_ds.export.written import Request, Written


@dataclass(frozen=True)
class ExportFormat:
    """One format: its writer, and whether a type of tensors can be asked for."""

    write: Callable[[Request], Written]
    takes_dtype: bool = False


def _write_model(request: Request) -> Written:
    """A whole model in Hugging Face's format; with adapter experts beside it, code of its own goes along, and with further
    layers it has so many more."""
    if request.run.outline.expansion is not None:
        return write_expanded(request)
    beside = request.run.config.adapters.moe is not None
    return write_model_folder(request) if beside else write_merged(request)


FORMATS: dict[str, ExportFormat] = {
    "peft": ExportFormat(partial(write_lora, "peft"), takes_dtype=True),
    "peft-fused": ExportFormat(partial(write_lora, "peft-fused"), takes_dtype=True),
    "merged": ExportFormat(_write_model),
}
