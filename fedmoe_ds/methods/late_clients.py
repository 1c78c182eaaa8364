"""Late clients: who cannot have them. They start a round from the global adapters of past rounds (`Assignment.delay`).

What such a client contributes is its change since its own start, put on the present adapters: x + (x_i - x_{t - delay}). That
asks for a mean whose coordinates mean the same in all of these rounds.
"""

from __future__ import annotations

from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError


def refuse_delays(place: str, config: Config, has_mean: bool) -> None:
    """Raise UserError where clients cannot start from the adapters of past rounds.

    Args:
        place: the key and the value that ask for it, as an error begins.
        has_mean: whether the method averages adapters.
    """
    if not has_mean:
        raise UserError(
            f"{place}: clients start from adapters of past rounds, and method {config.method.name} has no mean that their "
            "change could go into; use a method that averages adapters"
        )
    if config.local.drift == "scaffold":
        raise UserError(
            f"local.drift: scaffold: {place.replace(': ', '=')} lets clients start from adapters of past rounds, and the "
            "server's control variate of those rounds is not kept; use none or fedprox"
        )
