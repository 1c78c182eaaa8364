"""Shortage of memory: what a cluster does about a pass that does not fit.

First the pass is cut where that costs no client anything: fewer clients go through the model together, in the end one. Then
its own step is cut into micro-batches, unless something weighs a whole step. A client that does not fit even so, one sequence
at a time, is left out of the round. Each time the sizes are halved, and all of it is written down before anything is tried
again: whoever resumes the round does the same, and later rounds begin with what has fitted.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedmoe_ds.checkpoint.skipped_clients import SkippedClients
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.out_of_memory import OutOfMemory
from fedmoe_ds.clients.pass_limits import PassLimits
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import method_for


def may_cut_steps(config: Config) -> bool:
    """Whether the method and the losses of a run allow passes on parts of a local step: what `execution.micro_batch_size`
    asks."""
    execution = config.execution.model_copy(update={"micro_batch_size": 1})
    try:
        method_for(config.model_copy(update={"execution": execution}))
    except UserError:
        return False
    return True


def make_room(
    skipped: SkippedClients, round_index: int, shortage: OutOfMemory, waiting: Iterable[Client], config: Config
) -> tuple[str, Client | None]:
    """Write down what comes before a pass is tried again.

    Args:
        waiting: the cluster's clients whose training in this round does not count yet, on all of its ranks.
    Returns:
        What is done about it, in words, and the client that is left out, if one is.
    Raises:
        OSError: it cannot be written down.
    """
    half = (shortage.together or shortage.sequences) // 2
    if shortage.together is not None:
        skipped.limit(round_index, [], half, together=True)
        return f"clients share a pass up to {half} sequences from here on", None
    if half and may_cut_steps(config):
        # Of all of them, not of this client alone: the next one would not fit either, and each try costs a wave.
        skipped.limit(round_index, [client.index for client in waiting], half, together=True)
        return f"a pass has at most {half} sequences of a client from here on", None
    skipped.add(round_index, shortage.client.index)
    return "the round goes on without it", shortage.client


def for_next_start(shortage: OutOfMemory, way: str) -> str:
    """What a rank says that ends, because its peers cannot be called back. slurm/*.sbatch look for these words: such a start is
    none that was lost for nothing."""
    return f"{shortage}; start again with --resume auto: {way}"


def limit_fields(limits: PassLimits) -> dict[str, int | None]:
    """What metrics say about how passes are cut."""
    own = [*limits.own.values(), *([] if limits.each is None else [limits.each])]
    return {"together": limits.together, "each": min(own, default=None)}


def limit_line(limits: PassLimits) -> str:
    """The same for people."""
    fields = limit_fields(limits)
    parts = [f"up to {fields['together']} sequences of clients together"] if fields["together"] is not None else []
    parts += [f"at most {fields['each']} of a client"] if fields["each"] is not None else []
    return f"passes are cut as memory ran out before: {', '.join(parts)}"
