"""Exchanges: the token all-to-alls of a pass, and what of their time passes while something is computed.

With `execution.expert_halves` a layer's rows travel in two halves. Let d be half of a dispatch, c half of a combine and e the
products of one half: a direction takes d + max(d, e) + max(e, c) + c in place of 2d + 2e + 2c. Where exchanges take as long as
each other and products forward as long as backward, the smaller of half the exchanges and all products is hidden. This is
derived from the order in which they are started; nothing of it has been timed.
"""

from __future__ import annotations

import numpy as np

from fedmoe_ds.model.dispatcher import halves
from fedmoe_ds.planner.work import Amount
from fedmoe_ds.planner.workload import Job


def parts_of(job: Job, ep_size: int) -> int:
    """In how many parts a layer's rows travel."""
    asked = job.config.execution.expert_halves and ep_size > 1
    return len(halves(job.expert_layout.num_experts // ep_size)) if asked else 1


def exchanged(job: Job, training: bool, routed: Amount, parts: int = 1) -> tuple[float, Amount]:
    """(token all-to-alls of a pass, numbers that a rank hands over in them) when `routed` rows of a layer leave it.

    Of a layer: row counts (not in the numbers); rows, weights and results forward, part by part; the gradients of these three
    backward, but no gradient of the first layer's rows where no adapter lies below it. With activation checkpointing the
    backward pass runs each layer's forward exchanges again, and every layer's input gets a gradient.
    """
    layers, width = len(job.expert_layout.layers), job.expert_layout.width
    calls, numbers = (1.0 + 3.0 * parts) * layers, layers * routed * (2 * width + 1)
    if not training:
        return calls, numbers
    again = job.config.execution.activation_checkpointing
    below = layers if again or job.projections or job.config.adapters.moe else layers - 1
    return (
        (1 + again) * calls + parts * (2 * layers + below),
        (1 + again) * numbers + routed * (layers * (width + 1) + below * width),
    )


def hidden(job: Job, parts: int, exchanges: Amount, products: Amount) -> Amount:
    """Seconds of the rows' exchanges that pass while experts compute.

    Args:
        exchanges: their seconds.
        products: seconds of what is computed for arrived rows.
    """
    # On a CPU the cores that compute carry the messages, too.
    if parts == 1 or job.device == "cpu":
        return 0.0 * exchanges
    return np.minimum(exchanges / 2, products)
