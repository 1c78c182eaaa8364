"""YAML text to plain Python and back, with the scalar rules of the YAML 1.2 core schema.

PyYAML follows YAML 1.1, where `1e-3` is a string, `no` is false, `12:30` is 750 and a date is a date object. Here only
true/false are booleans, every usual way to write a number is a number, and mapping keys are always text. Reading is
done on the node graph, so that a duplicate key can be named with its dotted path and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NoReturn

import yaml

from fedmoe_ds.errors import UserError
from fedmoe_ds.terminal import visible

_PREFIX = "tag:yaml.org,2002:"
# tag -> (pattern, the characters a match can start with); in this order, so that 12 is an integer before a number.
_CORE_SCHEMA: dict[str, tuple[str, list[str]]] = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader whose plain scalars follow the core schema (and which has no merge key, as in YAML 1.2)."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a string when YAML 1.1 or 1.2 would read it as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: Iterable[Any]) -> yaml.SequenceNode:
        """Lists of scalars go on one line, whatever the style around them."""
        scalars_only = not any(isinstance(item, list | dict) for item in data)
        flow = True if scalars_only else self.default_flow_style
        return self.represent_sequence(_PREFIX + "seq", data, flow_style=flow)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """What does not print is escaped: odd line breaks would be read back as a newline, others rule a terminal."""
        return self.represent_scalar(_PREFIX + "str", data, style='"' if visible(data, lines=True) != data else None)


_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_PREFIX + _tag, re.compile(rf"^(?:{_pattern})$"), _first)
_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_str)


def parse_yaml(text: str, where: str) -> Any:
    """Return the one document in `text` as dicts with text keys, lists and scalars; None if there is none.

    `where` names the text in messages. Raises UserError, with the line, on malformed YAML, a duplicate key or a
    custom tag.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: malformed YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = f", line {text.count(chr(10), 0, error.position) + 1}"
        raise UserError(f"{where}{line}: malformed YAML: character {error.character!r} is not allowed") from None
    return None if node is None else _plain(node, where, (), ())


def dump_yaml(value: Any) -> str:
    """Return `value` as YAML in block style, lists of scalars in one line, keys in their own order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


def inline_yaml(value: Any) -> str:
    """Return `value` as YAML on one line: what one would write after `key=`."""
    text: str = yaml.dump([value], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30, default_flow_style=True)
    return text.strip()[1:-1]


def _fail(node: yaml.Node, where: str, path: tuple[str, ...], what: str) -> NoReturn:
    dotted = f": {'.'.join(path)}" if path else ""
    raise UserError(f"{where}, line {node.start_mark.line + 1}{dotted}: {what}")


def _plain(node: yaml.Node, where: str, path: tuple[str, ...], above: tuple[yaml.Node, ...]) -> Any:
    """Convert one node; `above` are its ancestors, because an alias may point at one of them."""
    if node in above:
        _fail(node, where, path, "a YAML alias contains itself")
    above = (*above, node)
    if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
        return _mapping(node, where, path, above)
    if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
        return [_plain(item, where, (*path, str(index)), above) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, where, path)
    _fail(node, where, path, f"the YAML tag {node.tag} is not supported; use plain values")


def _mapping(node: yaml.MappingNode, where: str, path: tuple[str, ...], above: tuple[yaml.Node, ...]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            _fail(key_node, where, path, "a key must be text")
        key = key_node.value
        if key in result:
            _fail(key_node, where, (*path, key), f"given twice, first in line {lines[key]}; keep one")
        lines[key] = key_node.start_mark.line + 1
        result[key] = _plain(value_node, where, (*path, key), above)
    return result


def _scalar(node: yaml.ScalarNode, where: str, path: tuple[str, ...]) -> Any:
    text = node.value
    try:
        match node.tag.removeprefix(_PREFIX):
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            case "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (ValueError, KeyError):
        _fail(node, where, path, f"'{text[:40]}' is no {node.tag.removeprefix(_PREFIX)}")
    _fail(node, where, path, f"the YAML tag {node.tag} is not supported; use plain values")
