"""Reading: how the rows of a run were read, for its record: what is to be repeated at inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedmoe_ds.config.schema import DataConfig
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.data.table import Table
from fedmoe_ds.data.templates.chat_template import chat_template
from fedmoe_ds.data.templates.columns import other_columns

Reading = dict[str, Any]
"""`template`, `columns`; `chat_template` {origin, sha256, text} of a chat, `prompt` of instructions; `passed_over`, columns
that another template would have read."""


def reading_of(table: Table, columns: dict[str, str], config: DataConfig, encoder: Encoder) -> Reading:
    """Describe how `encode` reads a table."""
    reading: Reading = {"template": config.template, "columns": dict(columns)}
    if config.template == "chat":
        template = chat_template(config, encoder.tokenizer, bool(encoder.start))
        reading["chat_template"] = {"origin": template.origin, "sha256": template.sha256, "text": template.text}
    if config.template == "instruction":
        reading["prompt"] = asdict(config.prompt.resolved())
    if others := other_columns(table, config):
        reading["passed_over"] = others
    return reading


def reading_line(reading: Mapping[str, Any]) -> str | None:
    """Return one line for the user, or None where a column was read that could be nothing else."""
    columns, others = reading.get("columns", {}), reading.get("passed_over", [])
    if reading.get("template") == "chat":
        used = reading["chat_template"]
        which = {
            "file": "data.chat_template",
            "tokenizer": "the tokenizer's chat template",
            "ChatML": "ChatML, because the tokenizer has no chat template (data.chat_template gives one)",
        }[used["origin"]]
        line = f"data: chats of {', '.join(columns.values())}, written by {which}, sha256 {used['sha256'][:12]}"
        return line + (f"; column {', '.join(others)} is not read (data.template=text)" if others else "")
    if others:
        return f"data: text of column {columns['text']}; {', '.join(others)} would be read as chats with data.template=chat"
    return None
