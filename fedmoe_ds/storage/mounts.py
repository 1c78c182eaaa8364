"""Mounts: whether a file lies on a disk of this machine alone, or on a file system that other hosts see as well."""

from __future__ import annotations

import os
from pathlib import Path

# Of these the name of the source is the same on every host of a site. Not 9p and virtiofs: there it is the virtual machine's
# own word for a folder, and two machines may use the same word for two folders.
NETWORK = frozenset({
    "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.weka", "glusterfs", "gpfs", "lustre", "nfs", "nfs4",
    "panfs", "pvfs2", "smb3", "wekafs",
})  # fmt: skip
"""Types of file systems that are a network's."""
_TABLE = Path("/proc/self/mountinfo")


def network_source(path: Path) -> str | None:
    """How hosts call the network file system of a file or folder, for instance `nfs4 server:/home`; None where there is none.

    None as well where the system has no table of mounts, or the table does not tell.

    Raises:
        OSError: there is no such path.
    """
    device = os.stat(path).st_dev
    try:
        table = _TABLE.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    sources = {source for number, kind, source in _mounts(table) if number == _number(device) and kind in NETWORK}
    # One device may be mounted at several places; which of their names it is called by must not depend on the order.
    return min(sources, default=None)


def _mounts(table: str) -> list[tuple[str, str, str]]:
    """(device, type, type and source) of every mount: fields of proc_pid_mountinfo(5)."""
    found = []
    for line in table.splitlines():
        # Between the first six fields and the separator there is any number of optional ones.
        fields, separator, rest = line.partition(" - ")
        words, last = fields.split(" "), rest.split(" ")
        if separator and len(words) >= 6 and len(last) >= 2:
            found.append((words[2], last[0], f"{last[0]} {last[1]}"))
    return found


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"
