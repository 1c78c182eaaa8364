"""Dispatcher: which routed rows go to which rank's experts, and in what order (`expert_pass` sends them there and back).

Legend: T token rows at home, N routed rows, D model width, E experts of the model, P expert-parallel ranks, S client segments
of a pass, H halves (1 or 2) in which the rows travel.

Only kept (token, expert) slots become rows, so a capped client pays for its cap alone. Rows are sorted by (expert, segment);
what arrives from one peer is therefore sorted too. In `bitwise` mode every peer's rows form a block of their own, because a
peer sends one client's rows per pass; in `fast` mode all rows are merged by expert first.

Rows may travel in two halves (`expert_pass`): first those for the first half of every rank's experts. Cut by experts, and not
by clients or rows, every group of rows stays whole: products, and the sums of gradients over a group, have the same terms in
the same order, and no weight is read twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fedmoe_ds.distributed.collectives import all_to_all
from fedmoe_ds.model.client_slots import ClientSlots
from fedmoe_ds.model.experts import Block
from fedmoe_ds.model.router import Routing


@dataclass(frozen=True)
class Pool:
    """The expert pool as one rank sees it, and the client slots of the wave.

    `wave_clients` is the number of clients in flight, each of which has a slot (`client_slots.py`); `shard` is the rank's place
    in its cluster. With `shared` all rows use the adapters at slot 0 (evaluation of the global model); with `in_halves` rows
    travel in two halves, if they travel at all.
    """

    group: torch_dist.ProcessGroup | None
    ep_size: int
    num_experts: int
    wave_clients: int
    merge: bool  # fast mode: one block for all clients
    shared: bool = False
    shard: int = 0
    in_halves: bool = False

    @cached_property
    def slots(self) -> ClientSlots:
        return ClientSlots(self.wave_clients, self.ep_size)

    @property
    def home_clients(self) -> int:
        """Home slots of the rank that has most, by which ranks exchange what they know of their clients."""
        return self.slots.most

    def wave_slot(self, peer: int, slot: int) -> int:
        return 0 if self.shared else self.slots.span(peer).start + slot

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ep_size

    @cached_property
    def parts(self) -> list[slice]:
        """The experts of a rank that rows travel to together: the same places on all ranks."""
        travel = self.in_halves and self.ep_size > 1
        return halves(self.local_experts) if travel else [slice(0, self.local_experts)]


def halves(held: int) -> list[slice]:
    """Of a rank's experts; one expert is not cut."""
    # Of an odd number the first half has one more: while its products are computed, the rows of the second travel.
    first = (held + 1) // 2
    return [slice(0, first), slice(first, held)] if held > 1 else [slice(0, held)]


@dataclass(frozen=True)
class Part:
    """Rows that travel together, and what they go through."""

    # Rows per peer, as lists on the host: the all-to-all takes its split sizes from there.
    send: list[int]
    receive: list[int]
    home: slice  # among the rows of the plan
    merge_N: Tensor | None  # order that merges what several peers sent (fast mode)
    unmerge_N: Tensor | None
    blocks: list[Block]  # of the rows that have arrived


@dataclass(frozen=True)
class Plan:
    """Who sends what to whom in one layer of one pass (no gradients in here)."""

    tokens_N: Tensor  # home token of each routed row, rows sorted by (half, expert, segment)
    slots_N: Tensor  # its position in the flattened [T, K]
    by_token_N: Tensor  # rows sorted by (token, expert), for the weighted sum
    token_starts_T: Tensor  # first entry of each token in by_token_N
    parts: list[Part]  # one, or two halves


