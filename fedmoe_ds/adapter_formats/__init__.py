"""Adapters in the formats of other tools: the LoRA files that PEFT, vLLM and SGLang load, written and read back."""

from fedmoe_ds.adapter_formats.lora_file import FORMATS, Format, lora_entries, lora_targets
from fedmoe_ds.adapter_formats.module_names import ModuleNames, names_of
from fedmoe_ds.adapter_formats.reading import ReadAdapter, read_adapter

__all__ = ["FORMATS", "Format", "ModuleNames", "ReadAdapter", "lora_entries", "lora_targets", "names_of", "read_adapter"]
