"""Type names: what the configuration accepts, in words: its keys, and the expected type of any of them.

Error messages and the reference are both made of this, so they cannot drift apart.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedmoe_ds.config.schema import Config

_NAMES: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "true or false", Any: "anything"}


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return the type in words with its bounds, e.g. `integer >= 1 or null`."""
    # null comes last, whatever the order in the annotation: "integer >= 1 or null".
    variants = [arg for arg in _variants(annotation) if arg is not types.NoneType]
    nullable = len(variants) < len(_variants(annotation))
    return " or ".join(_plain_text(variant, metadata) for variant in variants) + (" or null" if nullable else "")


def expected_at(location: Sequence[int | str], model: type[BaseModel] = Config) -> str:
    """Return the type in words of the value at `location` below `model`, e.g. ("federation", "tiers", 0, "top_k")."""
    annotation, metadata = _resolve(location, model)
    return type_text(annotation, metadata)


def keys_at(location: Sequence[int | str], model: type[BaseModel] = Config) -> list[str]:
    """Return the keys of the section at `location` below `model`; empty if it is no section."""
    annotation, _ = _resolve(location, model)
    section = section_of(annotation)
    return list(section.model_fields) if section else []


def all_keys(model: type[BaseModel] = Config) -> list[str]:
    """Return every dotted key of the tree."""
    return [key for key, _ in walk(model, "")]


def _variants(annotation: Any) -> tuple[Any, ...]:
    # `int | None` is a UnionType, Optional[int] a Union: pydantic hands over either.
    is_union = get_origin(annotation) in (types.UnionType, Union)
    return get_args(annotation) if is_union else (annotation,)


def section_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if inspect.isclass(annotation) and issubclass(annotation, BaseModel) else None


def _plain_text(annotation: Any, metadata: Sequence[Any]) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list or annotation is list:
        return "list" + (f" of {type_text(args[0])}" if args else "") + _bounds(metadata)
    if origin is dict or annotation is dict:
        return "mapping" + (f" of string to {type_text(args[1])}" if args else "")
    section = section_of(annotation)
    if section:
        return f"section ({', '.join(section.model_fields)})"
    return _NAMES[annotation] + _bounds(metadata)


def _bounds(metadata: Sequence[Any]) -> str:
    words: list[str] = []
    lengths: list[int] = []
    for bound in metadata:
        match bound:
            case annotated_types.Ge(limit):
                words.append(f">= {limit}")
            case annotated_types.Gt(limit):
                words.append(f"> {limit}")
            case annotated_types.Le(limit):
                words.append(f"<= {limit}")
            case annotated_types.Lt(limit):
                words.append(f"< {limit}")
            case annotated_types.MinLen(limit) | annotated_types.MaxLen(limit):
                # Least and most length are one fact to a reader: "of length 2".
                lengths.append(limit)
    if lengths:
        exact = len(lengths) == 2 and lengths[0] == lengths[1]
        words.append(f"of length {lengths[0]}" if exact else f"of length {' to '.join(map(str, lengths))} or more")
    return " " + " and ".join(words) if words else ""


def _resolve(location: Sequence[int | str], model: type[BaseModel]) -> tuple[Any, Sequence[Any]]:
    """Follow `location` through sections, lists and mappings; return the annotation found there and its bounds."""
    annotation: Any = model
    metadata: Sequence[Any] = ()
    for part in location:
        # Our unions are all "something or null", so the first variant that is not null is the only one.
        annotation = next(variant for variant in _variants(annotation) if variant is not types.NoneType)
        section = section_of(annotation)
        if section:
            field = section.model_fields.get(str(part))
            annotation, metadata = (field.annotation, field.metadata) if field else (Any, ())
        else:
            # A list's items or a mapping's values: the last type argument either way.
            annotation, metadata = (get_args(annotation) or (Any,))[-1], ()
    return annotation, metadata


def walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key below a model; the keys of a list's items are written `list.N.key`."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section:
            yield from walk(section, f"{prefix}{name}.")
            continue
        yield prefix + name, field
        for variant in _variants(field.annotation):
            item = section_of(next(iter(get_args(variant)), None))
            if item:
                yield from walk(item, f"{prefix}{name}.N.")
