"""Columns: which template reads the data, and which column is which of its fields."""

from __future__ import annotations

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.data.table import Table
from fedmoe_ds.data.templates.classification import label_words
from fedmoe_ds.data.templates.conversation import Reader
from fedmoe_ds.errors import UserError, nearest

# Template field -> the column names it is known by. Alpaca and AlpaGasus say input/output, Dolly context/response; chats are
# OpenAI's messages, ShareGPT's conversations, or TRL's prompt and completion.
FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {"text": ("text",)},
    "chat": {
        "messages": ("messages", "conversations"),
        "prompt": ("prompt",),
        "completion": ("completion",),
        "system": ("system",),
        "tools": ("tools",),
    },
    "instruction": {
        "instruction": ("instruction",),
        "input": ("input", "context"),
        "output": ("output", "response"),
    },
    "classification": {"text": ("text",), "label": ("label",)},
}
OPTIONAL = frozenset({"input", "messages", "prompt", "completion", "system", "tools"})
# A missing answer drops its row, with a count: published instruction sets do have a few.
NULLABLE = frozenset({"input", "output"})
_PAIR = ("prompt", "completion")


def candidates(config: DataConfig) -> set[str]:
    """Return the names of all columns that `resolve_columns` might choose, whatever the source has."""
    templates = ("text", "chat") if config.template == "auto" else (config.template,)
    known = {name for template in templates for names in FIELDS[template].values() for name in names}
    return known | set(config.columns.values())


def resolve_template(table: Table, config: DataConfig) -> DataConfig:
    """Return the configuration with the template that `auto` means for these columns.

    `data.columns` decides where it names a field. Otherwise it is text where there is a column `text`, as it was before there
    were chats, and chat where there are a chat's columns.
    """
    if config.template != "auto":
        return config
    given, present = set(config.columns), set(table.names)
    chat = FIELDS["chat"]
    says_chat = bool(given & {*chat, "conversations"}) if given else "text" not in present and _has_chat(present)
    template = "chat" if says_chat else "text"
    if template == "text" and config.chat_template is not None:
        raise UserError(
            "data.chat_template: the data are read as text, which has no chat template; drop the key, or set data.template=chat"
        )
    return config.model_copy(update={"template": template})


def other_columns(table: Table, config: DataConfig) -> list[str]:
    """The columns of a chat that template `text` passes over, and the column `text` that a chat does."""
    if config.template == "chat":
        return ["text"] if "text" in table.names else []
    if config.template != "text" or not _has_chat(set(table.names)):
        return []
    return [name for name in ("messages", "conversations", *_PAIR) if name in table.names]


def _has_chat(present: set[str]) -> bool:
    return not present.isdisjoint(FIELDS["chat"]["messages"]) or present.issuperset(_PAIR)


def resolve_columns(table: Table, config: DataConfig) -> dict[str, str]:
    """Return template field -> column, from `data.columns` first and from the well-known names otherwise."""
    fields = FIELDS[config.template]
    given = _given(table, config, fields)
    optional = set(OPTIONAL)
    if config.template == "instruction":
        # A prompt that leaves a field out does not need it, and one that is built on it does.
        unused, needed = _USES[config.prompt.resolved().input]
        optional, fields = optional - needed, {field: names for field, names in fields.items() if field not in unused}
        for field in unused & given.keys():
            raise UserError(f"data.columns.{field}: {given[field]}: data.prompt leaves the {field} out; drop the key")
    for field, names in fields.items():
        known = [name for name in names if name in table.names]
        if field in given or (not known and field in optional):
            continue
        if not known:
            raise UserError(
                f"data.columns: {' or '.join(names)}: no such column for template '{config.template}'; "
                f"present: {', '.join(table.names)}; map it with data.columns.{field}=<column>{_other_template(table, config)}"
            )
        given[field] = known[0]
    return _one_form(given, table, config) if config.template == "chat" else given


_USES: dict[str, tuple[set[str], set[str]]] = {
    "if_any": (set(), set()),
    "always": (set(), {"input"}),
    "ignored": ({"input"}, set()),
    "only": ({"instruction"}, {"input"}),
}
"""`data.prompt.input` -> the fields that the prompt leaves out, and optional ones that it needs."""


def _given(table: Table, config: DataConfig, fields: dict[str, tuple[str, ...]]) -> dict[str, str]:
    # data.columns may use either name of a field: `context` is Dolly's word for `input`.
    aliases = {alias: field for field, names in fields.items() for alias in names}
    given: dict[str, str] = {}
    for key, column in config.columns.items():
        if key not in aliases:
            raise UserError(f"data.columns: {key}: no field of template '{config.template}'{nearest(key, aliases)}")
        require_column(column, table.names, f"data.columns.{key}")
        given[aliases[key]] = column
    return given


def _one_form(given: dict[str, str], table: Table, config: DataConfig) -> dict[str, str]:
    """A chat is one column of turns, or prompt and completion; what `data.columns` names comes first, then the turns."""
    named = {field for field in given if given[field] in config.columns.values()}
    if "messages" in named and named & set(_PAIR):
        raise UserError("data.columns: messages beside prompt and completion: a row is one conversation; drop either of them")
    if "messages" in given and not named & set(_PAIR):
        return {field: column for field, column in given.items() if field not in _PAIR}
    if given.keys() >= set(_PAIR):
        return {field: column for field, column in given.items() if field != "messages"}
    raise UserError(
        "data.columns: messages, conversations, or prompt and completion: no such columns for template 'chat'; "
        f"present: {', '.join(table.names)}; map them with data.columns.messages=<column>{_other_template(table, config)}"
    )


def _other_template(table: Table, config: DataConfig) -> str:
    """A hint: the template whose columns are all there."""
    for template in ("chat", "instruction", "text"):
        required = [names for field, names in FIELDS[template].items() if field not in OPTIONAL]
        fits = all(not set(names).isdisjoint(table.names) for names in required) if required else _has_chat(set(table.names))
        if fits and template != config.template and not config.columns:
            return f", or set data.template={template}"
    return ""


def require_column(column: str, present: list[str], where: str) -> None:
    """Raise a UserError unless the column exists."""
    if column not in present:
        raise UserError(f"{where}: {column}: no such column; present: {', '.join(present)}{nearest(column, present)}")


def check_rows(table: Table, columns: dict[str, str], config: DataConfig) -> None:
    """Raise a UserError that names the first row whose fields are not what the template needs."""
    if config.template == "chat":
        # Reading is checking: a turn that cannot be read names its row.
        for _ in Reader(table, columns):
            pass
        return
    # Where the input is the question, a row without one asks nothing.
    nullable = NULLABLE - ({"input"} if config.prompt.resolved().input == "only" else set())
    for field, column in columns.items():
        if field == "label":
            label_words(table, column, config.label_names)
            continue
        for row, value in enumerate(table[column]):
            if isinstance(value, str) or (value is None and field in nullable):
                continue
            what = "is missing" if value is None else f"holds {value!r:.40}, not text"
            raise UserError(
                f"data.columns.{field}: {table.place(row)}: column '{column}' {what}; mend the row or map another column"
            )
