"""Meeting: what ranks decide together before any group is built, through the store that they meet at."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from fedmoe_ds.errors import UserError

_DECIDED = "decided"
_HEAR = datetime.timedelta(seconds=60)
"""How long rank 0 waits until all have heard of a refusal, on hosts that are starved of CPU."""

_meetings = itertools.count()


def decide(store: Store, rank: int, world_size: int, mine: Any, decision: Callable[[list[Any]], Any]) -> Any:
    """What rank 0 makes of every rank's JSON value, in rank order. Every rank calls it, and all of them get the same answer.

    Args:
        store: that all ranks have met at.
    Raises:
        UserError: that of rank 0's `decision`; on all ranks.
    """
    # The store outlives a refusal where a program goes on and tries again.
    told = PrefixStore(f"meeting {next(_meetings)}", store)
    told.set(str(rank), json.dumps(mine))
    if rank == 0:
        told.set(_DECIDED, json.dumps(_answer([json.loads(told.get(str(peer))) for peer in range(world_size)], decision)))
    result, problem = json.loads(told.get(_DECIDED))
    if problem is None:
        return result
    if rank != 0:
        told.set(f"{rank} has heard", "")  # its last word: it waits for no answer
    else:
        # Rank 0 serves the store: it stays until the last one knows. One that is lost by now changes nothing of the problem.
        with contextlib.suppress(torch_dist.DistStoreError):
            told.wait([f"{peer} has heard" for peer in range(1, world_size)], _HEAR)
    raise UserError(problem)


def _answer(views: list[Any], decision: Callable[[list[Any]], Any]) -> tuple[Any, str | None]:
    try:
        return decision(views), None
    except UserError as error:
        return None, str(error)
