"""Centralised: one client with everybody's data and the largest budget. The upper bound that federation is measured against.

A round trains on as many sequences as all clients together would, rounded up to whole batches.
"""

from __future__ import annotations

from fedmoe_ds.methods.base import Card, Method


class Centralised(Method):
    """The pooled client."""

    card = Card(
        title="centralised",
        paper="bound",
        adapts="nothing",
        trains="everything on all data, at the largest budget",
        sends="all data",
        weighs="one client",
        completion="steps of all clients together",
    )
    pooled = True
