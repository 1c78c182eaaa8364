"""Most delay: by how many rounds a client of a run may be late; of so many past rounds the server keeps the global adapters."""

from __future__ import annotations

from fedmoe_ds.federation.run_spec import RunSpec


def most_delay(spec: RunSpec) -> int:
    """The largest delay that the method assigns, or with which updates arrive from simulated devices."""
    devices = spec.config.devices
    arriving = devices.max_staleness if devices.simulated and devices.aggregation == "buffered" else 0
    return max(spec.method.most_delay, arriving)
