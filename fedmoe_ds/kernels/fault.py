"""Fault handler: a mapped file that shrinks under a running process ends it with one line (fault.cpp), not a bare SIGBUS.

Weights and data are mapped from files. Sizes and checksums are checked before, but a file that is truncated later (by hand, or
by a file system that fails) is only noticed by the processor. A handler that is never called costs nothing.
"""

from __future__ import annotations

import faulthandler

from fedmoe_ds.errors import EXIT_LOST
from fedmoe_ds.kernels.compiling import library


def guard(who: str) -> None:
    """Let this process end with EXIT_LOST and a line that names it and the file; without a compiler, with Python's traceback.

    Args:
        who: the process, at most some hundred characters.
    """
    found = library("fault")
    if found is None:
        # 2 is the file descriptor of standard error: it stays valid where sys.stderr has been replaced.
        faulthandler.enable(2)
        return
    after = (
        " was mapped, and has become shorter or can no longer be read: do not touch it while it is in use, or mend its file "
        "system; then start again (a run: with --resume auto)\n"
    )
    found.guard(f"error: {who}: ".encode(), after.encode(), EXIT_LOST)
