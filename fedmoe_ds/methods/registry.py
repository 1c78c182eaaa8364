"""Registry: methods by name, found by entry point."""

from __future__ import annotations

from importlib.metadata import entry_points
from inspect import signature

from pydantic import ValidationError

from fedmoe_ds.config import Config, MethodConfig
from fedmoe_ds.errors import UserError, nearest
from fedmoe_ds.methods.base import Method
from fedmoe_ds.methods.contradictions import contradictions
from fedmoe_ds.methods.private import private
from fedmoe_ds.methods.requirements import check_idle, check_needs

GROUP = "fedmoe_ds.methods"
_RENAMED = {"watch": "observer", "memory": "client_state", "card": "info"}
"""Former names of what a method may override: the engine would never call them, and nobody would be told."""


def method_names() -> list[str]:
    """All installed methods."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def load_method(config: MethodConfig) -> Method:
    """Find the method by name and check its parameters. Raises UserError with the nearest name or key."""
    method = _method_class(config.name)
    given = config.model_dump(exclude={"name"})
    # Before pydantic sees them: its message knows neither the method's name nor the nearest key.
    for key in given:
        if key not in method.Params.model_fields:
            known = nearest(key, method.Params.model_fields)
            raise UserError(
                f"method.{key}: unknown key for method '{config.name}'{known}; "
                f"'method={{name: {config.name}}}' drops the keys of another method"
            )
    try:
        made = method(method.Params(**given))
    except ValidationError as error:
        # One line for the first mistake; the others show up when it is corrected.
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"method.{key}: {first['input']!r}: {first['msg']}; see docs/methods.md") from None
    for line in contradictions(made):
        raise UserError(f"method.name: {config.name}: {method.__name__}.{line}")
    return made


def _method_class(name: str) -> type[Method]:
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise UserError(f"method.name: {name}: there is no such method{nearest(name, found)}")
    try:
        method = found[name].load()
    except Exception as error:  # whatever somebody else's module does when it is imported
        raise UserError(
            f"method.name: {name}: cannot be imported from {found[name].value}: {error or type(error).__name__}; "
            "methods import from fedmoe_ds.methods alone"
        ) from None
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UserError(f"method.name: {name}: {found[name].value} is no subclass of fedmoe_ds.methods.Method")
    # Asked before the class is used: a method written for an older version is refused and not run with half of its rules.
    for old, new in _RENAMED.items():
        if hasattr(method, old) and not _is_ours(method, old):
            raise UserError(f"method.name: {name}: {found[name].value} defines `{old}`, which is called `{new}` now; rename it")
    return method


def _is_ours(method: type[Method], name: str) -> bool:
    """Whether a former name means something else now, and the method uses it so: `memory` took blocks once, now nothing."""
    return hasattr(Method, name) and len(signature(getattr(method, name)).parameters) == 1


def method_for(config: Config) -> Method:
    """The method of a run, checked against the whole configuration before anything is loaded."""
    method = load_method(config.method)
    if config.privacy.clip is not None:
        method = private(method, config)
    check_needs(method, config.method.name, config)
    method.check_config(config)
    check_idle(method.params, config)
    method.params = method.params.resolved(config)
    return method


def with_defaults(config: Config, method: Method) -> Config:
    """The configuration with the method's own defaults filled in: what is saved with a run."""
    return config.model_copy(update={"method": config.method.model_copy(update=method.params.model_dump())})
