"""Device check: what of a configuration cannot go together with simulated devices, told before anything is loaded."""

from __future__ import annotations

from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import Method
from fedmoe_ds.methods.late_clients import refuse_delays


def check_devices(config: Config, method: Method) -> None:
    """Raise UserError where method and devices do not go together."""
    devices, name = config.devices, config.method.name
    if not devices.simulated:
        return
    if method.accounts:
        raise UserError(
            f"devices: method {name} plans with devices and a channel of its own, and a client has one device; drop the section"
        )
    if method.pooled:
        raise UserError(
            f"devices: method {name} trains one client that has everybody's data, and nobody has its device; drop the section"
        )
    if method.surveys:
        raise UserError(
            f"devices: method {name} passes over clients' data once more when a round has ended, and no device has time for "
            "that; drop the section, or let statistics come from local training"
        )
    place = f"devices.aggregation: {devices.aggregation}"
    if devices.aggregation != "buffered":
        return
    if method.overrides("plan"):
        # Whoever arrives was asked in another round, whose plan is over.
        raise UserError(
            f"{place}: method {name} plans itself who takes part in a round; use synchronous or deadline, or another method"
        )
    if method.statistics():
        raise UserError(
            f"{place}: method {name} delivers statistics with the adapters, and those of past rounds are not kept for updates "
            "that come late; use synchronous or deadline"
        )
    refuse_delays(place, config, method.averages and not method.collects)
    if method.most_delay:
        raise UserError(
            f"{place}: method {name} says itself how late its clients are, and here arrivals do; use synchronous or deadline, "
            "or another method"
        )
