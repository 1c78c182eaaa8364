"""YAML text to plain Python and back, with the scalar rules of the YAML 1.2 core schema.

PyYAML follows YAML 1.1, where `1e-3` is a string, `no` is false, `12:30` is 750 and a date is a date object. Here only
true/false are booleans, every usual way to write a number is a number, and mapping keys are always text. Reading is
done on the node graph, so that a duplicate key can be named with its dotted path and line.

A document is bounded, as somebody else may have written it: in its text, in its depth, and in what its aliases make of it
(nine lines of aliases to aliases are a billion values).
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
        # A value that occurs twice is written twice: nobody edits `&id001` with pleasure.
        return True

    def represent_list(self, data: Iterable[Any]) -> yaml.SequenceNode:
        """Lists of scalars go on one line, whatever the style around them."""
        scalars_only = not any(isinstance(item, list | dict) for item in data)
        flow = True if scalars_only else self.default_flow_style
        return self.represent_sequence(_PREFIX + "seq", data, flow_style=flow)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """What does not print is escaped: odd line breaks would be read back as a newline, others rule a terminal."""
        return self.represent_scalar(_PREFIX + "str", data, style='"' if visible(data, lines=True) != data else None)


# Emptied, and not only added to: PyYAML's own 1.1 rules would come first. The dumper keeps them, to quote for both.
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_PREFIX + _tag, re.compile(rf"^(?:{_pattern})$"), _first)
_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_str)


LARGEST = 2**16
"""Characters of a document, and how many values and characters it may have once its aliases stand for what they name."""
DEEPEST = 64
"""Levels of nesting."""
_WIDEST = 512
"""Bits of an integer: one that is also a float, and short enough to be shown."""
_DEEP = re.compile(rf"(?:[\[{{]\s*){{{DEEPEST + 1}}}")
"""What PyYAML would need seconds to find too deep."""


def parse_yaml(text: str, where: str) -> Any:
    """Return the one document in `text` as dicts with text keys, lists and scalars; None if there is none.

    `where` names the text in messages. Raises UserError, with the line, on malformed YAML, a duplicate key, a custom tag, a
    document that is too large or too deep, an integer of too many digits, and text that no file name or terminal can take (NUL,
    half of a surrogate pair).
    """
    if len(text) > LARGEST:
        raise UserError(f"{where}: has more than {LARGEST} characters; it is no configuration of this program")
    try:
        # Before PyYAML sees the text; deep block nesting ends in its RecursionError, or in _Conversion.
        if _DEEP.search(text):
            raise RecursionError
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: malformed YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = f", line {text.count(chr(10), 0, error.position) + 1}"
        character = error.character if isinstance(error.character, str) else chr(error.character)
        raise UserError(f"{where}{line}: malformed YAML: character {character!r} is not allowed") from None
    except RecursionError:
        raise UserError(f"{where}: is nested deeper than {DEEPEST} levels; make it flat") from None
    except (ValueError, OverflowError) as error:  # a code point or a version that is no number
        raise UserError(f"{where}: malformed YAML: {error}") from None
    return None if node is None else _Conversion(where).plain(node, (), ())


def dump_yaml(value: Any) -> str:
    """Return `value` as YAML in block style, lists of scalars in one line, keys in their own order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


def inline_yaml(value: Any) -> str:
    """Return `value` as YAML on one line: what one would write after `key=`."""
    text: str = yaml.dump([value], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30, default_flow_style=True)
    return text.strip()[1:-1]


class _Conversion:
    """From the nodes of one document to plain values; `where` names it. An alias counts as often as it stands there."""

    def __init__(self, where: str) -> None:
        self._where, self._left = where, LARGEST

    def plain(self, node: yaml.Node, path: tuple[str, ...], above: tuple[yaml.Node, ...]) -> Any:
        """Convert one node; `above` are its ancestors, because an alias may point at one of them."""
        # Only ancestors matter: an alias to a finished sibling is legal.
        if node in above:
            self._fail(node, path, "a YAML alias contains itself")
        if len(above) > DEEPEST:
            self._fail(node, path[:3], f"nested deeper than {DEEPEST} levels; make it flat")
        # Counted per visit and not per node: an alias is visited wherever it stands, which bounds alias bombs.
        self._spend(node, path, 1)
        above = (*above, node)
        if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
            return self._mapping(node, path, above)
        if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
            return [self.plain(item, (*path, str(index)), above) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self._fail(node, path, f"the YAML tag {node.tag} is not supported; use plain values")

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...], above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            # A sequence or mapping as key has no dotted name, and Python could not hash it.
            if not isinstance(key_node, yaml.ScalarNode):
                self._fail(key_node, path, "a key must be text")
            key = self._text(key_node, path)
            if key in result:
                self._fail(key_node, (*path, key), f"given twice, first in line {lines[key]}; keep one")
            lines[key] = key_node.start_mark.line + 1
            result[key] = self.plain(value_node, (*path, key), above)
        return result

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str, ...]) -> Any:
        text = self._text(node, path)
        kind = node.tag.removeprefix(_PREFIX)
        try:
            match kind:
                case "str":
                    return text
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    # int(text, 0) would refuse 010, which YAML 1.2 reads as ten.
                    value = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
                    if value.bit_length() <= _WIDEST:
                        return value
                    # Falls through to the error at the end, as a value that is no number does.
                    kind = f"integer of at most {_WIDEST} bits"
                case "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
                case _:
                    self._fail(node, path, f"the YAML tag {node.tag} is not supported; use plain values")
        except (ValueError, KeyError):
            pass
        self._fail(node, path, f"'{text[:40]}' is no {kind}")

    def _text(self, node: yaml.ScalarNode, path: tuple[str, ...]) -> str:
        """The characters of a scalar. A path or a name ends at NUL, and nothing can be written that holds half of a pair."""
        text: str = node.value
        self._spend(node, path, len(text))
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            self._fail(node, path, "holds a NUL or half of a surrogate pair, which is no character; leave it out")
        return text

    def _spend(self, node: yaml.Node, path: tuple[str, ...], size: int) -> None:
        self._left -= size
        if self._left < 0:
            self._fail(node, path[:3], f"aliases make more than {LARGEST} values and characters of it; write out what you need")

    def _fail(self, node: yaml.Node, path: tuple[str, ...], what: str) -> NoReturn:
        dotted = f": {'.'.join(path)}" if path else ""
        raise UserError(f"{self._where}, line {node.start_mark.line + 1}{dotted}: {what}")
