"""The control plane and the process groups of a world on one rank: what they hold, and what the start asks of torch's store.

Groups are really built, as the last rank of a world that is not there (`planner.verify`); open files, connections and hops are
arithmetic on them (`distributed.open_files`), held against a real world of 64 ranks by a test.
"""

from __future__ import annotations

from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed.gloo_control import gather_hops
from fedmoe_ds.distributed.open_files import OWN, files_of, gloo_groups
from fedmoe_ds.distributed.topology import ParallelLayout
from fedmoe_ds.planner.verify import files_needed, verify

NAME = "control"
X = "ranks"
POINTS = (16, 64, 256, 1024, 4096, 16384)
WALL = (
    "1 024 open files are usual, and enough on every rank but the first, which has two connections with every rank; "
    "where clients keep blocks, a rank has one with every cluster"
)
_EP_SIZE = 8
_RECORD = 200
"""Bytes of a rank's record in the store, per group: its host's name and its address."""


def measure(x: int) -> dict[str, float]:
    """One world of x ranks: files of rank 0 and the most of any other, connections of rank 0; `personal`: where clients keep
    blocks; `mesh`: the last rank's, of gloo without lazy connections."""
    layout = ParallelLayout(x, _EP_SIZE)
    built = verify(TopologyConfig(), layout, 64, [x - 1])
    groups = gloo_groups(0, x, _EP_SIZE, tensors=True, control=True)
    peers = sum(group.peers for group in groups)
    mesh = [x, _EP_SIZE, layout.clusters, x, _EP_SIZE]  # the same groups, the control plane as one of all ranks
    return {
        "seconds": built.seconds,
        "files_rank_0": built.files[0],
        "files": built.files[1],
        "files_personal": files_needed(layout, tensors=True, personal=True)[1],
        "connections": peers,
        # Every rank writes a record per group, and reads those of its peers there.
        "store_mib": x * _RECORD * (len(groups) + peers) / 2**20,
        "gather_hops": gather_hops(x),
        "mesh_files": files_of(x - 1, x, _EP_SIZE, False, False) + sum(OWN + size - 1 for size in mesh),
        "mesh_store_mib": sum(x * size * (_RECORD + 8 * size) for size in mesh) / 2**20,
    }
