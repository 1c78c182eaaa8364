"""Centralised: one client with everybody's data and the largest budget. The upper bound that federation is measured against.

A round trains on the tokens of its participants and no others (`fedmoe_ds.clients.pooled`), so that both see as much data
whatever `federation.participation` and `federation.sampling` are. No paper states this bound; all of it is ours.
"""

from __future__ import annotations

from fedmoe_ds.methods import Method, MethodInfo


class Centralised(Method):
    """The pooled client."""

    info = MethodInfo(
        title="centralised",
        paper="bound",
        adapts="nothing",
        trains="everything on all data, at the largest budget",
        sends="all data",
        weighs="one client",
        completion="the sequences of the round's participants, in whole batches",
    )
    pooled = True
