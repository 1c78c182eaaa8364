"""Channel groups, merged: what experts that are groups of a dense block's channels have learnt goes back into its matrices.

Legend: W channels of a block, F of a group, D model width.

The base's folder is a model of its dense family already, with the channels in the order of the groups; a group is F rows of
the matrices that lead to the channels and F columns of the one that leads back. So all groups with gates of one are that model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from fedmoe_ds.errors import UserError
from fedmoe_ds.export.merge import Change, Changes, Learnt, Rounding
from fedmoe_ds.export.written import Request
from fedmoe_ds.foundation.channel_groups import GroupedLayer


@dataclass(frozen=True)
class GroupedChange:
    """What becomes of one matrix of a block.

    Attributes:
        parts: of every group its channels, and what becomes of them.
        columns: whether channels are the matrix's columns.
    """

    parts: list[tuple[slice, Change]]
    columns: bool

    def blocks(
        self, learnt: Learnt, read: Callable[[slice], Tensor], rows: Iterable[slice], told: Rounding
    ) -> Iterator[Tensor]:
        """As `Change.blocks`, of the whole matrix."""
        for part in rows:
            # A copy: channels of no group keep the base's bits.
            new_OI = read(part).clone()
            for channels, change in self.parts:
                if self.columns:
                    piece_OF = new_OI[:, channels]
                    self._put(piece_OF, change, learnt, part, told)
                    continue
                first, stop = max(part.start, channels.start), min(part.stop, channels.stop)
                if first < stop:
                    # Rows of the group, as the engine counts them.
                    own = slice(first - channels.start, stop - channels.start)
                    self._put(new_OI[first - part.start : stop - part.start], change, learnt, own, told)
            yield new_OI

    @staticmethod
    def _put(piece: Tensor, change: Change, learnt: Learnt, own: slice, told: Rounding) -> None:
        old = piece.clone()
        (new,) = change.blocks(learnt, lambda _: old, [own], told)
        piece.copy_(new)


def add_groups(request: Request, learnt: Learnt, changes: Changes) -> set[str]:
    """Plan what becomes of the blocks of a model whose channels are grouped; the names of the blocks that move into them.

    Raises:
        UserError: the selected model does without some of the channels.
    """
    layers = [layer for layer in request.run.outline.layers if isinstance(layer, GroupedLayer)]
    if layers and request.top_k != request.full_top_k:
        raise UserError(
            f"--format: merged: tier {request.selection.tier} uses {request.top_k} of {request.full_top_k} groups of channels, "
            "and no config.json can say that; export the tier of all groups"
        )
    for layer in layers:
        changes.update({name: [change] for name, change in grouped_changes(layer).items()})
    stems = {stem for layer in layers for stem in stems_of(layer)}
    return {name for name in learnt.blocks if name.rpartition(".")[0] in stems}


def stems_of(layer: GroupedLayer) -> tuple[str, str]:
    """Of the blocks with what leads to the channels of a group, and with what leads back."""
    return ("experts.gate_up", "experts.down") if layer.gated else ("experts.inner", "experts.outer")


def grouped_changes(layer: GroupedLayer) -> dict[str, GroupedChange]:
    """Of the matrices of one block, by their present names."""
    inner, outer = stems_of(layer)
    groups = [(expert, layer.channels(expert)) for expert in range(layer.num_experts)]
    found = {}
    for place, leaf in enumerate(layer.inner):
        # Gate and up are one matrix in the engine, gate first.
        first = place * layer.ffn_hidden_size
        parts = [(channels, Change(inner, layer.index, expert, first)) for expert, channels in groups]
        found[f"{layer.name}.{leaf}.weight"] = GroupedChange(parts, columns=False)
    parts = [(channels, Change(outer, layer.index, expert, routed=True)) for expert, channels in groups]
    return found | {f"{layer.name}.{layer.outer}.weight": GroupedChange(parts, columns=True)}