def make_plan(routing: Routing, segment_T: Tensor, slot: int | None, pool: Pool) -> Plan:
    """Plan one layer. Where `routing.kept` is known nothing here waits for a GPU, but for the counts that ranks exchange.

    Args:
        routing: the decision for this rank's rows.
        segment_T: home client slot of each row.
        slot: the home slot that all ranks run in this pass (bitwise), or None when all slots run together (fast).
        pool: the expert pool.
    """
    top_k, experts, parts = routing.kept_TK.shape[1], pool.num_experts, len(pool.parts)
    flat_N = _kept_places(routing)
    # With a common slot all rows of a rank are one client's, so the expert alone tells groups apart.
    groups = 1 if slot is not None else pool.home_clients
    key_N = _travel_order(routing.experts_TK.flatten().index_select(0, flat_N), pool) * groups
    if slot is None:
        key_N = key_N + segment_T.index_select(0, flat_N // top_k)
    # Stable: rows of one group stay in token order, so sums over a client's rows run in the same order on every topology.
    key_N, order_N = key_N.sort(stable=True)
    # Keys are sorted, so a search finds where each group ends; to count them, torch would ask the device for the largest first.
    places_G = torch.arange(parts * experts * groups, device=key_N.device)
    ends_G = torch.searchsorted(key_N, places_G, right=True, out_int32=True)
    # Every rank of the group comes here in every pass, with rows or without: the exchange of rows needs its counts.
    counts = _Counts.of(ends_G, groups, pool)
    slots_N = flat_N.index_select(0, order_N)
    tokens_N = slots_N // top_k
    # A token's rows in the order of experts, so its sum is taken in one order wherever they are. Unless they travel in halves,
    # rows have it already, and the sort is stable.
    by_token_N = (tokens_N if parts == 1 else tokens_N * experts + key_N // groups % experts).argsort(stable=True)
    per_token_T = routing.kept_TK.sum(1)
    # Exclusive prefix sums; a token without rows gets an empty range and with it a sum of zero.
    starts_T = per_token_T.cumsum(0) - per_token_T
    if counts is None:
        return Plan(tokens_N, slots_N, by_token_N, starts_T, [_part_at_home(ends_G, len(key_N), slot, pool)])
    # Read as late as can be: what was queued meanwhile keeps a GPU busy while the host waits for the peers' numbers.
    return Plan(tokens_N, slots_N, by_token_N, starts_T, _parts(counts, slot, pool))


def _travel_order(experts_N: Tensor, pool: Pool) -> Tensor:
    """Numbers of experts, those of second halves behind all others: [0, H x E)."""
    if len(pool.parts) == 1:
        return experts_N
    second_N: Tensor = experts_N % pool.local_experts >= pool.parts[1].start
    return experts_N + pool.num_experts * second_N


def _kept_places(routing: Routing) -> Tensor:
    """[N]: the kept slots in the flattened [T, K], in order."""
    kept_M = routing.kept_TK.flatten()
    # To find out how many there are, the host would wait for a GPU; on the CPU there is no wait, and this is the faster one.
    if routing.kept is None or kept_M.device.type == "cpu":
        return kept_M.nonzero().squeeze(1)
    return kept_M.nonzero_static(size=routing.kept).squeeze(1)


class _Counts:
    """How many rows go to every peer and come from it: exchanged between the ranks, on their way to the host."""

    def __init__(self, counts_PES: Tensor, received_PES: Tensor, pool: Pool) -> None:
        self.received_PES = received_PES
        # One tensor for all halves and both ways, so that it is one copy: [2 x H, P].
        rows_WP = torch.stack([way[:, held].sum((1, 2)) for held in pool.parts for way in (counts_PES, received_PES)])
        # From a GPU torch copies into pinned memory then, and the host goes on; the event says when the numbers are there.
        self.rows_WP = rows_WP.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.current_stream().record_event() if rows_WP.device.type == "cuda" else None

    @classmethod
    def of(cls, ends_G: Tensor, groups: int, pool: Pool) -> _Counts | None:
        """Of rows whose groups end there; None without peers."""
        if pool.ep_size == 1:
            return None
        counts_HPES = ends_G.long().diff(prepend=ends_G.new_zeros(1)).view(-1, pool.ep_size, pool.local_experts, groups)
        # An expert has rows in its own half alone.
        counts_PES = counts_HPES[0] if len(counts_HPES) == 1 else counts_HPES.sum(0)
        received_PES = torch.empty_like(counts_PES)
        all_to_all(received_PES, counts_PES, group=pool.group)
        return cls(counts_PES, received_PES, pool)

    def read(self) -> list[list[int]]:
        """For every half rows to each peer, then rows from each."""
        if self.arrived is not None:
            self.arrived.synchronize()
        rows: list[list[int]] = self.rows_WP.tolist()
        return rows


def _part_at_home(ends_G: Tensor, rows: int, slot: int | None, pool: Pool) -> Part:
    """All rows, where all experts are."""
    if slot is not None:
        block = Block(0, rows, pool.wave_slot(0, slot), ends_G, ends_G)
    else:
        # An expert's rows end where those of its last client end.
        block = Block(0, rows, None, ends_G.view(pool.num_experts, -1)[:, -1].contiguous(), ends_G)
    return Part([rows], [rows], slice(0, rows), None, None, [block])


def _parts(counts: _Counts, slot: int | None, pool: Pool) -> list[Part]:
    """What leaves and what arrives, half by half."""
    parts, start, rows = list[Part](), 0, counts.read()
    for held, send, receive in zip(pool.parts, rows[::2], rows[1::2], strict=True):
        home = slice(start, start + sum(send))
        received_PES = counts.received_PES[:, held]
        if slot is None:
            parts.append(_merged(received_PES, held, send, receive, home, pool))
        else:
            parts.append(Part(send, receive, home, None, None, _blocks(received_PES, held, receive, slot, pool)))
        start = home.stop
    return parts


def _blocks(received_PES: Tensor, held: slice, receive: list[int], slot: int, pool: Pool) -> list[Block]:
    """A block for the rows of every peer."""
    blocks, start = [], 0
    for peer, rows in enumerate(receive):
        # No client is at home there, so no row has come and there is no slot to look up.
        if slot >= pool.slots.at_home[peer]:
            continue
        # grouped_mm takes int32 ends.
        ends = received_PES[peer, :, 0].cumsum(0).to(torch.int32)
        blocks.append(Block(start, start + rows, pool.wave_slot(peer, slot), ends, ends, held))
        start += rows
    return blocks


def _merged(received_PES: Tensor, held: slice, send: list[int], receive: list[int], home: slice, pool: Pool) -> Part:
    """One block for all: base weights are shared, so an expert's product runs over the rows of all clients at once."""
    experts = received_PES.shape[1]
    # [P, E, S] -> [E, P, S]: for each expert, the wave slots of all peers in order.
    by_expert_EC = pool.slots.of_wave(received_PES.transpose(0, 1).reshape(experts, -1), axis=1)
    ends_G = by_expert_EC.flatten().cumsum(0).to(torch.int32)
    ends_E = by_expert_EC.sum(1).cumsum(0).to(torch.int32)
    block = Block(0, sum(receive), None, ends_E, ends_G, held)
    # Rows arrive in (peer, expert, slot) order and are wanted in (expert, peer, slot) order. Every arrived row gets the number
    # of its group in the wanted order; a stable sort of these numbers is the merge.
    group_PES = torch.arange(received_PES.numel(), device=received_PES.device)
    group_PES = group_PES.view(experts, pool.ep_size, -1).transpose(0, 1).reshape(-1)
    merge_N = group_PES.repeat_interleave(received_PES.flatten(), output_size=block.stop).argsort(stable=True)
    unmerge_N = torch.empty_like(merge_N)
    unmerge_N[merge_N] = torch.arange(len(merge_N), device=merge_N.device)
    return Part(send, receive, home, merge_N, unmerge_N, [block])
