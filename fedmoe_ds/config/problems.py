"""Problems of a configuration, each as one line: dotted key, value, what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedmoe_ds.config.type_names import all_keys, expected_at, keys_at
from fedmoe_ds.config.yaml12 import inline_yaml
from fedmoe_ds.errors import UserError, nearest

_LONGEST_VALUE = 60


def shown(value: Any) -> str:
    """Return a value as YAML on one line, shortened."""
    text = inline_yaml(value)
    # A value may be a whole section; the message must stay one line.
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def first_of(problems: Sequence[str]) -> UserError:
    """Return the error of the first problem, with the number of the others."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return UserError(problems[0] + more)


def explained(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one line per problem that pydantic found in a value of `model`."""
    return [_line(detail, model) for detail in error.errors(include_url=False)]


def _line(detail: ErrorDetails, model: type[BaseModel]) -> str:
    # pydantic adds "[key]" for the key of a mapping; nobody can write that in a file.
    location = [part for part in detail["loc"] if part != "[key]"]
    dotted = ".".join(map(str, location))
    kind = detail["type"]
    if kind == "extra_forbidden":
        return f"{dotted or repr(dotted)}: unknown key{_suggestion(location, model)}"
    if kind == "missing":
        return f"{dotted}: missing; give it as {expected_at(location, model)}"
    if kind == "value_error":  # raised by a cross-field rule of the tree, which words its own message
        message = str(detail["ctx"]["error"])
        # Most name the key that is meant, which is often one of the section that pydantic names.
        return f"{dotted}: {message}" if dotted and not message.startswith((f"{dotted}.", f"{dotted}:")) else message
    value, expected = detail["input"], expected_at(location, model)
    # YAML read a number or a truth value where text was meant, such as `name: 2024`.
    is_bare_scalar = isinstance(value, int | float) and expected.startswith("string")
    fix = "; put it in quotes" if is_bare_scalar else ""
    return f"{dotted}: {shown(value)}: expected {expected}{fix}"


def _suggestion(location: Sequence[int | str], model: type[BaseModel]) -> str:
    """The nearest key of the same section, else the same key in another section, else the section's keys."""
    key = str(location[-1])
    hint = nearest(key, keys_at(location[:-1], model))
    if "did you mean" not in hint:
        # A well-spelt key in the wrong section is likelier than a misspelt one in the right section.
        elsewhere = [dotted for dotted in all_keys(model) if dotted.rpartition(".")[2] == key]
        if elsewhere:
            return f"; did you mean {' or '.join(repr(dotted) for dotted in elsewhere)}?"
    return hint
