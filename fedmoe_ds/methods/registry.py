"""Registry: methods by name, found by entry point."""

from __future__ import annotations

from importlib.metadata import entry_points

from pydantic import ValidationError

from fedmoe_ds.config import Config, MethodConfig
from fedmoe_ds.errors import UserError, nearest
from fedmoe_ds.methods.base import Method, check_idle, check_needs

GROUP = "fedmoe_ds.methods"


def method_names() -> list[str]:
    """All installed methods."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def load_method(config: MethodConfig) -> Method:
    """Find the method by name and check its parameters. Raises UserError with the nearest name or key."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    if config.name not in found:
        raise UserError(f"method.name: {config.name}: there is no such method{nearest(config.name, found)}")
    method: type[Method] = found[config.name].load()
    given = config.model_dump(exclude={"name"})
    for key in given:
        if key not in method.Params.model_fields:
            known = nearest(key, method.Params.model_fields)
            raise UserError(
                f"method.{key}: unknown key for method '{config.name}'{known}; "
                f"'method={{name: {config.name}}}' drops the keys of another method"
            )
    try:
        return method(method.Params(**given))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"method.{key}: {first['input']!r}: {first['msg']}; see docs/methods.md") from None


def method_for(config: Config) -> Method:
    """The method of a run, checked against the whole configuration before anything is loaded."""
    method = load_method(config.method)
    check_needs(method, config.method.name, config)
    method.check_config(config)
    check_idle(method.params, config)
    return method


def with_defaults(config: Config, method: Method) -> Config:
    """The configuration with the method's own defaults filled in: what is saved with a run."""
    return config.model_copy(update={"method": config.method.model_copy(update=method.params.model_dump())})
