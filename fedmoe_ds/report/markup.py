"""HTML and SVG that is escaped by construction: whatever is not `Markup` already is text, and shows what does not print."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from fedmoe_ds.terminal import visible

_PLAIN = re.compile(r"[A-Za-z0-9 \n\u202f–−×.,:;%/#()_+-]*")
VOID = frozenset({"input", "br", "meta"})


class Markup(str):
    """A finished fragment."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """One element. `cls` is class, `for_` is for, `data_t` is data-t; None and False attributes are left out."""
    head = name + "".join(_attribute(key, value) for key, value in attributes.items())
    # Elements without an end tag: browsers would take one for a second element or an error.
    if name in VOID:
        return Markup(f"<{head}>")
    return Markup(f"<{head}>{join(children)}</{name}>")


def join(children: Iterable[str | None]) -> Markup:
    """Fragments one after the other; plain strings are escaped, None is nothing."""
    return Markup("".join(child if isinstance(child, Markup) else _text(child) for child in children if child))


def _text(value: str) -> str:
    if _PLAIN.fullmatch(value):  # most are, and a page has very many
        return value
    return html.escape(visible(value, lines=True))


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = "class" if key == "cls" else key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    # Six digits are finer than a pixel, and a page has very many coordinates.
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f' {name}="{_text(text)}"'


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, cls: str = "", text_columns: int = 1) -> Markup:
    """A table: the first `text_columns` columns are text, the others numbers; a value may be a finished cell."""

    def cells(kind: str, values: Iterable[str]) -> Markup:
        return join(_cell(kind, value, column < text_columns) for column, value in enumerate(values))

    body = join(tag("tr", cells("td", row)) for row in rows)
    return tag("table", tag("thead", tag("tr", cells("th", head))), tag("tbody", body), cls=cls or None)


def _cell(kind: str, value: str, is_text: bool) -> Markup:
    # Finished cells carry attributes of their own, such as the number to sort by.
    if isinstance(value, Markup) and value.startswith(f"<{kind}"):
        return value
    return tag(kind, value, cls=None if is_text else "num", scope="col" if kind == "th" else None)


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """Colour keys: pairs of (css class that sets the colour, label)."""
    return tag("p", *(tag("span", tag("i", cls=f"key {css}"), label) for css, label in entries), cls="legend")


def choices(title: str, panels: list[tuple[str, Markup]]) -> Markup:
    """Panels of which one shows at a time (all of them where scripts do not run); a single panel needs no buttons."""
    if len(panels) == 1:
        return panels[0][1]
    buttons = [
        tag("button", name, type="button", aria_pressed="true" if i == 0 else "false") for i, (name, _) in enumerate(panels)
    ]
    bodies = [tag("div", body, cls="panel") for _, body in panels]
    return tag("div", tag("div", *buttons, cls="tabs", role="group", aria_label=title), *bodies, cls="choices")
